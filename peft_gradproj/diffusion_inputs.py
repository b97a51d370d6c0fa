r"""From concept pairs to what a latent diffusion model sees.

With latents :math:`z`, noise :math:`\epsilon` and a timestep :math:`t`, the model's input is
:math:`z_t = \alpha_t z + \sigma_t \epsilon`. Both halves of a pair get the same noise and timestep, so that the
concept is all that differs between them.

Written for pipelines with `vae`, `tokenizer`, `text_encoder`, `unet` and `scheduler`, such as
`StableDiffusionPipeline`; the pipeline's own scheduler configuration decides how noise is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .concepts import ConceptSet
from .errors import ConceptDataError
from .projection import dtype_name

__all__ = [
    "LatentPairs",
    "concept_probe_batches",
    "contrast_batches",
    "decode_latents",
    "dilated",
    "encode_concept_set",
    "encode_images",
    "encode_prompts",
    "latent_weights",
    "mask_weights",
    "noise_schedule",
    "noised_inputs",
    "pictures_to_tensor",
    "scaled_latents",
    "tensor_to_pictures",
    "training_target",
    "vae_answer",
]

ANSWER_GRID = 4
"""Rows and columns that the answer of a VAE is averaged over."""


@dataclass(frozen=True)
class LatentPairs:
    """A concept set, encoded.

    Args:
        with_concept: Latents, shape `(N, C, h, w)`.
        without: Latents of the other halves, same shape, or `None` where there are none.
        weights: Where the concept is, in [0, 1], shape `(N, 1, h, w)`.
        embeddings: Of the prompts, shape `(N, tokens, width)`.
    """

    with_concept: Tensor
    without: Tensor | None
    weights: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return self.with_concept.shape[0]


def pictures_to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as a tensor with shape `(N, 3, H, W)` in [-1, 1], or `(N, 1, H, W)` for mode L.

    Raises:
        ConceptDataError: If there are none, or their sizes differ.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ConceptDataError(f"pictures have sizes {sorted(sizes)}; expected one size, and at least one picture.")
    arrays = [np.asarray(p if p.mode == "L" else p.convert("RGB"), dtype=np.float32) for p in pictures]
    stacked = torch.from_numpy(np.stack(arrays))
    stacked = stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)
    return stacked.contiguous() / 127.5 - 1


def tensor_to_pictures(pixels: Tensor) -> list[Image.Image]:
    """The inverse of :func:`pictures_to_tensor` for three channels; values outside [-1, 1] are clipped."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


def latent_weights(masks: Tensor, size: tuple[int, int], *, dilation: int = 0) -> Tensor:
    """Bring masks to the resolution of latents.

    Args:
        masks: In [0, 1], shape `(N, 1, H, W)`.
        size: Height and width of the latents.
        dilation: By how many latents to widen the mask: a latent influences its neighbours' pixels, too.

    Returns:
        In [0, 1], shape `(N, 1, *size)`: the largest value of the mask within each latent's cell, widened.
    """
    return dilated(F.adaptive_max_pool2d(masks, size), dilation)


def mask_weights(masks: Sequence[Image.Image], latents: Tensor, *, dilation: int = 0) -> Tensor:
    """:func:`latent_weights` of mode L masks of one size, float32 on the CPU, shape `(N, 1, h, w)`.

    Args:
        masks: N of them; white is 1.
        latents: Of whose height and width the weights are, shape `(*, h, w)`.
        dilation: See :func:`latent_weights`.
    """
    size = (latents.shape[-2], latents.shape[-1])
    return latent_weights((pictures_to_tensor(masks) + 1) / 2, size, dilation=dilation)


def dilated(masks: Tensor, by: int) -> Tensor:
    """Masks `(N, 1, h, w)`, widened by so many places on all sides."""
    return F.max_pool2d(masks, 2 * by + 1, stride=1, padding=by) if by else masks


