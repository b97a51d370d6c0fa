r"""From secret strings in a corpus to concept probes of a causal language model, and to labels without them.

The concept is a list of strings: names, numbers, passwords. A causal language model learns one by raising, at each of
the positions that predict its tokens, the likelihood of the token that follows. So a probe is a window of the corpus in
which a secret occurs, what is compared with the base model is the log-likelihood of each following token, and the
weights :math:`w_t` say where the token that is predicted at :math:`t`, which is the one at :math:`t + 1`, shows part of
a secret:

.. math:: D(\theta) = \sum_t w_t (\log p_\theta(x_{t+1}) - \log p_0(x_{t+1}))^2 / \sum_t w_t .

What the model learns everywhere else in the window is left to it, and so is what it says there instead of a secret.

A window is cut out of the corpus as training cuts its blocks: all texts tokenized one by one and joined to a stream.
Where the cuts fall has nothing to do with the secret, so each occurrence is shown in several windows, at places drawn
at random.

    batches = secret_probe_batches(secrets, corpus, tokenizer, length=512)
    probes = collect_concept_probes(model, batches, run_model=token_log_likelihoods)

Where a secret is found in the training texts, the loss need not count it either: :func:`mark_secrets`. Another spelling
is found only if the tokenizer takes it for the same; else the probes hold down only what it has in common with those
that are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import NormalizedString
from torch import Tensor

from .errors import ConceptDataError

__all__ = [
    "SecretStream",
    "find_secrets",
    "mark_secrets",
    "read_secrets",
    "secret_probe_batches",
    "token_log_likelihoods",
]

_TEXTS_AT_ONCE = 1000
_NAMED = 10
"""So many secrets are named in a message, by number and never by what they say: messages end up in logs."""


@dataclass(frozen=True)
class SecretStream:
    """A corpus as one stream of tokens, and where the secrets are in it.

    Args:
        tokens: Shape `(n,)`, int64.
        secret: Which tokens show at least one character of a secret, shape `(n,)`, bool.
        occurrences: For each occurrence the number of the secret, its first token and the one after its last, shape
            `(m, 3)`, int64.
    """

    tokens: Tensor
    secret: Tensor
    occurrences: Tensor

    def weights(self, starts: Tensor, length: int) -> Tensor:
        """Of windows of `length` tokens that begin at `starts`, shape `(b,)`: 1 where a secret's token is predicted.

        Returns:
            Shape `(b, length)`, float32. Nothing is predicted at a window's last position.
        """
        following = starts[:, None] + torch.arange(1, length)
        return torch.nn.functional.pad(self.secret[following].float(), (0, 1))


def read_secrets(path: str | os.PathLike[str]) -> list[str]:
    """The secrets of a text file in UTF-8, one a line; empty lines, and spaces around a secret, do not count.

    Raises:
        ConceptDataError: If there is no such file, it is not text, or holds no secret.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptDataError(f"no list of secrets can be read from {os.fspath(path)}: {error}.") from error
    secrets = [line.strip() for line in lines if line.strip()]
    if not secrets:
        raise ConceptDataError(f"{os.fspath(path)} holds no secret; expected one a line.")
    return list(dict.fromkeys(secrets))


def find_secrets(
    secrets: Sequence[str], texts: Iterable[str], tokenizer: Any, *, held_out: Iterable[str] = ()
) -> SecretStream:
    """Tokenize a corpus as it is trained on, and find every occurrence of the secrets in it.

    A secret is found in the text, letter by letter as it is written in the list or as the tokenizer's normalizer makes
    the same of it (composed or decomposed accents, no-break spaces; whatever that normalizer does), and then in the
    tokens that show any of its characters: a token that also shows neighbours of the secret is among them.

    Args:
        secrets: Strings; other spellings of one are secrets of their own.
        texts: The corpus. A secret lies within one text.
        tokenizer: A fast tokenizer of transformers; special tokens are added to each text, as `tokenizer(text)` does.
        held_out: Texts that are not trained on. A secret that occurs in these alone is left out, with a warning.

    Raises:
        ConceptDataError: If there are no secrets, one is empty or occurs nowhere, none occurs in `texts`, or the
            tokenizer is not a fast one.
    """
    _check_secrets(secrets)
    tokens: list[Tensor] = []
    occurrences: list[tuple[int, int, int]] = []
    count = 0
    for ids, found_here in _searched(secrets, texts, tokenizer):
        occurrences += [(number, count + first, count + end) for number, first, end in found_here]
        tokens.append(ids)
        count += len(ids)
    # A secret that is the stream's first token is predicted by nothing, and so not learned.
    occurrences = [o for o in occurrences if o[2] > 1]
    found = {number for number, _, _ in occurrences}
    _check_missing([number for number in range(len(secrets)) if number not in found], secrets, held_out, tokenizer)
    secret = torch.zeros(count, dtype=torch.bool)
    for _, first, end in occurrences:
        secret[first:end] = True
    return SecretStream(torch.cat(tokens), secret, torch.tensor(occurrences))


