"""An evaluation as a folder: one page with everything embedded, one JSON file, and the samples."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..folder_swap import replaced_folder
from .evaluation_report import COLUMNS, EvaluationReport, LossCurves, figure_text

__all__ = ["found_beside_evaluation", "write_evaluation"]

TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html.j2"
COLOURS = {"base": "#6b7280", "plain": "#c0392b", "protected": "#1f6feb"}
ROWS = 24
"""Most rows of the sheet of samples."""
THUMBNAIL = 192
"""Longest side of a picture on the page, in pixels."""
_WRITTEN = re.compile(r"evaluation\.json|index\.html|samples(/(base|plain|protected)(/[0-9]{4,}\.png)?)?")
"""Paths in the folder of an evaluation."""


def found_beside_evaluation(folder: Path) -> str | None:
    """What :func:`write_evaluation` would lose: a file or folder in `folder` that no evaluation writes.

    All of them, where there is no report beside the page.

    Returns:
        The path of one in the folder, `None` if there is none.
    """
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    whole = all((folder / name).is_file() for name in ("evaluation.json", "index.html"))
    return next((name for name in names if not (whole and _WRITTEN.fullmatch(name))), None)


def write_evaluation(
    folder: Path, report: EvaluationReport, samples: Sequence[Image.Image], concept: Sequence[Image.Image]
) -> None:
    """Write the folder beside its place, and put it there when it is whole.

    Args:
        folder: Is replaced if it is there.
        report: What was found.
        samples: One for each of the report's samples.
        concept: Pictures that show the concept.
    """
    with replaced_folder(folder) as stage:
        for sample, picture in zip(report.samples, samples, strict=True):
            path = stage / sample.file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        text = json.dumps(report.to_dict(), indent=2, allow_nan=False)
        (stage / "evaluation.json").write_text(text, encoding="utf-8")
        # Paths in a command need not be text.
        page = _page(report, samples, concept).encode("utf-8", errors="backslashreplace")
        (stage / "index.html").write_bytes(page)


def _page(report: EvaluationReport, samples: Sequence[Image.Image], concept: Sequence[Image.Image]) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=figure_text)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        titles=COLUMNS,
        explained=_explained(report),
        sheet=_sheet(report, samples),
        total=len(report.samples) // len(report.models),
        concept=[_thumbnail(picture) for picture in concept[:8]],
        curves=_plot(report),
        command=shlex.join(report.command),
    )


def _explained(report: EvaluationReport) -> dict[str, list[str]]:
    """Titles of the measures that there are, by what they mean."""
    explained: dict[str, list[str]] = {}
    for measure in report.measures:
        if not measure.not_measured:
            explained.setdefault(measure.explanation, []).append(measure.title)
    return explained


def _sheet(report: EvaluationReport, samples: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Rows of one prompt and seed, evenly spaced, so that nobody chose which are shown."""
    count = len(samples) // len(report.models)
    thresholds = report.settings["sscd_thresholds"]
    rows = []
    for index in [row * count // min(count, ROWS) for row in range(min(count, ROWS))]:
        places = range(index, len(samples), count)
        cells = [
            {
                "model": report.samples[place].model,
                "picture": _thumbnail(samples[place]),
                "scores": report.samples[place].scores,
                "found": any(report.samples[place].scores[name] > limit for name, limit in thresholds.items()),
            }
            for place in places
        ]
        rows.append({"prompt": report.samples[index].prompt, "seed": report.samples[index].seed, "cells": cells})
    return rows


def _thumbnail(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _uri("png", buffer)


def _plot(report: EvaluationReport) -> str:
    """Of each set of pictures, the change of the loss from the base model's, by timestep, as a share of that loss."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(2, len(report.curves), squeeze=False, sharex=True)
    titles = {"concept": "where the concept is", "reference": "pictures without the concept"}
    for (upper, lower), (kind, curves) in zip(axes.T, report.curves.items(), strict=True):
        _draw_losses(upper, curves)
        _draw_changes(lower, curves)
        upper.set_title(f"{titles[kind]} ({curves.pictures})", fontsize=10)
        lower.set_xlabel("timestep", fontsize=9)
    axes[0, 0].set_ylabel("denoising loss", fontsize=9)
    axes[1, 0].set_ylabel("change from the base, %", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=9)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return _uri("svg+xml", buffer)


def _draw_losses(axis: Any, curves: LossCurves) -> None:
    for model, estimates in curves.losses.items():
        values = [estimate.value for estimate in estimates]
        axis.plot(_middles(curves), values, color=COLOURS[model], label=COLUMNS[model], marker="o", markersize=3)
    axis.set_yscale("log")


def _draw_changes(axis: Any, curves: LossCurves) -> None:
    axis.axhline(0, color=COLOURS["base"], linewidth=1)
    base = [estimate.value for estimate in curves.losses["base"]]
    for model, changes in curves.changes.items():
        values, errors = (
            [100 * getattr(change, part) / loss for change, loss in zip(changes, base, strict=True)]
            for part in ("value", "standard_error")
        )
        axis.errorbar(_middles(curves), values, errors, color=COLOURS[model], marker="o", markersize=3, capsize=2)


def _middles(curves: LossCurves) -> list[float]:
    return [(low + high) / 2 for low, high in curves.timesteps]


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
