r"""Membership inference: was a picture among those that a model was trained on?

An attack gives each picture a score, higher where it takes the picture for a member; the figure is the area under the
ROC curve of members against non-members, .5 where it cannot tell them apart. Of an adapter that was not to learn a
concept, ask about the training pictures that show it, against pictures of the same kind that were not trained on, with
weights that say where the concept is.

- *Loss threshold* (Yeom et al., arXiv 1709.01604): members have a lower training loss, :math:`-L(z)`.
- *Difficulty calibration* (Watson et al., ICLR 2022, arXiv 2111.08440): some pictures are easy for any model, so what
  counts is by how much the loss is below that of a model that did not see the picture. The base model is one, and
  everybody has it: :math:`L_{base}(z) - L(z)`.
- *PIA* (Kong et al., ICLR 2024, arXiv 2305.18355): the model's own noise at :math:`t = 0` says where the deterministic
  trajectory of a picture goes, and a member's noise at :math:`t` agrees with it,

  .. math:: -\|\epsilon_\theta(z, 0) - \epsilon_\theta(\alpha_t z + \sigma_t \epsilon_\theta(z, 0), t)\|_p^p .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion_inputs import noised_inputs
from ..errors import BehaviourError, ConceptDataError
from ..probes import adapters_disabled, evaluation_mode
from .denoising import DenoisingQuestions, denoising_losses
from .figures import Estimate

__all__ = ["calibrated_scores", "loss_scores", "pia_scores", "roc_auc"]


def loss_scores(
    unet: Any,
    latents: Tensor,
    embeddings: Tensor,
    schedule: Any,
    *,
    timesteps: Sequence[int] | None = None,
    weights: Tensor | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Membership scores by the training loss.

    All pictures are asked at the same timesteps, since the loss depends more on these than on the picture.

    Args:
        unet: The model, with or without an adapter.
        latents: Shape `(N, C, h, w)`.
        embeddings: Of the prompts, shape `(N, tokens, width)`.
        schedule: From `noise_schedule`.
        timesteps: Whose losses are averaged; by default ten, spread evenly over the schedule.
        weights: Where the loss counts, shape `(N, 1, h, w)`; everywhere by default.
        batch_size: Pictures at a time.
        seed: Of the noise.

    Returns:
        Shape `(N,)`, higher for members.
    """
    total = schedule.config.num_train_timesteps
    timesteps = [int((i + 0.5) * total / 10) for i in range(10)] if timesteps is None else timesteps
    generator = torch.Generator().manual_seed(seed)
    losses = torch.zeros(len(latents), device=latents.device)
    with evaluation_mode(unet):
        for timestep in timesteps:
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            asked = DenoisingQuestions(latents, embeddings, noise, _alike(timestep, latents), weights)
            losses += denoising_losses(unet, asked, schedule, batch_size=batch_size) / len(timesteps)
    return -losses