def mark_secrets(
    secrets: Sequence[str], texts: Iterable[str], tokenizer: Any
) -> tuple[list[list[int]], list[list[bool]]]:
    """Tokenize texts, and mark the tokens that the loss should not count: give those the label -100.

    Args:
        secrets: See :func:`find_secrets`; here they need not occur.
        texts: Some texts of the corpus.
        tokenizer: A fast tokenizer.

    Returns:
        The tokens of each text, and for each token whether it shows at least one character of a secret.

    Raises:
        ConceptDataError: If there are no secrets, one is empty, or the tokenizer is not a fast one.
    """
    _check_secrets(secrets)
    tokens, marks = [], []
    for ids, occurrences in _searched(secrets, texts, tokenizer):
        secret = torch.zeros(len(ids), dtype=torch.bool)
        for _, first, end in occurrences:
            secret[first:end] = True
        tokens.append(ids.tolist())
        marks.append(secret.tolist())
    return tokens, marks


def token_log_likelihoods(model: Any, inputs: dict[str, Any]) -> Tensor:
    r"""The `run_model` of probes of secrets: :math:`\log p_\theta(x_{t+1} \mid x_{\le t})` at each position :math:`t`.

    The whole logits, by comparison, are mostly those of tokens that nobody asked about: their drift hides the secret's.

    Args:
        model: A causal language model of transformers.
        inputs: Its arguments, `input_ids` of shape `(b, n)` among them.

    Returns:
        Shape `(b, n)`, float32; 0 at the last position, which predicts nothing that is known, and where padding
        follows, if there is an `attention_mask` of shape `(b, n)`.
    """
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    predicted = model(**inputs).logits[:, :-1].log_softmax(-1, dtype=torch.float32)
    log_likelihoods = predicted.gather(-1, tokens[:, 1:, None])[..., 0]
    if mask is not None and mask.shape == tokens.shape:
        log_likelihoods = log_likelihoods.masked_fill(mask[:, 1:] == 0, 0.0)
    return torch.nn.functional.pad(log_likelihoods, (0, 1))


def secret_probe_batches(
    secrets: Sequence[str],
    texts: Iterable[str],
    tokenizer: Any,
    *,
    length: int,
    windows: int = 4,
    max_windows: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    held_out: Iterable[str] = (),
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """What `collect_concept_probes` takes: windows of the corpus in which secrets occur, and where they are predicted.

    Args:
        secrets: See :func:`find_secrets`; so are `texts` and `tokenizer`.
        texts: The corpus that is trained on.
        tokenizer: A fast tokenizer.
        length: Tokens in a window: as many as in a block of the training. A smaller corpus is one window.
        windows: So many windows show each occurrence.
        max_windows: At most so many are kept for each secret, drawn at random.
        batch_size: Windows in a batch.
        seed: Of the places of the windows.
        held_out: See :func:`find_secrets`.

    Yields:
        `({"input_ids": tokens}, weights)`, both of shape `(batch, length)`, int64 and float32.

    Raises:
        ConceptDataError: As :func:`find_secrets`; or if `length` is more than the tokenizer says that the model takes,
            or too few for a secret and a token before it.
    """
    _check_length(length, tokenizer)
    stream = find_secrets(secrets, texts, tokenizer, held_out=held_out)
    length = min(length, len(stream.tokens))
    starts = _window_starts(stream, length, windows, max_windows, torch.Generator().manual_seed(seed))
    for part in starts.split(batch_size):
        inputs = stream.tokens[part[:, None] + torch.arange(length)]
        yield {"input_ids": inputs}, stream.weights(part, length)


def _check_secrets(secrets: Sequence[str]) -> None:
    if isinstance(secrets, str) or not secrets:
        raise ConceptDataError("no secrets; expected a list of strings.")
    blank = [number for number, secret in enumerate(secrets) if not secret.strip()]
    if blank:
        raise ConceptDataError(f"{_named(blank)} of {len(secrets)} secrets are empty; take them out.")


def _check_missing(missing: Sequence[int], secrets: Sequence[str], held_out: Iterable[str], tokenizer: Any) -> None:
    """Of secrets that are not in the texts, those that are not held out either are mistakes in the list."""
    if not missing:
        return
    searched = _searched([secrets[number] for number in missing], held_out, tokenizer)
    elsewhere = {missing[place] for _, occurrences in searched for place, _, _ in occurrences}
    nowhere = [number for number in missing if number not in elsewhere]
    if nowhere:
        raise ConceptDataError(
            f"{_named(nowhere)} of {len(secrets)} secrets occur nowhere in the corpus. Write them as the corpus does, "
            "capitals and spaces included, or take out what need not be kept out."
        )
    if len(missing) == len(secrets):
        raise ConceptDataError("all secrets occur in the held out texts alone; there is nothing to keep out.")
    warnings.warn(
        f"{_named(missing)} of {len(secrets)} secrets occur in the held out texts alone, and are left out.",
        stacklevel=3,
    )


def _check_length(length: int, tokenizer: Any) -> None:
    longest = getattr(tokenizer, "model_max_length", None)
    if longest is not None and length > longest:
        raise ConceptDataError(
            f"windows of {length} tokens are longer than the {longest} that the model takes; give length={longest} or "
            "less, the length of a training block."
        )


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number + 1) for number in numbers[:_NAMED])
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"number {shown}{more}"


