"""What the small networks that find the concept, or judge samples, share: blocks, augmentations, a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import BehaviourError, ConceptDataError

__all__ = [
    "batch_indices",
    "blur",
    "conv_block",
    "fit_network",
    "jitter_pictures",
    "network_answers",
    "shift_colours",
]


def conv_block(inputs: int, outputs: int, *, stride: int = 1) -> nn.Module:
    """3 x 3 convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def batch_indices(length: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled batches of at least two indices below `length`, which is what batch normalisation takes.

    Raises:
        ConceptDataError: With the first batch, if there are no two.
    """
    if min(length, batch_size) < 2:
        raise ConceptDataError(
            f"{length} examples to learn from, in batches of {batch_size}; a network takes at least two at once."
        )
    while True:
        for index in torch.randperm(length, generator=generator).split(batch_size):
            if len(index) > 1:
                yield index


def fit_network(
    network: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Minimise `loss()` with AdamW under a one-cycle schedule; leaves the network in eval mode."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(2, steps))
    network.train()
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1)
    network.eval()


@torch.no_grad()
def network_answers(network: nn.Module, pictures: Tensor) -> Tensor:
    """What a network answers in eval mode to pictures `(N, 3, H, W)`, clipped to [-1, 1]; shape `(N, *)`.

    Raises:
        BehaviourError: If an answer is not finite: compared with anything it would pass for a good or a clean picture.
    """
    network.eval()
    answers = torch.cat([network(part) for part in pictures.clamp(-1, 1).split(128)])
    if not answers.isfinite().all():
        odd = len(answers) - int(answers.isfinite().flatten(1).all(1).sum())
        raise BehaviourError(
            f"{odd} of {len(answers)} pictures cannot be judged: the answers to them are not finite. Are the samples, "
            "or the weights of the model that made them?"
        )
    return answers


def shift_colours(pictures: Tensor, generator: torch.Generator, amount: float = 0.15) -> Tensor:
    """Change contrast, brightness and noise of pictures `(N, 3, H, W)` in [-1, 1] a little."""
    count = pictures.shape[0]
    gain = 1 + amount * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    offset = amount / 2 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    noise = torch.randn(pictures.shape, generator=generator) * (0.08 * torch.rand(count, 1, 1, 1, generator=generator))
    return (pictures * gain + offset + noise).clamp(-1, 1)


def blur(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a third of the pictures `(N, 3, H, W)` with a 3 x 3 box."""
    chosen = torch.rand(pictures.shape[0], 1, 1, 1, generator=generator) < 1 / 3
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.where(chosen, soft, pictures)


def jitter_pictures(
    pictures: Tensor, generator: torch.Generator, *, scale: float = 0.15, shift: float = 0.12, angle: float = 0.2
) -> Tensor:
    """Scale, turn, shift and mirror pictures `(N, 3, H, W)` in [-1, 1] on a white ground."""
    count = pictures.shape[0]

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(count, generator=generator) - 1)

    zoom, turn = 1 + uniform(scale), uniform(angle)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    rows = [torch.stack([mirror * cos, -sin, uniform(shift)], 1), torch.stack([mirror * sin, cos, uniform(shift)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pictures.shape), align_corners=False)
    # Outside the picture grid_sample gives 0: shifting by 1 makes that white.
    return F.grid_sample(pictures - 1, grid, align_corners=False) + 1
