"""Windows of a corpus in which secrets occur, and which positions predict a secret's tokens."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from peft_gradproj import collect_concept_probes
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.text_inputs import (
    find_secrets,
    mark_secrets,
    read_secrets,
    secret_probe_batches,
    token_log_likelihoods,
)

CORPUS = ["Anna's code is 4821; ask her.", "no secret here, only words", "write 4821 or 77, then 4821 again"]


def byte_level(
    merges: list[tuple[str, str]] = (), *, bos: bool = False, longest: int | None = None, normalizer: Any = None
) -> Any:
    """A byte-level BPE as GPT-2's, with the merges and the normalizer that are given."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    limit = {} if longest is None else {"model_max_length": longest}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **limit)


def batches(secrets: list[str], texts: list[str], tokenizer: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows and all weights."""
    parts = list(secret_probe_batches(secrets, texts, tokenizer, **{"length": 16, **options}))
    return torch.cat([inputs["input_ids"] for inputs, _ in parts]), torch.cat([weights for _, weights in parts])


def predicted(tokens: torch.Tensor, weights: torch.Tensor, tokenizer: Any) -> list[str]:
    """Of one window, what the tokens say whose predictions have a weight."""
    return [tokenizer.decode([int(tokens[t + 1])]) for t in weights.nonzero().flatten()]


# Alignment


def test_weights_are_where_the_secrets_tokens_are_predicted():
    tokenizer = byte_level()
    windows, weights = batches(["4821"], CORPUS, tokenizer, length=20)
    assert windows.shape == weights.shape
    assert windows.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert not weights[:, -1].any(), "nothing is predicted at a window's last position"
    for tokens, where in zip(windows, weights, strict=True):
        said = "".join(predicted(tokens, where, tokenizer))
        assert said
        assert set(said) <= set("4821")
        # A window may begin or end in the middle of another occurrence, so that only a part of that is in it.
        assert "4821" in said


def test_tokens_that_join_the_secret_with_its_neighbours_belong_to_it():
    tokenizer = byte_level([("=", "4"), ("2", ";"), ("a", "b")])
    windows, weights = batches(["42"], ["ab id=42; ab ab"], tokenizer, length=6, windows=8)
    for tokens, where in zip(windows, weights, strict=True):
        assert predicted(tokens, where, tokenizer) == ["=4", "2;"]


def test_a_secret_within_a_token_makes_that_token_secret():
    tokenizer = byte_level([("4", "2"), ("42", ";"), ("=", "42;")])
    windows, weights = batches(["42"], ["the id=42; is"], tokenizer, length=6)
    assert {tuple(predicted(t, w, tokenizer)) for t, w in zip(windows, weights, strict=True)} == {("=42;",)}


SPACED = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
"""As Llama 2's."""


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), SPACED])
def test_letters_of_several_bytes_are_found_whole_and_without_the_space_before_them(normalizer):
    tokenizer = byte_level(normalizer=normalizer)
    stream = find_secrets(["Zoë"], ["ask Zoë now"], tokenizer)
    assert int(stream.secret.sum()) == 4
    assert tokenizer.decode(stream.tokens[stream.secret]) == "Zoë"


@given(st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=5), st.text("ab", min_size=1, max_size=3))
def test_every_occurrence_is_found_and_nothing_else(texts, secret):
    tokenizer = byte_level([("a", "b"), ("ab", "a")], bos=True)
    # By hand: which characters are of an occurrence, and which characters each token of letters says.
    expected: list[bool] = []
    for text in texts:
        ours = {i + j for i in range(len(text)) if text.startswith(secret, i) for j in range(len(secret))}
        place, marks = 0, [False]
        for token in tokenizer(text)["input_ids"][1:]:
            size = len(tokenizer.decode([token]))
            marks.append(any(i in ours for i in range(place, place + size)))
            place += size
        expected += marks
    if not any(expected):
        with pytest.raises(ConceptDataError, match="nowhere"):
            find_secrets([secret], texts, tokenizer)
        return
    stream = find_secrets([secret], texts, tokenizer)
    assert stream.secret.tolist() == expected


NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFKC and single spaces": normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
    "NFD in small letters": normalizers.Sequence([normalizers.Strip(), normalizers.NFD(), normalizers.Lowercase()]),
}
"""As Qwen's, SentencePiece's and BERT's do."""


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS.keys())
@given(
    texts=st.lists(st.text("eE\u0301\u0327é \u00a0\ufb01", min_size=1, max_size=12), min_size=1, max_size=4),
    secret=st.text("eéi", min_size=1, max_size=3),
)
def test_what_the_tokenizer_takes_for_a_secret_is_one_however_it_is_written(normalizer, texts, secret):
    tokenizer = byte_level(normalizer=normalizer)
    normalized = [normalizer.normalize_str(text) for text in texts]
    tokens, marks = mark_secrets([secret], texts, tokenizer)
    same_tokens, same_marks = mark_secrets([normalizer.normalize_str(secret)], normalized, tokenizer)
    assert tokens == same_tokens
    for row, same in zip(marks, same_marks, strict=True):
        # As it is written, a text may hold more: a letter whose accent follows.
        assert all(mark >= expected for mark, expected in zip(row, same, strict=True))


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize(("normalizer", "found"), [(normalizers.NFC(), 2), (None, 1)])
def test_other_normal_forms_are_other_spellings_to_a_tokenizer_that_tells_them_apart(normalizer, found, listed):
    texts = [f"ask Zoe, not {unicodedata.normalize(form, 'Zoë')} now" for form in ("NFC", "NFD")]
    tokenizer = byte_level(normalizer=normalizer)
    stream = find_secrets([unicodedata.normalize(listed, "Zoë")], texts, tokenizer)
    assert len(stream.occurrences) == found
    said = tokenizer.decode(stream.tokens[stream.secret])
    assert unicodedata.normalize("NFC", said) == found * "Zoë"


