"""Which words of the captions name a concept, told from the pictures in which it was found.

Where captions name the concept, what else its pictures teach is learned together with the name, and less of it is kept
without (docs/limits.md). Taking the name out is `gradproj mask --remove-phrase`; this finds what to give it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .training_data import in_one_form

__all__ = ["TellingPhrase", "find_telling_phrases"]

LONGEST = 8
"""Words of a phrase, at most."""
FEWEST = 5, 0.001
"""Captions that have it, at least: so many, and such a share. Others are too many to count, and tell little."""
LEVEL = 0.01
"""How likely it may be that chance alone makes any phrase telling."""

_ENDS = re.compile(r"[,;:!?()\[\]\"]|\.(?=\s|$)")
"""What no phrase reaches across."""

Words = tuple[str, ...]


@dataclass(frozen=True)
class TellingPhrase:
    """Words that stand under pictures that show the concept more often than under others: they may name it."""

    phrase: str
    """In lower case, with letters composed and straight apostrophes."""
    shown: int
    """So many captions of pictures that show the concept have it."""
    others: int
    """So many of the others."""


def find_telling_phrases(captions: Sequence[str], shows: Sequence[bool], *, most: int = 3) -> list[TellingPhrase]:
    """The phrases by which a caption tells best whether its picture shows the concept.

    The first is the one with the largest log-likelihood ratio (Dunning 1993, "Accurate Methods for the Statistics of
    Surprise and Coincidence") of those that are more frequent where the concept is shown; of several in the same
    captions the longest. Each further one is found in what the first ones leave of the captions. Only such are returned
    as chance makes in one of a hundred data sets at most (Bonferroni, over all phrases that enough captions have).
    Nothing can be told where all pictures show the concept, nor in scripts that have no blanks between words.

    Args:
        captions: Of the pictures.
        shows: As many: whether the picture shows the concept.
        most: So many are returned at most.
    """
    left = [[tuple(part.split()) for part in _ENDS.split(in_one_form(caption).lower())] for caption in captions]
    shown_pictures = sum(map(bool, shows))
    pictures = shown_pictures, len(captions) - shown_pictures
    found: list[TellingPhrase] = []
    while len(found) < most and all(pictures):
        counts = _counts(left, shows, max(FEWEST[0], math.ceil(FEWEST[1] * len(captions))))
        ratio, _, phrase = max(
            ((_ratio(hits, pictures), len(phrase), phrase) for phrase, hits in counts.items()), default=(0.0, 0, ())
        )
        # Of a chi-square with one degree of freedom, exp(-x / 2) is above the probability of more than x.
        if ratio <= 2 * math.log(max(1, len(counts)) / LEVEL):
            break
        found.append(TellingPhrase(" ".join(phrase), *counts[phrase]))
        left = [[rest for part in parts for rest in _without(part, phrase)] for parts in left]
    return found


def _counts(captions: Sequence[Sequence[Words]], shows: Iterable[bool], fewest: int) -> dict[Words, tuple[int, int]]:
    """How many captions of pictures that show the concept, and of others, have each phrase that enough have.

    Words are extended to phrases while enough have them, since no longer phrase is in more captions than its parts
    (Agrawal and Srikant 1994, "Fast Algorithms for Mining Association Rules").
    """
    labelled = list(zip(captions, shows, strict=True))
    frequent: dict[Words, tuple[int, int]] = {}
    for length in range(1, LONGEST + 1):
        counts = Counter[Words](), Counter[Words]()
        for parts, shows_it in labelled:
            counts[not shows_it].update(
                {
                    words[start : start + length]
                    for words in parts
                    for start in range(len(words) - length + 1)
                    if length == 1
                    or (words[start : start + length - 1] in frequent and words[start + 1 : start + length] in frequent)
                }
            )
        longer = {
            phrase: (counts[0][phrase], counts[1][phrase])
            for phrase in counts[0].keys() | counts[1].keys()
            if counts[0][phrase] + counts[1][phrase] >= fewest
        }
        if not longer:
            break
        frequent |= longer
    return frequent


def _without(words: Words, phrase: Words) -> Iterator[Words]:
    """What stands before, between and after its places: words that it parted are no phrase."""
    start = 0
    for place in range(len(words)):
        if words[place : place + len(phrase)] == phrase:
            yield words[start:place]
            start = place + len(phrase)
    yield words[start:]


def _ratio(counts: tuple[int, int], pictures: tuple[int, int]) -> float:
    """The log-likelihood ratio of two shares against equal ones; 0 where the first is not the larger one."""
    if counts[0] * pictures[1] <= counts[1] * pictures[0]:
        return 0.0
    share = sum(counts) / sum(pictures)
    return 2 * sum(
        count * math.log(count / (of * expected))
        for hits, of in zip(counts, pictures, strict=True)
        for count, expected in ((hits, share), (of - hits, 1 - share))
        if count
    )
