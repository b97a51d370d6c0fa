"""Sampling from a pipeline with the same prompts and seeds, whatever adapter it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .precision import autocast
from .settings import DemoSettings

__all__ = ["sample"]

BATCH = 32


@torch.no_grad()
def sample(
    pipeline: Any,
    prompts: Sequence[str],
    settings: DemoSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Pictures with shape `(N, 3, H, W)` in [-1, 1], one for each prompt."""
    unet = pipeline.unet
    size = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    generator = torch.Generator().manual_seed(settings.seed + 1000)
    noise = torch.randn((len(prompts), *size), generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for index in torch.arange(len(prompts)).split(BATCH):
        with autocast():
            answer = pipeline(
                [prompts[i] for i in index],
                latents=noise[index],
                num_inference_steps=settings.sampling_steps,
                guidance_scale=settings.guidance,
                guidance_rescale=settings.guidance_rescale,
                output_type="pt",
            )
        parts.append(answer.images.float() * 2 - 1)
        progress(int(index[-1]) + 1)
    return torch.cat(parts)