def test_texts_are_joined_with_their_special_tokens_as_training_joins_them():
    tokenizer = byte_level(bos=True)
    stream = find_secrets(["4821"], CORPUS, tokenizer)
    assert stream.tokens.tolist() == [token for text in CORPUS for token in tokenizer(text)["input_ids"]]
    assert not stream.secret[stream.tokens == tokenizer.bos_token_id].any()


# Windows


def test_each_occurrence_is_shown_whole_with_a_token_before_it_at_several_places():
    tokenizer = byte_level()
    texts = ["x" * 60 + "4821" + "y" * 60]
    windows, weights = batches(["4821"], texts, tokenizer, length=16, windows=6)
    firsts = [int(where.nonzero()[0]) for where in weights]
    assert len(set(firsts)) == len(windows) > 2
    assert all("4821" in "".join(predicted(t, w, tokenizer)) for t, w in zip(windows, weights, strict=True))


def test_a_secret_that_just_fits_into_a_window_with_the_token_before_it_has_that_window():
    tokenizer = byte_level()
    windows, weights = batches(["0123456789"], ["x" * 30 + "0123456789" + "y" * 30], tokenizer, length=11)
    assert len(windows) == 1
    assert "".join(predicted(windows[0], weights[0], tokenizer)) == "0123456789"


