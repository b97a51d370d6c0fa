"""Where the concept is in the training pictures, by two networks that each learned from the other half of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion_inputs import LatentPairs
from ..masks import fit_markers, mark_by_any, mark_concept, mark_missed
from .settings import DemoSettings

__all__ = ["find_by_any", "find_in_latents", "find_missed_in_latents"]


def find_in_latents(
    latents: Tensor,
    examples: Callable[[list[int], int, int], LatentPairs],
    settings: DemoSettings,
    *,
    contrast: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Mark the concept in training pictures.

    Args:
        latents: Of the training pictures, shape `(N, C, h, w)`.
        examples: Called with indices of training pictures, a number and a seed; so many examples of the concept, made
            from those pictures.
        settings: Of the networks.
        contrast: Learn from the halves without the concept as well; where it fills whole pictures, or has to be told
            from others of its kind, only they show what it is not.
        progress: Called with the number of steps done, over both networks.

    Returns:
        1 where it is and 0 elsewhere, not widened, float32, shape `(N, 1, h, w)`.
    """
    folds = _folds(len(latents))
    shown = _shown(folds, examples, settings, contrast)
    return mark_concept(latents, shown, folds, **_options(settings), progress=progress)


def find_by_any(
    latents: Tensor,
    examples: Callable[[list[int], int, int], LatentPairs],
    settings: DemoSettings,
    *,
    contrast: bool = False,
) -> Tensor:
    """Mark it where either network does, as `gradproj launch` has to, which does not know which learned from a picture.

    Arguments and result are those of :func:`find_in_latents`.
    """
    markers = fit_markers(_shown(_folds(len(latents)), examples, settings, contrast), **_options(settings))
    return mark_by_any(markers, latents)


def find_missed_in_latents(latents: Tensor, masks: Tensor, settings: DemoSettings) -> Tensor:
    """Complete masks `(N, 1, h, w)` of training pictures by a second look, with networks of the same settings."""
    return mark_missed(latents, masks, _folds(len(latents)), **_options(settings))


def _folds(length: int) -> list[Tensor]:
    return [torch.arange(length)[half::2] for half in range(2)]


def _shown(
    folds: Sequence[Tensor],
    examples: Callable[[list[int], int, int], LatentPairs],
    settings: DemoSettings,
    contrast: bool,
) -> list[tuple[Tensor, Tensor]]:
    """For each fold the latents that its network learns from, and where they show the concept."""
    shown = []
    for half, fold in enumerate(folds):
        pairs = examples(fold.tolist(), settings.mask_pairs, 2 * settings.seed + half)
        shown.append(_both_halves(pairs) if contrast else (pairs.with_concept, pairs.weights))
    return shown


def _options(settings: DemoSettings) -> dict[str, Any]:
    return {"steps": settings.mask_steps, "crop": settings.mask_crop, "seed": settings.seed}


def _both_halves(pairs: LatentPairs) -> tuple[Tensor, Tensor]:
    """With and without in turns, so that any part of them holds both."""
    assert pairs.without is not None
    latents = torch.stack([pairs.with_concept, pairs.without], 1).flatten(0, 1)
    weights = torch.stack([pairs.weights, torch.zeros_like(pairs.weights)], 1).flatten(0, 1)
    return latents, weights
