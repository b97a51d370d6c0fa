"""What an evaluation of an adapter found, as one object that becomes JSON, a table and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..behaviour import BehaviourResult
from ..untrusted import printable
from .figures import Estimate, Share, json_value

__all__ = ["COLUMNS", "EvaluationReport", "Figure", "LossCurves", "Measure", "Sample", "figure_text"]

FORMAT_VERSION = 1

COLUMNS = {
    "base": "base model",
    "plain": "plain LoRA",
    "protected": "protected LoRA",
    "with_concept": "pictures with it",
    "without": "pictures without",
}
"""What a measure may have a figure of: the models, and real pictures, which show what the measure can tell at all."""

Figure = Estimate | Share | float | None
"""A mean with its standard error, a share, an exact number, or nothing."""


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    name: str
    title: str
    about: Literal["concept", "rest"]
    """Whether it tells of the concept, which must not be learned, or of all else, which must."""
    explanation: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """By column."""
    not_measured: str | None = None
    """Why there are no figures."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "title": self.title,
            "about": self.about,
            "explanation": self.explanation,
            "not_measured": self.not_measured,
            "figures": json_value(self.figures),
        }


@dataclass(frozen=True)
class LossCurves:
    """Denoising losses by timestep on one set of pictures."""

    pictures: int
    timesteps: tuple[tuple[float, float], ...]
    """The lowest and highest of each bin."""
    losses: Mapping[str, list[Estimate]]
    """Of each model, one for each bin."""
    changes: Mapping[str, list[Estimate]]
    """Of each adapter: its loss less the base model's on the same questions, which is known better than either."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "pictures": self.pictures,
            "timesteps": [list(ends) for ends in self.timesteps],
            "losses": {model: [json_value(e) for e in estimates] for model, estimates in self.losses.items()},
            "changes": {model: [json_value(e) for e in estimates] for model, estimates in self.changes.items()},
        }


@dataclass(frozen=True)
class Sample:
    """One sample, and what was measured on it alone."""

    model: str
    prompt: str
    seed: int
    file: str
    """In the folder of the report."""
    scores: Mapping[str, float]


@dataclass(frozen=True)
class EvaluationReport:
    """All figures of an evaluation."""

    concept: str
    models: tuple[str, ...]
    """`base`, `plain` if it was given, and `protected`."""
    measures: tuple[Measure, ...]
    drift: Mapping[str, BehaviourResult]
    """By model; empty without probes."""
    curves: Mapping[str, LossCurves]
    """On pictures `concept` and `reference`, the latter if there are any."""
    samples: tuple[Sample, ...]
    settings: Mapping[str, Any]
    """What was asked for, seeds and models included."""
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    command: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, str]:
        """Titles of the columns that have a figure."""
        used = {column for measure in self.measures for column in measure.figures} | set(self.models)
        return {column: title for column, title in COLUMNS.items() if column in used}

    def to_dict(self) -> dict[str, Any]:
        """The report, JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "concept": self.concept,
            "models": list(self.models),
            "measures": {measure.name: measure.to_dict() for measure in self.measures},
            "drift": {model: json_value(vars(result)) for model, result in self.drift.items()},
            "losses": {name: curves.to_dict() for name, curves in self.curves.items()},
            "samples": [{**vars(sample), "scores": dict(sample.scores)} for sample in self.samples],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "seconds": dict(self.seconds),
            "command": list(self.command),
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        measured = [measure for measure in self.measures if not measure.not_measured]
        table = Table("", *self.columns.values(), title_justify="left")
        for about in ("concept", "rest"):
            for measure in (m for m in measured if m.about == about):
                cells = [figure_text(measure.figures.get(column)) for column in self.columns]
                table.add_row(*(Text(cell) for cell in (measure.title, *cells)))
            table.add_section()
        missing = [f"{m.title}: not measured: {m.not_measured}" for m in self.measures if m.not_measured]
        return Group(table, *(Text(printable(line)) for line in missing))


def figure_text(figure: Figure) -> str:
    """A figure with its standard error, rounded to where that matters."""
    if figure is None:
        return "–"
    if isinstance(figure, Share):
        return f"{100 * figure.value:.1f} ± {100 * figure.standard_error:.1f} %" if figure.total else "–"
    value, error = (figure.value, figure.standard_error) if isinstance(figure, Estimate) else (figure, math.nan)
    if not math.isfinite(value):
        return "–"
    if not math.isfinite(error) or error == 0:
        return f"{value:.3g}"
    decimals = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