@torch.no_grad()
def encode_images(pipeline: Any, pictures: Sequence[Image.Image] | Tensor, *, batch_size: int = 32) -> Tensor:
    """Latents as the UNet sees them, float32, shape `(N, C, h, w)`: the mode of the VAE's posterior, scaled.

    Raises:
        ConceptDataError: If some are not finite.
    """
    pixels = pictures if isinstance(pictures, Tensor) else pictures_to_tensor(pictures)
    vae = pipeline.vae
    modes = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode().float() for part in pixels.split(batch_size)]
    latents = scaled_latents(vae, torch.cat(modes))
    # In what is no number nothing is found, and nothing would say so.
    if not torch.isfinite(latents).all():
        raise ConceptDataError(
            f"the VAE, in {dtype_name(vae.dtype)}, gives latents that are not finite. Some overflow in half precision, "
            "that of Stable Diffusion XL among them: bring it to float32 with pipeline.vae.to(torch.float32)."
        )
    return latents


def scaled_latents(vae: Any, latents: Tensor) -> Tensor:
    """What a VAE encodes to, as the denoiser sees it."""
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def vae_answer(vae: Any, encode: Callable[[Tensor], Any] | None = None, like: Tensor | None = None) -> Tensor:
    """How a VAE answers to one fixed picture: by that, two whose latents have as many channels are told apart.

    Latents as the denoiser sees them, averaged over a grid, so that they are few whatever the VAE.

    Args:
        vae: An `AutoencoderKL`.
        encode: What to encode with; its own `encode` by default.
        like: A tensor on the device and of the dtype that it takes; by default as it says itself.

    Returns:
        Float32, on the CPU, shape `(C, 4, 4)`.
    """
    # Waves of several lengths, one in each colour, and a rectangle with sharp edges; without random numbers, which the
    # loop around it draws as if this were not here.
    down, across = torch.meshgrid(*[torch.linspace(0, 1, 64, dtype=torch.float64)] * 2, indexing="ij")
    waves = [torch.sin(2 * torch.pi * (i * across + j * down)) for i, j in ((1, 2), (3, -1), (5, 4))]
    pixels = torch.stack(waves)[None]
    pixels[..., 16:40, 24:56] = pixels.new_tensor([1.0, -1.0, 0.5])[:, None, None]
    pixels = pixels.to(vae.device, vae.dtype) if like is None else pixels.to(like)
    latents = (encode or vae.encode)(pixels)[0].mode().float()
    return F.adaptive_avg_pool2d(scaled_latents(vae, latents), ANSWER_GRID)[0].cpu()


