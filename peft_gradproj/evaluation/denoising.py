r"""Denoising losses on fixed noise and timesteps, so that models can be compared on the same questions.

:math:`L = \sum w\,(f(z_t, t, c) - y)^2 / \sum w` with the training target :math:`y` of the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion_inputs import noised_inputs, training_target
from ..probes import evaluation_mode

__all__ = ["DenoisingQuestions", "denoising_loss", "denoising_losses", "weighted_errors"]


@dataclass(frozen=True)
class DenoisingQuestions:
    """Fixed inputs and answers.

    Args:
        latents: Shape `(N, C, h, w)`.
        embeddings: Shape `(N, tokens, width)`.
        noise: Shape of `latents`.
        timesteps: Shape `(N,)`.
        weights: Where the loss counts, shape `(N, 1, h, w)`, or `None` for everywhere.
    """

    latents: Tensor
    embeddings: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor | None = None

    @classmethod
    def draw(
        cls,
        latents: Tensor,
        embeddings: Tensor,
        schedule: Any,
        *,
        weights: Tensor | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> DenoisingQuestions:
        """Ask about every picture `repeats` times, the timesteps spread evenly over the schedule."""
        generator = torch.Generator().manual_seed(seed)
        count = latents.shape[0] * repeats
        # Strata keep the mean over timesteps, on which the loss depends most, the same for any number of questions.
        places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        timesteps = (
            (places * schedule.config.num_train_timesteps).long().clamp_max(schedule.config.num_train_timesteps - 1)
        )
        latents = latents.repeat(repeats, 1, 1, 1)
        return cls(
            latents,
            embeddings.repeat(repeats, 1, 1),
            # Drawn on the CPU, so that the same seed asks the same on every device.
            torch.randn(latents.shape, generator=generator).to(latents),
            timesteps.to(latents.device),
            None if weights is None else weights.repeat(repeats, 1, 1, 1),
        )


@torch.no_grad()
def denoising_losses(unet: Any, questions: DenoisingQuestions, schedule: Any, *, batch_size: int = 64) -> Tensor:
    """Weighted mean square error of a UNet's answer to each question, without dropout, shape `(N,)`."""
    losses = []
    with evaluation_mode(unet):
        for index in torch.arange(questions.latents.shape[0]).split(batch_size):
            latents, noise, timesteps = questions.latents[index], questions.noise[index], questions.timesteps[index]
            inputs = noised_inputs(latents, questions.embeddings[index], noise, timesteps, schedule)
            target = training_target(schedule, latents, noise, timesteps)
            weights = None if questions.weights is None else questions.weights[index]
            losses.append(weighted_errors(unet(**inputs).sample.float(), target, weights))
    return torch.cat(losses)


def weighted_errors(answers: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Mean square error of each answer where it counts, shape `(N,)`.

    Args:
        answers: Shape `(N, C, h, w)`.
        targets: Same shape.
        weights: Shape `(N, 1, h, w)`, or `None` for everywhere.
    """
    square = (answers - targets).square().mean(dim=1, keepdim=True)
    weights = torch.ones_like(square) if weights is None else weights
    return (square * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))


def denoising_loss(unet: Any, questions: DenoisingQuestions, schedule: Any, *, batch_size: int = 64) -> float:
    """The mean of :func:`denoising_losses`."""
    return float(denoising_losses(unet, questions, schedule, batch_size=batch_size).mean())
