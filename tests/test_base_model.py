"""The script that trains the demo's base model, against the weights that are committed."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_gradproj.demo.data import load_pictures
from peft_gradproj.demo.settings import ASSETS

SCRIPTS = Path(__file__).resolve().parents[1] / "training_scripts" / "base_model"


@pytest.fixture
def script(monkeypatch):
    """Import a module of the script's folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield __import__
    for name in ("architecture", "pictures", "train_base_model"):
        sys.modules.pop(name, None)


@pytest.fixture
def architecture(script):
    return script("architecture")


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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_all_layers_of_the_committed_weights_are_trained(part):
    # The last layers of residual branches start at zero. They once stayed there, and samples still looked right.
    (path,) = (ASSETS / "base_model" / part).glob("*.safetensors")
    assert [name for name, tensor in load_file(path).items() if not tensor.any()] == []


def test_a_training_reaches_all_layers_and_continues_as_if_it_had_not_stopped(script, tmp_path):
    training = script("train_base_model")

    def train(folder, steps):
        schedule = ["--decay-steps", "0", "--warmup-steps", "1", "--batch-size", "4"]
        training.main(["--checkpoints", str(folder), "--stage", "unet", "--steps", str(steps), *schedule])
        return torch.load(folder / "unet.pt", weights_only=True)["model"]

    once, twice = tmp_path / "once", tmp_path / "twice"
    training.main(["--checkpoints", str(once), "--stage", "vae", "--vae-minutes", "0"])
    train(once, 0)
    shutil.copytree(once, twice)
    torch.manual_seed(0)
    start = training.TextToLatent(load_pictures(ASSETS / "fluent.parquet")[1]).state_dict()
    trained = train(once, 4)
    assert [name for name, tensor in trained.items() if torch.equal(tensor, start[name])] == []
    train(twice, 2)
    continued = train(twice, 4)
    assert [name for name, tensor in continued.items() if not torch.equal(tensor, trained[name])] == []
