"""The training that one process and two processes do alike: model, batches and probes from fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from conftest import SmallNet
from helpers import LAYERS, small_net_basis
from peft import get_peft_model
from torch import Tensor, nn

from peft_gradproj import ConceptProbes, GradProjConfig, collect_concept_probes

STEPS = 10
PROBE_OPTIONS = {"probe_every": 2, "probe_batch_size": 4}


def base_net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


def small_probes() -> ConceptProbes:
    pictures = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return collect_concept_probes(base_net(), [({"sample": pictures}, None)])


def adapted_net(spaces: tuple[str, ...] = ("input", "output"), seed: int | None = None, **options: Any) -> Any:
    basis = small_net_basis(spaces)
    base = base_net()
    if seed is not None:
        torch.manual_seed(seed)
    config = GradProjConfig(r=4, lora_alpha=8, target_modules=list(LAYERS), concept_basis=basis, **options)
    return get_peft_model(base, config)


def picture_batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train_alone(model: nn.Module) -> None:
    """Train in this process, each batch joined."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for pictures, labels in picture_batches():
        nn.functional.cross_entropy(model(pictures), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
