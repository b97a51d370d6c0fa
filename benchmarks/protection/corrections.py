"""Other ways to correct a step than that of `peft_gradproj.online`: whether more is kept at as little learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from peft_gradproj.blocks import Blocks
from peft_gradproj.online import RESTORE_LIMIT, OnlineProjection
from peft_gradproj.projection import inner, metric_norm, project_half_space

__all__ = ["CORRECTIONS", "LayersApart", "RestoreAdapts"]


class LayersApart(OnlineProjection):
    """Each layer's part of the step is projected on a half-space of its own.

    A layer takes back the share of the drift that falls to it in the correction of all, in proportion to its
    <s, M^-1 s>; but where its part of the step lowers the drift, that does not make up for another's which raises it.
    Earlier half-spaces are not asked.
    """

    def _swept(self, step: list[Tensor], diagonal: Sequence[Tensor], blocks: Blocks, half_spaces: Any) -> list[Tensor]:
        whole, excess = half_spaces[-1]
        total = inner(whole, whole, diagonal).clamp_min(1e-300)
        steps, gradient, metric = (blocks.split(vectors) for vectors in (step, whole, diagonal))
        for names in _layers(steps):
            part, s, m = ([of[name] for name in names] for of in (steps, gradient, metric))
            corrected = project_half_space(
                part,
                s,
                excess * inner(s, s, m) / total,
                restore=self.restore,
                metric=m,
                restore_limit=RESTORE_LIMIT * self.probe_every * metric_norm(part, m),
            )
            steps |= dict(zip(names, corrected, strict=True))
        return blocks.join(steps)


class RestoreAdapts(OnlineProjection):
    """More of the drift is taken back where it is above what it was of late, and less where it is below."""

    MEMORY = 0.9
    """Of the running mean of the drift, from one correction to the next."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._asked, self._usual = self.restore, 0.0

    def _swept(self, step: list[Tensor], diagonal: Sequence[Tensor], blocks: Blocks, half_spaces: Any) -> list[Tensor]:
        excess = half_spaces[-1][1]
        memory = self.MEMORY if self._usual else 0.0
        self._usual = memory * self._usual + (1 - memory) * excess
        self.restore = min(1.0, self._asked * excess / self._usual) if self._usual else self._asked
        return super()._swept(step, diagonal, blocks, half_spaces)


CORRECTIONS: dict[str, type[OnlineProjection]] = {"layers apart": LayersApart, "restore adapts": RestoreAdapts}
"""By the name that a :class:`.methods.Method` gives."""


def _layers(names: Iterable[str]) -> Iterable[list[str]]:
    """The names of A and B of each layer."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers.values()
