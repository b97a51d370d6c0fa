"""Which words of the captions name a concept, told from the pictures in which it was found.

Where captions name the concept, what else its pictures teach is learned together with the name, and less of it is kept
without (docs/limits.md). Taking the name out is `gradproj mask --remove-phrase`; this finds what to give it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["TellingPhrase", "find_telling_phrases"]

LONGEST = 8
"""Words of a phrase, at most."""
LEVEL = 0.01
"""How likely it may be that chance alone makes any phrase telling."""

_ENDS = re.compile(r"[,;:!?()\[\]\"]|\.(?=\s|$)")
"""What no phrase reaches across."""

Words = tuple[str, ...]


@dataclass(frozen=True)
class TellingPhrase:
    """Words that stand under pictures that show the concept more often than under others: they may name it."""

    phrase: str
    """In lower case."""
    shown: int
    """So many captions of pictures that show the concept have it."""
    others: int
    """So many of the others."""


def find_telling_phrases(captions: Sequence[str], shows: Sequence[bool], *, most: int = 3) -> list[TellingPhrase]:
    """The phrases by which a caption tells best whether its picture shows the concept.

    The first is the one with the largest log-likelihood ratio (Dunning 1993, "Accurate Methods for the Statistics of
    Surprise and Coincidence") of those that are more frequent where the concept is shown; of several in the same
    captions the longest. Each further one is found in what the first ones leave of the captions. Only such are returned
    as chance makes in one of a hundred data sets at most (Bonferroni, over all phrases). Nothing can be told where all
    pictures show the concept, nor in scripts that have no blanks between words.

    Args:
        captions: Of the pictures.
        shows: As many: whether the picture shows the concept.
        most: So many are returned at most.
    """
    left = [[tuple(part.split()) for part in _ENDS.split(caption.lower())] for caption in captions]
    shown_pictures = sum(map(bool, shows))
    pictures = shown_pictures, len(captions) - shown_pictures
    found: list[TellingPhrase] = []
    while len(found) < most and all(pictures):
        shown, others = Counter[Words](), Counter[Words]()
        for parts, shows_it in zip(left, shows, strict=True):
            (shown if shows_it else others).update({phrase for part in parts for phrase in _phrases(part)})
        ratio, _, phrase = max(
            ((_ratio((shown[phrase], others[phrase]), pictures), len(phrase), phrase) for phrase in shown),
            default=(0.0, 0, ()),
        )
        # Of a chi-square with one degree of freedom, exp(-x / 2) is above the probability of more than x.
        if ratio <= 2 * math.log(max(1, len(shown.keys() | others.keys())) / LEVEL):
            break
        found.append(TellingPhrase(" ".join(phrase), shown[phrase], others[phrase]))
        left = [[rest for part in parts for rest in _without(part, phrase)] for parts in left]
    return found


def _phrases(words: Words) -> Iterator[Words]:
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            yield words[start:end]


def _without(words: Words, phrase: Words) -> Iterator[Words]:
    """What stands before, between and after its places: words that it parted are no phrase."""
    start = 0
    for place in range(len(words)):
        if place >= start and words[place : place + len(phrase)] == phrase:
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
