"""The demo's one HTML page: the report as a reader sees it, with everything embedded."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..diffusion_inputs import tensor_to_pictures
from ..evaluation.figures import Estimate, Share
from .data import StampedData
from .report import DemoReport

__all__ = ["write_page"]

TEMPLATE = Path(__file__).parent / "templates" / "page.html.j2"
COLUMNS = {
    "plain": "plain LoRA",
    "ours": "ours",
    "oracle": "oracle",
    "base": "base model",
}
COLOURS = {"plain": "#c0392b", "ours": "#1f6feb", "oracle": "#6b7280"}


def write_page(
    path: Path,
    report: DemoReport,
    data: StampedData,
    logo: Image.Image,
    prompts: Sequence[str],
    samples: dict[str, Tensor],
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        report: What was measured.
        data: Where the training pictures of the sheet come from.
        logo: What was stamped.
        prompts: Of the samples.
        samples: Pictures `(N, 3, H, W)` in [-1, 1] by model.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=_percent, estimate=_estimate)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        settings=asdict(report.settings),
        columns=COLUMNS,
        sheet=_sheet(report, data, prompts, samples),
        sheet_total=len(data.pictures),
        classes=len({*data.captions, *data.held_out_captions}),
        logo=_png(logo),
        curves=_curves(report),
        ratios=report.step_ratios(),
        real_top1=report.real_fidelity[0],
        real_top5=report.real_fidelity[1],
    )
    path.write_text(page, encoding="utf-8")


def _percent(share: Share | None) -> str:
    """`12.5 ± 2.9 %`."""
    return "–" if share is None else f"{100 * share.value:.1f} ± {100 * share.standard_error:.1f} %"


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return "–"
    error = "" if not math.isfinite(estimate.standard_error) else f" ± {estimate.standard_error:.2f}"
    return f"{estimate.value:.2f}{error}"


def _sheet(
    report: DemoReport, data: StampedData, prompts: Sequence[str], samples: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Rows of the sheet: a caption, the training picture if there is one, and a sample of each model."""
    pictures = dict(zip(data.captions, data.pictures, strict=True))
    rows = []
    for index in _spread(len(prompts), report.settings.sheet_rows):
        training = pictures.get(prompts[index])
        cells = [
            {
                "png": _png(tensor_to_pictures(samples[name][index : index + 1])[0]),
                "found": report.figures[name].found[index],
            }
            for name in COLUMNS
        ]
        rows.append({"caption": prompts[index], "training": training and _png(training), "cells": cells})
    return rows


def _spread(length: int, count: int) -> list[int]:
    """Evenly spaced indices, so that nobody chose which samples are shown."""
    count = min(length, count)
    return [index * length // count for index in range(count)]


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(report: DemoReport) -> str:
    """Training loss, and the two denoising losses on held-out pictures, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 2.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for name, colour in COLOURS.items():
        losses = _smooth(report.losses[name], max(1, len(report.losses[name]) // 25))
        left.plot(range(1, len(losses) + 1), losses, color=colour, label=COLUMNS[name])
        steps, measured = zip(*report.checkpoints[name], strict=True)
        for axis, kind in ((middle, "style"), (right, "logo")):
            axis.plot(steps, [values[kind] for values in measured], color=colour, marker="o", markersize=3)
    titles = ("training loss (smoothed)", "pictures without the logo: may fall", "where the logo is: as the oracle")
    for axis, title in zip((left, middle, right), titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]
