"""Where the concept is in the training pictures, by two networks that each learned from the other half of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion_inputs import LatentPairs
from ..masks import mark_concept
from .settings import DemoSettings

__all__ = ["find_in_latents"]


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
    folds = [torch.arange(len(latents))[half::2] for half in range(2)]
    shown = []
    for half, fold in enumerate(folds):
        pairs = examples(fold.tolist(), settings.mask_pairs, 2 * settings.seed + half)
        shown.append(_both_halves(pairs) if contrast else (pairs.with_concept, pairs.weights))
    return mark_concept(
        latents,
        shown,
        folds,
        dilation=0,
        steps=settings.mask_steps,
        crop=settings.mask_crop,
        seed=settings.seed,
        progress=progress,
    )


def _both_halves(pairs: LatentPairs) -> tuple[Tensor, Tensor]:
    """With and without in turns, so that any part of them holds both."""
    assert pairs.without is not None
    latents = torch.stack([pairs.with_concept, pairs.without], 1).flatten(0, 1)
    weights = torch.stack([pairs.weights, torch.zeros_like(pairs.weights)], 1).flatten(0, 1)
    return latents, weights