@torch.no_grad()
def decode_latents(pipeline: Any, latents: Tensor, *, batch_size: int = 32) -> Tensor:
    """The inverse of :func:`encode_images`: pictures, float32, shape `(N, 3, H, W)`, about in [-1, 1]."""
    vae = pipeline.vae
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    parts = [vae.decode(part.to(vae.device, vae.dtype)).sample.float() for part in latents.split(batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Embeddings of prompts, float32, shape `(N, tokens, width)`."""
    embeddings = pipeline.encode_prompt(
        list(prompts), pipeline.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    return embeddings.float()


def encode_concept_set(pipeline: Any, concepts: ConceptSet, *, batch_size: int = 32, dilation: int = 0) -> LatentPairs:
    """Encode the pictures, prompts and masks of a concept set with a pipeline's VAE and text encoder.

    Args:
        pipeline: With `vae`, `tokenizer`, `text_encoder` and `encode_prompt`.
        concepts: Pictures of one size.
        batch_size: Pictures that the VAE encodes at once.
        dilation: See :func:`latent_weights`.
    """
    with_concept = encode_images(pipeline, [pair.with_concept for pair in concepts], batch_size=batch_size)
    others = [pair.without for pair in concepts if pair.without is not None]
    without = encode_images(pipeline, others, batch_size=batch_size) if concepts.paired else None
    weights = mask_weights([pair.mask for pair in concepts], with_concept, dilation=dilation).to(with_concept.device)
    return LatentPairs(with_concept, without, weights, encode_prompts(pipeline, [pair.prompt for pair in concepts]))


def noise_schedule(pipeline: Any) -> Any:
    """The training-time schedule of a pipeline: its scheduler's configuration, with `add_noise` and `get_velocity`."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipeline.scheduler.config)


def noised_inputs(
    latents: Tensor, embeddings: Tensor, noise: Tensor, timesteps: Tensor, schedule: Any
) -> dict[str, Tensor]:
    """Keyword arguments of the UNet for latents `(N, C, h, w)`, noise of that shape, and timesteps `(N,)`."""
    sample = schedule.add_noise(latents, noise, timesteps)
    return {"sample": sample, "timestep": timesteps, "encoder_hidden_states": embeddings}


def training_target(schedule: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is trained to answer under a schedule, shape of `latents`.

    The noise (`epsilon`), the velocity (`v_prediction`) or the latents (`sample`).

    Raises:
        ValueError: If the schedule's prediction type is unknown.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"the schedule's prediction type is {kind!r}; expected epsilon, v_prediction or sample.")


def concept_probe_batches(
    pairs: LatentPairs,
    schedule: Any,
    *,
    repeats: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    loss_targets: bool = False,
) -> Iterator[tuple[dict[str, Tensor], Tensor] | tuple[dict[str, Tensor], Tensor, Tensor]]:
    """What `collect_concept_probes` takes: inputs that show the concept, and where it is.

    Args:
        pairs: Encoded concept set; only the halves with the concept are used.
        schedule: From :func:`noise_schedule`.
        repeats: How often each example is used, each time with other noise and another timestep.
        batch_size: Examples in a batch.
        seed: Of noise and timesteps.
        loss_targets: Add what the model would be trained to answer, which `rule="orthogonal"` needs.

    Yields:
        `(inputs, weights)`, weights with shape `(batch, 1, h, w)`, or `(inputs, weights, loss_targets)`, the last with
        the latents' shape.
    """
    generator = torch.Generator().manual_seed(seed)
    for index in _repeated_batches(len(pairs), repeats, batch_size):
        noise, timesteps = _noise_and_timesteps(pairs.with_concept[index], schedule, generator)
        latents, weights = pairs.with_concept[index], pairs.weights[index]
        inputs = noised_inputs(latents, pairs.embeddings[index], noise, timesteps, schedule)
        yield (
            (inputs, weights, training_target(schedule, latents, noise, timesteps))
            if loss_targets
            else (inputs, weights)
        )


def contrast_batches(
    pairs: LatentPairs, schedule: Any, *, repeats: int = 1, batch_size: int = 16, seed: int = 0
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """What `fit_concept_basis` takes: batches with the concept, and the same batches without it.

    Both halves of a pair have the same place in their batches, the same noise, timestep and embedding. The arguments
    are those of :func:`concept_probe_batches`.

    Raises:
        ConceptDataError: If the pairs have no halves without the concept.
    """
    if pairs.without is None:
        raise ConceptDataError(
            "the concept set has no halves without the concept, so there is nothing to contrast with; give pairs or an "
            "overlay, or a reference set of its own."
        )
    generator = torch.Generator().manual_seed(seed)
    concept: list[dict[str, Tensor]] = []
    reference: list[dict[str, Tensor]] = []
    for index in _repeated_batches(len(pairs), repeats, batch_size):
        noise, timesteps = _noise_and_timesteps(pairs.with_concept[index], schedule, generator)
        for latents, batches in ((pairs.with_concept, concept), (pairs.without, reference)):
            batches.append(noised_inputs(latents[index], pairs.embeddings[index], noise, timesteps, schedule))
    return concept, reference


def _repeated_batches(length: int, repeats: int, batch_size: int) -> Iterator[Tensor]:
    for _ in range(repeats):
        yield from torch.arange(length).split(batch_size)


def _noise_and_timesteps(latents: Tensor, schedule: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    # Drawn on the CPU, so that the same seed gives the same probes on every device.
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    steps = schedule.config.num_train_timesteps
    timesteps = torch.randint(steps, (latents.shape[0],), generator=generator)
    return noise, timesteps.to(latents.device)
