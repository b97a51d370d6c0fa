"""Which methods run on which tasks: a matrix that two cores can carry, the most telling first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .methods import (
    BY_DEFAULT,
    BY_NAME,
    DEFAULT_SWEEPS,
    DEFAULTS,
    FEWER_STEPS,
    GUIDANCE_SWEEPS,
    GUIDED,
    GUIDED_FURTHER,
    HALF_FOUND,
    MAIN,
    METHODS,
    SWEEPS,
)
from .runs import BASE
from .tasks import TaskKey

SEEDS = (0, 1, 2)
TUNED_LOGO = "logo-youtube"
"""The demo's settings were chosen on it, at seed 0."""
OTHER_LOGO = "logo-spotify"
TUNED = TaskKey(TUNED_LOGO, False, 75, 0)


@dataclass(frozen=True)
class Entry:
    """One run."""

    task: TaskKey
    method: str


def _entries() -> Iterator[Entry]:
    # The question that matters most: a logo, and what else one could do about it.
    for seed in SEEDS:
        for named in (False, True):
            for logo in (TUNED_LOGO, OTHER_LOGO):
                yield from _row(TaskKey(logo, named, 75, seed), MAIN)
        for logo in (TUNED_LOGO, OTHER_LOGO):
            guided = [method.name for method in (*GUIDED, GUIDED_FURTHER[0])]
            guided.append(f"{GUIDED_FURTHER[0].name}, probe history 8")
            yield from _row(TaskKey(logo, False, 75, seed), (*DEFAULTS, *HALF_FOUND, *guided))
            yield from _row(TaskKey(logo, True, 75, seed), (BY_DEFAULT.name,))
        yield from _row(TaskKey(TUNED_LOGO, False, 75, seed), ("ours, guided, negative guidance 1.0",))
    yield from _row(TUNED, (*METHODS, *DEFAULT_SWEEPS, *GUIDANCE_SWEEPS))
    yield from _row(TaskKey(TUNED_LOGO, True, 75, 0), BY_NAME)
    # The most that probes alone can do at that price, where it was not looked for.
    for key in (TaskKey(TUNED_LOGO, False, 75, 1), TaskKey(OTHER_LOGO, False, 75, 0)):
        yield from _row(key, ("online, history 8",))
    # Where masks leave a quarter of the pictures.
    yield from _row(TaskKey("style", False, 75, 0), ("filtered, perfect", "filtered, found", *FEWER_STEPS))
    # Where networks find the least.
    yield from _row(TaskKey("identity", False, 75, 0), ("masked, found by any",))
    # The commands' defaults on what they were not chosen on.
    for seed in SEEDS:
        for concept in ("style", "identity"):
            yield from _row(TaskKey(concept, False, 75, seed), (BY_DEFAULT.name,))
        for logo in (OTHER_LOGO, TUNED_LOGO):
            yield from _row(TaskKey(logo, False, 100, seed), (BY_DEFAULT.name,))
    # What is guided, where it is attacked.
    for seed in SEEDS:
        yield from _row(TaskKey(OTHER_LOGO, False, 100, seed), (GUIDED_FURTHER[1].name,))
    # And on what guidance was not chosen on.
    for seed in SEEDS:
        yield from _row(TaskKey("identity", False, 75, seed), (GUIDED_FURTHER[1].name,))
    for concept, named in (("style", False), (TUNED_LOGO, True), (OTHER_LOGO, True)):
        yield from _row(TaskKey(concept, named, 75, 0), (GUIDED_FURTHER[1].name,))
    # What was not tuned on, first on one seed, then on all.
    for seed in SEEDS:
        for concept in ("style", "identity"):
            for named in (False, True):
                yield from _row(TaskKey(concept, named, 75, seed), MAIN)
        for concept in (TUNED_LOGO, OTHER_LOGO):
            yield from _row(TaskKey(concept, False, 100, seed), MAIN)
    # What fills much of every picture leaves masks little to learn from, which one seed shows.
    for concept in ("style", "identity"):
        yield from _row(TaskKey(concept, False, 100, 0), MAIN)
    for concept in (TUNED_LOGO, "identity"):
        yield from _row(TaskKey(concept, False, 75, 0), SWEEPS)
    # What a training step of four pictures can afford, which is the default.
    yield from _row(TaskKey(OTHER_LOGO, False, 75, 0), ("ours, probe batch size 2",))


def _row(task: TaskKey, methods: Iterable[str]) -> Iterator[Entry]:
    for method in (BASE, *methods):
        yield Entry(task, method)


MATRIX = tuple(dict.fromkeys(_entries()))
"""All runs, in the order in which they are made, each once."""

ASKED = tuple(
    entry
    for entry in MATRIX
    if entry.method in (BASE, *MAIN) or (entry.method in METHODS and replace(entry.task, seed=0) == TUNED)
)
"""Of these what a comparison needs: all methods on one logo, and the main ones everywhere. Others vary settings."""

ATTACKED = tuple(
    Entry(TaskKey(OTHER_LOGO, False, 100, seed), method)
    for seed in SEEDS
    for method in (BASE, "plain", "oracle", "masked, found", "ours", BY_DEFAULT.name, GUIDED_FURTHER[1].name)
)
"""The runs whose adapters are attacked: of the logo that *ours* was not chosen on, where every picture shows it."""
