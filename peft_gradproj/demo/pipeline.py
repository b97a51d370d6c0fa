"""The demo's base model as a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .jobs import quieten_libraries
from .settings import ASSETS

__all__ = ["BASE_MODEL", "load_pipeline", "with_unet"]

BASE_MODEL = ASSETS / "base_model"


def load_pipeline(base_model: str | Path = BASE_MODEL) -> Any:
    """A StableDiffusionPipeline in float32, its UNet frozen."""
    quieten_libraries()
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    pipeline = StableDiffusionPipeline.from_pretrained(base_model).to(torch.float32)
    # Fused attention, the default, is slower than matrix products on a CPU: its backward takes a fifth of a step.
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.unet.requires_grad_(False).eval()
    return pipeline


def with_unet(pipeline: Any, unet: Any) -> Any:
    """The same pipeline around another UNet."""
    return type(pipeline)(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)
