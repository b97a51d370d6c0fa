"""How much longer a training step takes than stock LoRA's, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from .settings import DemoSettings
from .training import TrainingSet, training_steps

__all__ = ["step_times"]


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
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(settings.timing_rounds + 1):
        for name, steps in runs.items():
            start = time.perf_counter()
            for _ in range(settings.probe_every):
                next(steps)
            rounds[name].append((time.perf_counter() - start) / settings.probe_every)
        progress(number + 1)
    # The first round allocates what later ones reuse.
    return {name: median(times[1:]) for name, times in rounds.items()}
