"""The script that trains the demo's base model, against the weights that are committed."""

import sys
from pathlib import Path

import pytest

from peft_gradproj.demo.data import load_pictures
from peft_gradproj.demo.settings import ASSETS

SCRIPTS = Path(__file__).resolve().parents[1] / "training_scripts" / "base_model"


@pytest.fixture
def architecture(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield __import__("architecture")
    sys.modules.pop("architecture", None)


def test_the_tokenizer_is_the_same_in_each_run_and_that_of_the_committed_weights(architecture):
    from transformers import CLIPTokenizer

    _, captions = load_pictures(ASSETS / "fluent.parquet")
    committed = CLIPTokenizer.from_pretrained(ASSETS / "base_model" / "tokenizer")
    # Equally frequent merges were once ordered by a hash with a random seed, which swapped words between runs.
    for _ in range(3):
        assert architecture.build_tokenizer(captions).get_vocab() == committed.get_vocab()


def test_each_word_of_the_captions_is_one_token(architecture):
    _, captions = load_pictures(ASSETS / "fluent.parquet")
    tokenizer = architecture.build_tokenizer(captions)
    for caption in captions:
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
