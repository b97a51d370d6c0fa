"""How much longer a training step takes than stock LoRA's, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

from .settings import DemoSettings
from .training import TrainingSet, training_steps

__all__ = ["step_rounds", "step_times"]


def step_times(
    unets: Mapping[str, Any],
    data: TrainingSet,
    schedule: Any,
    settings: DemoSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Seconds of a step for each adapted UNet: the median over rounds in which all take turns.

    A round is as many steps as lie between two corrections, so that each round holds exactly one.
    """
    runs = {name: training_steps(unet, data, schedule, settings) for name, unet in unets.items()}
    rounds = step_rounds(runs, settings.probe_every, settings.timing_rounds + 1, progress=progress)
    # The first round allocates what later ones reuse.
    return {name: median(times[1:]) for name, times in rounds.items()}


def step_rounds(
    runs: Mapping[str, Iterator[Any]],
    every: int,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds of a step for each run, one figure a round.

    Args:
        runs: What takes a step each time that it is asked for the next.
        every: Steps that each takes in a round, one run after the other.
        rounds: So many.
        clock: Tells the seconds.
        progress: Called with the number of rounds done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, steps in runs.items():
            start = clock()
            for _ in range(every):
                next(steps)
            seconds[name].append((clock() - start) / every)
        progress(number + 1)
    return seconds
