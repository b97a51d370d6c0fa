r"""Denoising losses by timestep, of any family of pipelines, on the same questions for every model.

:math:`L(t) = \sum w\,(f(z_t, t, c) - y)^2 / \sum w`, with the training target :math:`y` of the pipeline: the noise, the
velocity, or noise minus latents in flow matching. The range of timesteps is cut into bins that training visits equally
often, and every picture is asked about once in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept_fit import ConceptExample
from ..diffusion_inputs import mask_weights
from ..errors import ConceptDataError
from ..pipelines import PipelineFamily
from ..probes import evaluation_mode
from .denoising import weighted_errors
from .figures import Estimate, mean_estimate

__all__ = ["TimestepQuestions", "estimates_by_timestep"]

_DRAWS = 4096
"""At most so many timesteps are drawn to cut their range into bins."""


@dataclass(frozen=True)
class TimestepQuestions:
    """Fixed pictures, noise and timesteps.

    Args:
        examples: The pictures, with prompts, `N` of them.
        latents: Of the pictures, shape `(N, C, h, w)`.
        noise: Shape `(N, bins, C, h, w)`.
        timesteps: Shape `(N, bins)`, ascending from bin to bin.
        ranges: The lowest and highest timestep of each bin.
        weights: Where the loss counts, shape `(N, 1, h, w)`, or `None` for everywhere.
    """

    examples: Sequence[ConceptExample]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    ranges: tuple[tuple[float, float], ...]
    weights: Tensor | None

    @classmethod
    def draw(
        cls, family: PipelineFamily, examples: Sequence[ConceptExample], *, bins: int, seed: int
    ) -> TimestepQuestions:
        """Encode pictures, and draw noise and timesteps.

        Args:
            family: Encodes the pictures.
            examples: At least one. Where all have masks, the loss counts there, else everywhere.
            bins: Of timesteps.
            seed: Of noise and timesteps.

        Raises:
            ConceptDataError: If there are no examples, or no or too many bins.
        """
        if not examples or not 1 <= bins <= _DRAWS:
            raise ConceptDataError(f"{len(examples)} pictures and {bins} bins of timesteps; expected at least one.")
        generator = torch.Generator().manual_seed(seed)
        # A multiple of the bins, so that none of the sorted draws, the largest, is in no bin.
        quantiles = family.draw_timesteps(_DRAWS // bins * bins, generator).sort().values.reshape(bins, -1)
        chosen = torch.randint(quantiles.shape[1], (len(examples), bins), generator=generator)
        latents = torch.cat([family.latents([example.picture]) for example in examples])
        masks = [example.mask for example in examples if example.mask is not None]
        weights = None
        if len(masks) == len(examples):
            weights = mask_weights(masks, latents)
        return cls(
            examples=examples,
            latents=latents,
            noise=torch.randn(len(examples), bins, *latents.shape[1:], generator=generator),
            timesteps=quantiles.T.gather(0, chosen),
            ranges=tuple((float(part[0]), float(part[-1])) for part in quantiles),
            weights=weights,
        )

    def __len__(self) -> int:
        return self.timesteps.numel()

    @torch.no_grad()
    def losses(
        self, family: PipelineFamily, *, batch_size: int = 4, progress: Callable[[int], object] = lambda count: None
    ) -> Tensor:
        """The losses of the denoiser as it is, with its adapters, shape `(N, bins)`.

        Args:
            family: The pipeline.
            batch_size: Questions at once.
            progress: Called with the number of questions that were just answered.
        """
        denoiser, (count, bins) = family.denoiser, self.timesteps.shape
        # Encoded each time: an adapter may be on the text encoders as well.
        prompts, frames = zip(*((example.prompt, example.frame) for example in self.examples), strict=True)
        conditions = family.conditions(prompts, frames)
        losses = []
        for index in torch.arange(count * bins).split(batch_size):
            i, b = index // bins, index % bins
            latents, noise, timesteps = self.latents[i], self.noise[i, b], self.timesteps[i, b]
            inputs = family.inputs(latents, noise, timesteps, {name: x[i] for name, x in conditions.items()})
            with evaluation_mode(denoiser):
                output = family.run(denoiser, inputs).float().cpu()
            target = family.loss_target(latents, noise, timesteps)
            losses.append(weighted_errors(output, target, None if self.weights is None else self.weights[i]))
            progress(len(index))
        return torch.cat(losses).reshape(count, bins)


def estimates_by_timestep(losses: Tensor) -> list[Estimate]:
    """Mean over pictures in each bin, from losses `(N, bins)`."""
    return [mean_estimate(column) for column in losses.T]
