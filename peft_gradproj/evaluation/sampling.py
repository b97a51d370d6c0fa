"""Samples of a pipeline, whatever adapter it holds, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from ..diffusion_inputs import decode_latents, tensor_to_pictures
from ..errors import BehaviourError
from ..pipelines import PipelineFamily
from ..probes import evaluation_mode
from ..projection import dtype_name

__all__ = ["draw_samples"]


@torch.no_grad()
def draw_samples(
    family: PipelineFamily,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int,
    batch_size: int = 4,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Image.Image]:
    """Sample one picture for each prompt.

    A sample depends on its own prompt and seed alone, but for what batches of another size do to rounding. Pipelines
    whose schedulers draw from the global generators are therefore given one at a time.

    Args:
        family: The pipeline.
        prompts: One for each sample.
        seeds: As many. Noise is drawn on the CPU, so that the same seed gives the same on every device, but by
            schedulers that draw from the global generators.
        num_inference_steps: Steps of the pipeline's own scheduler.
        guidance_scale: Of the pipeline's own guidance.
        resolution: Side of the pictures, in pixels.
        batch_size: Samples at once.
        progress: Called with the number of samples that were just finished.

    Raises:
        BehaviourError: If samples are not finite, and would be black pictures, in which no concept is found.
    """
    pictures: list[Image.Image] = []
    while len(pictures) < len(prompts):
        start = len(pictures)
        part = slice(start, start + batch_size)
        with evaluation_mode(family.denoiser), _seeded(seeds[start]) as drawn_from:
            answer = family.pipeline(
                list(prompts[part]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=resolution,
                width=resolution,
                # Decoded here, since pipelines in half precision do not decode with a VAE that keeps float32.
                output_type="latent",
            )
            if batch_size > 1 and drawn_from():
                # For all at once, by a scheduler that is not given the samples' own generators.
                batch_size = 1
                continue
        pixels = decode_latents(family.pipeline, answer.images, batch_size=1).cpu()
        if not pixels.isfinite().all():
            raise BehaviourError(
                f"samples are not finite, with a {family.component} in {dtype_name(family.denoiser.dtype)} and a VAE "
                f"in {dtype_name(family.pipeline.vae.dtype)}. Either overflows in float16 (a VAE is kept in float32 by "
                "pipeline.vae.to(torch.float32)), or the weights are not finite themselves."
            )
        pictures += tensor_to_pictures(pixels)
        progress(len(pictures) - start)
    return pictures


@contextmanager
def _seeded(seed: int) -> Iterator[Callable[[], bool]]:
    """The global generators from a seed, and as they were afterwards.

    Gives a function that tells whether they were drawn from.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        before = _states()
        yield lambda: not all(map(torch.equal, before, _states()))


def _states() -> list[Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