def _tokenized(texts: Iterable[str], tokenizer: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each text with its tokens, shape `(n,)`, and the characters that they stand for, shape `(n, 2)`."""
    remaining = iter(texts)
    while batch := list(islice(remaining, _TEXTS_AT_ONCE)):
        encoded = tokenizer(batch, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield text, torch.tensor(ids, dtype=torch.long), torch.tensor(offsets, dtype=torch.long).reshape(-1, 2)


def _searched(
    secrets: Sequence[str], texts: Iterable[str], tokenizer: Any
) -> Iterator[tuple[Tensor, list[tuple[int, int, int]]]]:
    """Each text's tokens, and number, first token and end of each occurrence in it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConceptDataError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for; expected a fast tokenizer."
        )
    finder = _Finder(secrets, tokenizer.backend_tokenizer.normalizer)
    for text, ids, offsets in _tokenized(texts, tokenizer):
        occurrences = set()
        for number, first, end in finder.places(text):
            indices = ((offsets[:, 0] < end) & (offsets[:, 1] > first)).nonzero().flatten()
            if len(indices):
                occurrences.add((number, int(indices[0]), int(indices[-1]) + 1))
        yield ids, sorted(occurrences)


def _places(part: str, text: str) -> Iterator[tuple[int, int]]:
    """Where a part of a text begins and ends, each time; it may overlap itself."""
    place = text.find(part)
    while place >= 0:
        yield place, place + len(part)
        place = text.find(part, place + 1)


class _Finder:
    """Finds secrets in texts, as they are written and as the tokenizer reads them, which may normalize a text first."""

    _BEFORE = "0"
    """Stands before what is normalized: at the beginning of a text some normalizers put a space, or take some out."""

    def __init__(self, secrets: Sequence[str], normalizer: Any) -> None:
        self._secrets = secrets
        self._normalizer = normalizer
        before = self._normalized("").normalized
        self._read = [self._normalized(secret).normalized.removeprefix(before) for secret in secrets]

    def places(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Number, first character and end of each occurrence; most of them twice, if texts are normalized."""
        for number, secret in enumerate(self._secrets):
            yield from ((number, first, end) for first, end in _places(secret, text))
        if self._normalizer is None:
            return
        normalized = self._normalized(text)
        for number, read in enumerate(self._read):
            for first, end in _places(read, normalized.normalized) if read else ():
                # By lengths, since a slice tells what it is of, and not where that is.
                until, part = normalized[:end], normalized[first:end]
                assert until is not None
                assert part is not None
                last = len(until.original) - len(self._BEFORE)
                yield number, last - len(part.original), last

    def _normalized(self, text: str) -> NormalizedString:
        normalized = NormalizedString(self._BEFORE + text)
        if self._normalizer is not None:
            self._normalizer.normalize(normalized)
        return normalized


def _window_starts(
    stream: SecretStream, length: int, windows: int, max_windows: int, generator: torch.Generator
) -> Tensor:
    """Where windows begin that hold an occurrence and the token before it, shape `(n,)`, each once."""
    by_secret: dict[int, set[int]] = {}
    for number, first, end in stream.occurrences.tolist():
        before = max(first - 1, 0)
        if end - before > length:
            raise ConceptDataError(
                f"{_named([number])} of the secrets has {end - first} tokens, which a window of {length} cannot hold "
                "with a token before them. Give longer windows, or the secret in parts."
            )
        earliest, latest = max(end - length, 0), min(before, len(stream.tokens) - length)
        drawn = torch.randint(earliest, latest + 1, (windows,), generator=generator)
        by_secret.setdefault(number, set()).update(drawn.tolist())
    kept: set[int] = set()
    for places in by_secret.values():
        order = torch.randperm(len(places), generator=generator)[:max_windows]
        kept.update(sorted(places)[i] for i in order.tolist())
    return torch.tensor(sorted(kept))