def calibrated_scores(unet: Any, latents: Tensor, embeddings: Tensor, schedule: Any, **options: Any) -> Tensor:
    """Membership scores by how far the training loss is below the base model's, at the same noise and timesteps.

    Args:
        unet: The model, with an adapter that is active; without it, it is the base model.
        latents: Shape `(N, C, h, w)`.
        embeddings: Of the prompts, shape `(N, tokens, width)`.
        schedule: From `noise_schedule`.
        **options: Further arguments of :func:`loss_scores`.

    Returns:
        Shape `(N,)`, higher for members.

    Raises:
        BehaviourError: If the model has no adapter, so that all scores would be 0.
        ConceptDataError: If the adapter is merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    if all(layer.disable_adapters for layer in layers):
        raise BehaviourError("the model has no active adapter, so there is no base model to calibrate its losses by.")
    scores = loss_scores(unet, latents, embeddings, schedule, **options)
    with adapters_disabled(unet):
        return scores - loss_scores(unet, latents, embeddings, schedule, **options)


@torch.no_grad()
def pia_scores(
    unet: Any,
    latents: Tensor,
    embeddings: Tensor,
    schedule: Any,
    *,
    timestep: int = 200,
    order: float = 4.0,
    weights: Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Membership scores by proximal initialisation; two forwards for each picture, and nothing random.

    Args:
        unet: The model, with or without an adapter.
        latents: Shape `(N, C, h, w)`.
        embeddings: Of the prompts, shape `(N, tokens, width)`.
        schedule: From `noise_schedule`, for `epsilon` or `v_prediction`.
        timestep: The t at which the noise is compared. The best one depends on the model; choose it on other data.
        order: The p of the norm; 4 in the authors' code.
        weights: Where the difference counts, shape `(N, 1, h, w)`; everywhere by default.
        batch_size: Pictures at a time.

    Returns:
        Shape `(N,)`, higher for members: minus the mean of the p-th powers, which orders pictures as the norm does.

    Raises:
        ValueError: If the schedule is for another prediction type.
    """
    scores = []
    with evaluation_mode(unet):
        for index in torch.arange(len(latents)).split(batch_size):
            clean, condition = latents[index], embeddings[index]
            start = _predicted_noise(unet, clean, condition, _alike(0, clean), schedule)
            later = _alike(timestep, clean)
            # In float32, in which the answers are: a model in half precision takes no such pictures.
            noised = noised_inputs(clean.float(), condition, start, later, schedule)["sample"].to(clean.dtype)
            distance = (start - _predicted_noise(unet, noised, condition, later, schedule)).abs().pow(order)
            distance = distance.mean(1, keepdim=True)
            where = torch.ones_like(distance) if weights is None else weights[index]
            scores.append(-(distance * where).sum((1, 2, 3)) / where.sum((1, 2, 3)))
    return torch.cat(scores)


def _alike(timestep: int, latents: Tensor) -> Tensor:
    return torch.full((len(latents),), timestep, device=latents.device)


def _predicted_noise(unet: Any, sample: Tensor, embeddings: Tensor, timesteps: Tensor, schedule: Any) -> Tensor:
    answer = unet(sample=sample, timestep=timesteps, encoder_hidden_states=embeddings).sample.float()
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return answer
    if kind == "v_prediction":
        # v = alpha epsilon - sigma z solves to epsilon = alpha v + sigma z_t, which is what add_noise computes.
        return schedule.add_noise(answer, sample, timesteps)
    raise ValueError(f"the schedule's prediction type is {kind!r}; expected epsilon or v_prediction.")


def roc_auc(member_scores: Tensor, non_member_scores: Tensor) -> Estimate:
    r"""Area under the ROC curve: how often a member scores higher than a non-member, ties counted half.

    The Mann-Whitney statistic by ranks. Its standard error is that of Hanley and McNeil (Radiology 143, 1982), with
    :math:`Q_1 = A / (2 - A)` and :math:`Q_2 = 2 A^2 / (1 + A)`,

    .. math:: \sqrt{\frac{A (1 - A) + (m - 1) (Q_1 - A^2) + (n - 1) (Q_2 - A^2)}{m n}} ,

    which is 0 where the two do not overlap, however few they are.

    Computed here and not by torchmetrics, which takes scores outside [0, 1] for logits and squashes them: distances
    of a few dozen then become ties.

    Args:
        member_scores: Shape `(m,)`.
        non_member_scores: Shape `(n,)`.

    Raises:
        ConceptDataError: If one is empty, or has a score that is not a number.
    """
    m, n = len(member_scores), len(non_member_scores)
    scores = torch.cat([member_scores, non_member_scores]).double()
    if not m or not n or scores.isnan().any():
        raise ConceptDataError(f"{m} scores of members and {n} of others; expected some of each, none of them NaN.")
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0) - (count - 1) / 2)[place]
    area = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)
    return Estimate(area, math.sqrt(max(variance, 0.0) / (m * n)))
