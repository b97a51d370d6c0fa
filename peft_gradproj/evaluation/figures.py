r"""The figures that a comparison of adapters reports, as pure functions of what was measured.

With denoising losses :math:`L` of the base model, an adapter :math:`x` and a yardstick:

- *leak*: the share of samples in which the concept is found;
- *kept* :math:`= (L_{base} - L_x) / (L_{base} - L_{oracle})` on pictures free of the concept: how much of what may be
  learned was learned, the oracle having been trained on the same pictures without the concept;
- *learned* :math:`= (L_{base} - L_x) / (L_{base} - L_{plain})` where the concept is, on pictures that show it: how
  much of the concept the adapter has taken in, shown or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Estimate", "Share", "json_value", "mean_estimate", "share_of_drop"]


@dataclass(frozen=True)
class Estimate:
    """A number and the standard error of its estimate."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, e.g. samples in which the concept is found."""

    hits: int
    total: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Share:
        """Count the true outcomes."""
        return cls(sum(map(bool, outcomes)), len(outcomes))

    @property
    def value(self) -> float:
        """The share, in [0, 1]; NaN of nothing."""
        return self.hits / self.total if self.total else math.nan

    @property
    def standard_error(self) -> float:
        r""":math:`\sqrt{p (1 - p) / n}`; with no or only hits, that of half an outcome, so that it is never 0."""
        if not self.total:
            return math.nan
        p = min(max(self.value, 0.5 / self.total), 1 - 0.5 / self.total)
        return math.sqrt(p * (1 - p) / self.total)


def json_value(figure: Any) -> Any:
    """A figure, or a mapping of some, as JSON has it: what is not finite is `None`, and what is no figure stays."""
    if isinstance(figure, Share):
        return {
            "hits": figure.hits,
            "total": figure.total,
            "value": json_value(figure.value),
            "standard_error": json_value(figure.standard_error),
        }
    if isinstance(figure, Estimate):
        return {"value": json_value(figure.value), "standard_error": json_value(figure.standard_error)}
    if isinstance(figure, Mapping):
        return {name: json_value(value) for name, value in figure.items()}
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of independent values with shape `(N,)`; of fewer than two the standard error is NaN."""
    values = values.double()
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


def share_of_drop(base: Tensor, adapted: Tensor, yardstick: Tensor) -> Estimate:
    r"""How far a loss has come down from the base's to a yardstick's: 0 as the base, 1 as the yardstick.

    The ratio of means :math:`r = \overline{a} / \overline{b}`, with :math:`a = L_{base} - L_x` and
    :math:`b = L_{base} - L_{yardstick}` on the same questions; its standard error is that of the mean of
    :math:`(a - r b) / \overline{b}` (delta method).

    Args:
        base: Losses of the base model, one for each question, shape `(N,)`.
        adapted: Of the adapted model, same shape.
        yardstick: Of the model that sets the scale, same shape.
    """
    drop, scale = (base - adapted).double(), (base - yardstick).double()
    ratio = drop.mean() / scale.mean()
    residual = (drop - ratio * scale) / scale.mean()
    return Estimate(float(ratio), float(residual.std() / math.sqrt(len(residual))) if len(residual) > 1 else math.nan)
