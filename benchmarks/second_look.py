"""What a second look finds of what masks miss.

Three of four real pictures are stamped with a logo, and a detector that makes no other mistake misses some of these:
`find_missed` completes its masks (`gradproj mask --given-masks`). What is missed is a fifth or half of the stamped
pictures, by accident, or those that a detector is likely to miss: the faintest fifth, or the fifth with the smallest
logos. Told are

- in which share of the missed pictures it is found, and what share of its area there;
- in which share of the pictures that do not show it something is marked.

    python -m benchmarks.second_look --output benchmarks/results/second_look.json

Every run is added to the file when it is done, and those that are in it are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

import peft_gradproj
from peft_gradproj import TrainingData, find_missed
from peft_gradproj.concepts import Overlay, Placement
from peft_gradproj.demo.data import load_logos, load_pictures
from peft_gradproj.demo.settings import ASSETS, DemoSettings

from .runs_file import RunsFile

LOGOS = ("youtube", "spotify")
STAMPED_SHARE = 0.75
ANYWHERE: dict[str, tuple[float, float]] = {"across": (0.0, 1.0), "down": (0.0, 1.0)}


Missed = Callable[[list[Placement], np.random.Generator], list[int]]
"""Chooses the numbers of placements that are missed."""


def _by_accident(share: float) -> Missed:
    def chosen(placements: list[Placement], generator: np.random.Generator) -> list[int]:
        return generator.permutation(len(placements))[: round(share * len(placements))].tolist()

    return chosen


def _least(name: str) -> Missed:
    def chosen(placements: list[Placement], generator: np.random.Generator) -> list[int]:
        values = [getattr(placement, name) for placement in placements]
        return np.argsort(values, kind="stable")[: len(values) // 5].tolist()

    return chosen


KINDS: dict[str, tuple[dict[str, tuple[float, float]], Missed]] = {
    "a fifth, in one corner": ({}, _by_accident(0.2)),
    "a fifth, anywhere": (ANYWHERE, _by_accident(0.2)),
    "half, anywhere": (ANYWHERE, _by_accident(0.5)),
    "the smallest fifth, anywhere": ({**ANYWHERE, "scale": (0.15, 0.38)}, _least("size")),
    "the faintest fifth, anywhere": ({**ANYWHERE, "opacity": (0.2, 1.0)}, _least("opacity")),
}
"""How the logo lies on pictures, and which of its placements are missed."""


def stamped(
    overlay: Overlay, pictures: list[Image.Image], missed: Missed, seed: int
) -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
    """Pictures, most of them with the logo, masks of where it is, and masks with what is missed left black."""
    generator = np.random.default_rng([seed, 30])
    shows = generator.random(len(pictures)) < STAMPED_SHARE
    shown = [picture.convert("RGB") for picture in pictures]
    masks = [Image.new("L", picture.size) for picture in pictures]
    numbers = np.flatnonzero(shows)
    placements = [overlay.place(pictures[number].size, generator) for number in numbers]
    for number, placement in zip(numbers, placements, strict=True):
        shown[number], alpha = overlay.paste(pictures[number], placement)
        # White where any of it is, however faint.
        masks[number] = alpha.point(lambda level: 255 if level else 0)
    given = list(masks)
    for chosen in missed(placements, generator):
        number = numbers[chosen]
        given[number] = Image.new("L", pictures[number].size)
    return shown, masks, given


def run(logo: str, kind: str, seed: int, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """One search."""
    settings = replace(DemoSettings(), logo=logo, seed=seed)
    pictures, _ = load_pictures(ASSETS / "noto.parquet", count)
    ranges, missed = KINDS[kind]
    overlay = replace(load_logos(settings)[logo], **ranges)
    shown, masks, given = stamped(overlay, pictures, missed, seed)
    data = TrainingData(shown, [""] * len(shown))
    completed, report = find_missed(ASSETS / "base_model", given, data, seed=seed, progress=False, **options)
    areas, others = [], []
    for number, (mask, left) in enumerate(zip(masks, given, strict=True)):
        found, there = np.asarray(completed[number]) > 0, np.asarray(mask) > 0
        if there.any() and left.getbbox() is None:
            areas.append(float(found[there].mean()))
        elif not there.any():
            others.append(bool(found.any()))
    assert report.second_look is not None
    return {
        "logo": logo,
        "kind": kind,
        "seed": seed,
        "missed": len(areas),
        "others": len(others),
        "found": statistics.mean(area > 0 for area in areas),
        "area": statistics.mean(areas),
        "mistaken": statistics.mean(others),
        "recall": report.second_look.recall,
        "seconds": sum(report.seconds.values()),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: means over the seeds."""
    columns = ("found", "area", "mistaken", "recall")
    rows = [
        "| logo | missed | seeds | found of the pictures | of the area there | marked of the others | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for logo in LOGOS:
        for kind in KINDS:
            chosen = [one for one in runs if (one["logo"], one["kind"]) == (logo, kind)]
            if chosen:
                seeds = ", ".join(str(one["seed"]) for one in chosen)
                means = (f"{statistics.mean(one[column] for one in chosen):.2f}" for column in columns)
                rows.append(f"| {logo} | {kind} | {seeds} | {' | '.join(means)} |")
    return "\n".join(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=396)
    parser.add_argument("--num-pairs", type=int, default=384)
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = {"num_pairs": args.num_pairs, "steps": args.steps}
    file = RunsFile(
        args.output,
        f"python -m benchmarks.second_look --output {args.output}",
        {"pictures": args.pictures, **options},
        (torch, diffusers, peft_gradproj),
        ("logo", "kind", "seed"),
    )
    for logo, kind, seed in file.missing((logo, kind, seed) for seed in args.seeds for logo in LOGOS for kind in KINDS):
        file.add(run(logo, kind, seed, args.pictures, options))
    print(table(file.runs))


if __name__ == "__main__":
    main()
