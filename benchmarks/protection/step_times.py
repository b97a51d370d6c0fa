"""How much longer a training step of a method takes than plain LoRA's, side by side in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles

from tqdm import tqdm

from peft_gradproj.demo.settings import DemoSettings
from peft_gradproj.demo.timing import step_rounds
from peft_gradproj.demo.training import adapted, training_steps
from peft_gradproj.online import FLOOR_PROBES

from .matrix import TUNED
from .methods import ALL_METHODS
from .runs import THREADS_PER_RUN, conditions, load_material, write_json

__all__ = ["ROUNDS", "TIMED", "measure_step_times", "ratios_to_first"]

TIMED = (
    "plain",
    "ours, by default",
    "ours",
    "online",
    "masked, missing 20 %, guarded + online, guided",
    "masked, missing 20 %, second look + online, guided further",
    "ours, guided further",
)
"""Masks, clean pictures and fewer pictures cost what plain LoRA does."""
ROUNDS = 40


def measure_step_times(path: Path, settings: DemoSettings, scratch: Path, rounds: int) -> None:
    """Write, by method, the median and the quartiles over rounds of a step's processor time over plain LoRA's.

    A round is the least number of steps in which each corrects as often in every round. Before the first that counts,
    the floor is measured, and the half-spaces that are kept are all there, as they are for most of a training.
    """
    material = load_material(TUNED, settings, scratch)
    data = material.training_set(ALL_METHODS["plain"])
    online = [ALL_METHODS[name] for name in TIMED if ALL_METHODS[name].online]
    every = math.lcm(*(method.probe_every for method in online))
    warm = max(m.probe_every * max(m.probe_history, math.ceil(FLOOR_PROBES / m.probe_batch_size)) for m in online)
    before = math.ceil(warm / every)
    runs = {}
    for name in TIMED:
        method = ALL_METHODS[name]
        config = material.config(method, material.probes(method) if method.online else None)
        unet = adapted(material.pipeline.unet, config, material.settings.seed)
        runs[name] = training_steps(unet, data, material.schedule, material.settings)
    about = {"task": str(TUNED), "threads": THREADS_PER_RUN, "rounds": rounds, "steps_a_round": every, **conditions()}
    with tqdm(total=before + rounds, desc="rounds", smoothing=0) as bar:
        seconds = step_rounds(runs, every, before + rounds, clock=time.process_time, progress=lambda done: bar.update())
    counted = {name: taken[before:] for name, taken in seconds.items()}
    write_json(path, {**about, "times": ratios_to_first(counted)}, indent=1)


def ratios_to_first(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """The median and the quartiles of what each takes over what the first does in the same round."""
    first = next(iter(seconds.values()))
    found = {}
    for name, taken in seconds.items():
        low, median, high = quantiles([x / y for x, y in zip(taken, first, strict=True)], n=4, method="inclusive")
        found[name] = {"low": round(low, 4), "median": round(median, 4), "high": round(high, 4)}
    return found
