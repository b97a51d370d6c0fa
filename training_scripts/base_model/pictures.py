"""Pictures of the base model: reading them, and the random pictures that its autoencoder learns.

Pictures are float tensors with shape (N, 3, H, W) in [-1, 1] unless stated otherwise. All
randomness comes from a generator that the caller gives, so that a training run can be repeated.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import Tensor

__all__ = ["jitter", "load_pictures", "random_scenes"]


def load_pictures(path: Path) -> tuple[Tensor, list[str]]:
    """Read a parquet file of pictures.

    Returns:
        Pictures with shape (N, 3, H, W) in [-1, 1], and their N captions.
    """
    rows = load_dataset("parquet", data_files=str(path), split="train")
    arrays = [np.asarray(row["image"].convert("RGB")) for row in rows]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1, list(rows["caption"])


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw n numbers from [low, high)."""
    return low + (high - low) * torch.rand(n, generator=generator)


def place(ink: Tensor, scale: Tensor, angle: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Scale, turn, mirror and shift pictures on an empty ground of the same size.

    Args:
        ink: pictures with shape (N, C, H, W) whose ground is 0.
        scale: size on the ground, with shape (N,); 1 keeps the size.
        angle: in radians, with shape (N,).
        shift: of the centre, in half widths, with shape (N, 2).
        flip: 1 or -1, with shape (N,).

    Returns:
        Pictures with shape (N, C, H, W).
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack(
        [
            torch.stack([flip * cos, flip * sin], dim=1),
            torch.stack([-sin, cos], dim=1),
        ],
        dim=1,
    )
    theta = torch.cat([rows, -rows @ shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def hue_rotation(angle: Tensor) -> Tensor:
    """Return matrices with shape (N, 3, 3) that turn RGB about its grey axis by `angle` (N,)."""
    third, root = 1 / 3, math.sqrt(1 / 3)
    same = torch.cos(angle) + (1 - torch.cos(angle)) * third
    before = third * (1 - torch.cos(angle)) - root * torch.sin(angle)
    after = third * (1 - torch.cos(angle)) + root * torch.sin(angle)
    rows = [
        torch.stack([same, before, after], dim=1),
        torch.stack([after, same, before], dim=1),
        torch.stack([before, after, same], dim=1),
    ]
    return torch.stack(rows, dim=1)


def recolour(rgb: Tensor, generator: torch.Generator) -> Tensor:
    """Change hue and brightness of half of the pictures (N, 3, H, W) in [0, 1]."""
    n = rgb.shape[0]
    chosen = (torch.rand(n, generator=generator) < 0.5).float()
    turn = hue_rotation(uniform(n, -math.pi, math.pi, generator) * chosen)
    gain = 1 + uniform(n, -0.4, 0.2, generator) * chosen
    return torch.einsum("nij,njhw->nihw", turn * gain[:, None, None], rgb).clamp(0, 1)


def random_layer(rgb: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw one object for each picture of a batch, somewhere, with its opacity.

    Args:
        rgb: all pictures, with shape (M, 3, H, W) in [0, 1] on white.
        low: the smallest scale, and `high` the largest, with shape () each.

    Returns:
        Layers with shape (M, 4, H, W): colour times opacity, and opacity.
    """
    n = rgb.shape[0]
    # White counts as see-through: pictures come without alpha.
    opacity = ((1 - rgb.amin(dim=1, keepdim=True)) * 8).clamp(0, 1)
    layer = torch.cat([recolour(rgb, generator) * opacity, opacity], dim=1)
    scale = uniform(n, low, high, generator)
    if high <= 0.5:
        # Halved beforehand, so that small copies are not aliased.
        layer = F.interpolate(F.avg_pool2d(layer, 2), scale_factor=2.0, mode="nearest")
    room = (1.1 - scale).clamp_min(0.15)[:, None]
    shift = torch.stack([uniform(n, -1, 1, generator), uniform(n, -1, 1, generator)], 1) * room
    angle = uniform(n, -0.5, 0.5, generator)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    return place(layer, scale, angle, shift, flip)


def random_grounds(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw grounds (n, 3, size, size) in [0, 1]: most white, the others of one colour."""
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    plain = torch.rand(n, 1, 1, 1, generator=generator) < 0.15
    return torch.where(plain, colour, torch.ones(())).expand(n, 3, size, size)


def random_scenes(pictures: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Compose random pictures for the autoencoder.

    A third shows one picture as it is; the others show one large object and up to three small ones,
    recoloured, turned and mirrored, so that the autoencoder also learns small foreign marks.

    Args:
        pictures: with shape (M, 3, H, W) in [-1, 1], on white.
        n: number of pictures to compose.

    Returns:
        Pictures with shape (n, 3, H, W) in [-1, 1].
    """
    rgb = (pictures + 1) / 2

    def some() -> Tensor:
        return rgb[torch.randint(len(rgb), (n,), generator=generator)]

    scene = random_grounds(n, rgb.shape[-1], generator)
    for low, high, chance in ((0.5, 1.3, 0.9), (0.2, 0.5, 0.6), (0.2, 0.45, 0.6), (0.2, 0.4, 0.6)):
        layer = random_layer(some(), low, high, generator)
        layer = layer * (torch.rand(n, 1, 1, 1, generator=generator) < chance)
        scene = scene * (1 - layer[:, 3:]) + layer[:, :3]
    untouched = torch.rand(n, 1, 1, 1, generator=generator) < 1 / 3
    return torch.where(untouched, some(), scene) * 2 - 1


def jitter(pictures: Tensor, scale: float, shift: float, generator: torch.Generator) -> Tensor:
    """Scale and shift pictures (N, 3, H, W) in [-1, 1] a little, on white.

    Args:
        scale: largest relative change of the size, e.g. 0.05.
        shift: largest shift, as a share of the width.
    """
    n = pictures.shape[0]
    size = 1 + uniform(n, -scale, scale / 2, generator)
    offsets = [uniform(n, -2 * shift, 2 * shift, generator) for _ in range(2)]
    upright = torch.zeros(n)
    moved = place((1 - pictures) / 2, size, upright, torch.stack(offsets, dim=1), upright + 1)
    return 1 - 2 * moved
