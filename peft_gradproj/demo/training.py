"""The training loop of the demo: an ordinary one, which knows nothing of the projection."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..diffusion_inputs import noised_inputs, training_target
from .precision import autocast
from .settings import DemoSettings

__all__ = ["History", "Penalty", "TrainingRun", "TrainingSet", "adapted", "train", "training_steps"]

Penalty = Callable[[Any], Tensor]
"""From the UNet in training to a scalar that joins the loss."""


@dataclass(frozen=True)
class TrainingSet:
    """Latents `(N, C, h, w)`, prompt embeddings `(N, tokens, width)`, and where the loss counts, `(N, 1, h, w)`."""

    latents: Tensor
    embeddings: Tensor
    weights: Tensor


@dataclass
class History:
    """What was seen during a training."""

    losses: list[float] = field(default_factory=list)
    checkpoints: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Step, and what `measure` said after it."""


@dataclass
class TrainingRun:
    """A trained adapter, inside its UNet, and what was seen on the way."""

    unet: Any
    history: History


def adapted(unet: Any, config: Any, seed: int) -> Any:
    """A copy of a UNet with a fresh adapter; the same seed gives stock LoRA and ours the same start."""
    unet = copy.deepcopy(unet)
    torch.manual_seed(seed)
    unet.add_adapter(config)
    return unet


def training_steps(
    unet: Any, data: TrainingSet, schedule: Any, settings: DemoSettings, penalty: Penalty | None = None
) -> Iterator[float]:
    """Train the adapter inside `unet` without end; yields each step's loss. One seed, one order of data and noise.

    A penalty is added to each step's loss, and not part of what is yielded.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule_rate = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, settings.steps))
    unet.train()
    for index in _endless_batches(len(data.latents), settings.batch_size, generator):
        latents, embeddings = data.latents[index], data.embeddings[index]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (len(index),), generator=generator)
        with autocast():
            answer = unet(**noised_inputs(latents, embeddings, noise, timesteps, schedule)).sample
        error = answer.float() - training_target(schedule, latents, noise, timesteps)
        loss = (data.weights[index] * error.square()).mean()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty(unet)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule_rate.step()
        yield float(loss.detach())


def _rate(steps: int, step: int) -> float:
    """Share of the learning rate: falls to a hundredth over the last 40 % of the steps."""
    return min(1.0, max(0.01, (steps - step) / (0.4 * steps)))


def train(
    unet: Any,
    config: Any,
    data: TrainingSet,
    schedule: Any,
    settings: DemoSettings,
    measure: Callable[[Any], dict[str, float]],
    progress: Callable[[int], None],
    penalty: Penalty | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> tuple[dict[str, Tensor], History]:
    """Train an adapter of `config` on a UNet for the settings' steps, measuring now and then; returns its weights.

    The UNet with the new adapter is first given to `prepare`.
    """
    unet = adapted(unet, config, settings.seed)
    if prepare is not None:
        prepare(unet)
    history = History(checkpoints=[(0, measure(unet))])
    every = max(1, settings.steps // settings.checkpoints)
    steps = training_steps(unet, data, schedule, settings, penalty)
    for step in range(1, settings.steps + 1):
        history.losses.append(next(steps))
        if step % every == 0:
            unet.eval()
            history.checkpoints.append((step, measure(unet)))
            unet.train()
        progress(step)
    weights = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}
    return weights, history


def _endless_batches(length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(length, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]