def test_windows_are_those_of_the_seed():
    tokenizer = byte_level()
    first, again, other = (batches(["4821"], CORPUS * 4, tokenizer, length=12, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_a_secret_that_occurs_often_has_at_most_so_many_windows_and_others_keep_theirs():
    tokenizer = byte_level()
    texts = ["aaaa 11 bbbb "] * 50 + ["cccccccc 22 dddddddd"]
    windows, weights = batches(["11", "22"], texts, tokenizer, length=8, windows=3, max_windows=10)
    said = ["".join(predicted(t, w, tokenizer)) for t, w in zip(windows, weights, strict=True)]
    assert len([s for s in said if "11" in s and "22" not in s]) <= 10
    assert any("22" in s for s in said)


def test_a_corpus_that_is_smaller_than_a_window_is_one_window():
    tokenizer = byte_level()
    windows, weights = batches(["42"], ["is 42."], tokenizer, length=100)
    assert windows.shape == (1, 6)
    assert predicted(windows[0], weights[0], tokenizer) == ["4", "2"]


def test_the_first_token_of_the_corpus_is_predicted_by_nothing():
    tokenizer = byte_level()
    windows, weights = batches(["42"], ["42 is it"], tokenizer)
    assert predicted(windows[0], weights[0], tokenizer) == ["2"]
    with pytest.raises(ConceptDataError, match="nowhere"):
        find_secrets(["4"], ["4 is it"], tokenizer)


@pytest.mark.parametrize("stored", [False, True])
def test_windows_become_probes_whose_targets_are_recomputed_or_small(stored):
    tokenizer = byte_level(longest=64)
    model = tiny_llama(vocabulary=len(tokenizer))
    generated = secret_probe_batches(["4821", "77"], CORPUS, tokenizer, length=16, batch_size=4)
    probes = collect_concept_probes(model, generated, run_model=token_log_likelihoods, store_targets=stored)
    shape = probes.inputs["input_ids"].shape
    assert (probes.targets.shape if stored else probes.targets) == (shape if stored else None)
    assert probes.weights.shape == shape
    assert len(probes.weighted_indices()) == len(probes) > 4


def test_what_is_compared_is_the_likelihood_of_the_token_that_follows_and_of_no_other():
    model, tokens = tiny_llama(), torch.randint(3, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    found = token_log_likelihoods(model, {"input_ids": tokens})
    loss = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(-found[:, :-1].mean(), loss)
    assert found.dtype == torch.float32
    assert not found[:, -1].any()
    assert token_log_likelihoods(model.bfloat16(), {"input_ids": tokens}).dtype == torch.float32


def test_where_padding_follows_on_either_side_nothing_is_compared_and_all_else_as_without_padding():
    generator = torch.Generator().manual_seed(0)
    model, tokens = tiny_llama().eval(), torch.randint(3, 32, (2, 6), generator=generator)
    padding, ones = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    bare = token_log_likelihoods(model, {"input_ids": tokens})
    right, left = (
        token_log_likelihoods(
            model,
            {
                "input_ids": torch.cat([tokens, padding][::order], 1),
                "attention_mask": torch.cat([ones, padding][::order], 1),
                "position_ids": torch.cat([torch.arange(6), padding[0]][::order]).expand(2, 9),
            },
        )
        for order in (1, -1)
    )
    torch.testing.assert_close(right, torch.cat([bare, padding.float()], 1))
    torch.testing.assert_close(left[:, 3:], bare)
    assert not left[:, :2].any(), "the token before the first is padding, and predicts it"


def test_rows_that_are_packed_under_a_mask_of_their_own_are_compared_everywhere():
    model, tokens = tiny_llama().eval(), torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    packed = token_log_likelihoods(model, {"input_ids": tokens, "attention_mask": causal})
    torch.testing.assert_close(packed, token_log_likelihoods(model, {"input_ids": tokens}))


# Labels


@given(st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=5), st.text("ab", min_size=1, max_size=3))
def test_marked_are_the_tokens_that_are_found_in_the_corpus_and_the_tokens_are_those_of_the_tokenizer(texts, secret):
    tokenizer = byte_level([("a", "b"), ("ab", "a")], bos=True)
    tokens, marks = mark_secrets([secret], texts, tokenizer)
    assert tokens == tokenizer(texts)["input_ids"]
    joined = [mark for row in marks for mark in row]
    if any(joined):
        assert joined == find_secrets([secret], texts, tokenizer).secret.tolist()
    else:
        assert not any(secret in text for text in texts)


# What is refused


def test_secrets_that_occur_nowhere_are_named_by_number_and_not_by_what_they_say():
    with pytest.raises(ConceptDataError, match="number 2, 3 of 3 secrets occur nowhere") as error:
        find_secrets(["4821", "hunter2", "ANNA"], CORPUS, byte_level())
    assert "hunter2" not in str(error.value)
    assert "ANNA" not in str(error.value)


def test_secrets_of_the_held_out_texts_alone_are_left_out_and_those_that_are_nowhere_still_refused():
    tokenizer, held_out = byte_level(), ["later: hunter2"]
    with pytest.warns(UserWarning, match="number 1 of 2 secrets occur in the held out texts alone") as warned:
        stream = find_secrets(["hunter2", "4821"], CORPUS, tokenizer, held_out=held_out)
    assert "hunter2" not in str(warned[0].message)
    assert set(stream.occurrences[:, 0].tolist()) == {1}
    assert torch.equal(stream.secret, find_secrets(["4821"], CORPUS, tokenizer).secret)
    with pytest.raises(ConceptDataError, match="number 3 of 3 secrets occur nowhere"):
        find_secrets(["hunter2", "4821", "ANNA"], CORPUS, tokenizer, held_out=held_out)
    with pytest.raises(ConceptDataError, match="all secrets occur in the held out texts alone"):
        find_secrets(["hunter2"], CORPUS, tokenizer, held_out=held_out)


def test_windows_longer_than_the_model_takes_are_refused():
    with pytest.raises(ConceptDataError, match="longer than the 32"):
        batches(["4821"], CORPUS, byte_level(longest=32), length=33)


def test_a_secret_that_does_not_fit_into_a_window_is_refused_by_number():
    with pytest.raises(ConceptDataError, match="number 2 of the secrets has 14 tokens, which a window of 14"):
        batches(["4821", "no secret here"], ["then " + text for text in CORPUS], byte_level(), length=14)


@pytest.mark.parametrize(
    ("secrets", "message"), [([], "no secrets"), ("4821", "no secrets"), (["4821", " "], "number 2")]
)
def test_no_secrets_and_empty_ones_are_refused(secrets, message):
    for find in (find_secrets, mark_secrets):
        with pytest.raises(ConceptDataError, match=message):
            find(secrets, CORPUS, byte_level())


@pytest.mark.parametrize("find", [find_secrets, mark_secrets])
def test_a_tokenizer_that_does_not_tell_its_characters_is_refused(find):
    with pytest.raises(ConceptDataError, match=r"ByT5Tokenizer.*fast"):
        find(["4821"], CORPUS, ByT5Tokenizer())


# The list


def test_secrets_are_read_one_a_line(tmp_path):
    path = tmp_path / "secrets.txt"
    path.write_text("\ufeff4821\n\n  Anna Quist \r\n4821\nZoë", encoding="utf-8")
    assert read_secrets(path) == ["4821", "Anna Quist", "Zoë"]


def test_a_list_that_cannot_be_read_or_is_empty_is_refused(tmp_path):
    with pytest.raises(ConceptDataError, match="no list of secrets"):
        read_secrets(tmp_path / "absent.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConceptDataError, match="holds no secret"):
        read_secrets(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConceptDataError, match="no list of secrets"):
        read_secrets(tmp_path / "binary.txt")
