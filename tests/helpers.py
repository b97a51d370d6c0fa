"""What several test modules build: random concept bases, trained adapters, and readings of what was saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_gradproj import ConceptBasis, LayerBasis
from peft_gradproj.projection import leakage, orthonormal_basis

LAYERS = ("conv", "query", "key", "head")
WIDTHS = {"conv": (27, 8), "query": (8, 16), "key": (8, 16), "head": (16, 5)}
"""`(d_in, d_out)` of the layers of `SmallNet`."""


def random_basis(d: int, k: int, seed: int = 0) -> Tensor:
    """Orthonormal columns, shape `(d, k)`."""
    generator = torch.Generator().manual_seed(seed + 1000 * d + k)
    return orthonormal_basis(torch.randn(d, k, generator=generator, dtype=torch.float64)).float()


def random_layer_basis(d_in: int, d_out: int, r: int, spaces: Iterable[str], k: int = 2, seed: int = 0) -> LayerBasis:
    widths = {"input": d_in, "output": d_out, "rank": r, "gradient": r * (d_in + d_out)}
    return LayerBasis(**{space: random_basis(widths[space], k, seed) for space in spaces})


def small_net_basis(
    spaces: Iterable[str] = ("input", "output"), r: int = 4, k: int = 2, layers: Iterable[str] = LAYERS, seed: int = 0
) -> ConceptBasis:
    spaces = tuple(spaces)
    return ConceptBasis(
        {name: random_layer_basis(*WIDTHS[name], r, spaces, k, seed) for name in layers}, concept="planted"
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 50,
    *,
    accumulation: int = 1,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[float]:
    """Train on random pictures and labels; returns the loss of each optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(32, 3, 8, 8, generator=generator).to(dtype)
    labels = torch.randint(0, 5, (32,), generator=generator)
    losses = []
    for _ in range(steps):
        total = 0.0
        for part in range(accumulation):
            chosen = slice(part * 32 // accumulation, (part + 1) * 32 // accumulation)
            loss = nn.functional.cross_entropy(model(pictures[chosen]).float(), labels[chosen]) / accumulation
            loss.backward()
            total += float(loss.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def saved_leakage(folder: str | Path, basis: ConceptBasis) -> float:
    """Largest leakage, over layers and the input and output spaces, of the file that PEFT wrote."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    worst = 0.0
    for name, layer in basis.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].flatten(1) for part in "AB")
        assert b.norm() > 0, f"{name} was not trained; its leakage would mean nothing"
        for space in ("input", "output"):
            if getattr(layer, space) is not None:
                worst = max(worst, leakage(a, b, getattr(layer, space), space=space))
    return worst


class PackedTensor(Tensor):
    """Floating and of the shape of what it holds, and computes nothing, as moments of torchao's 8-bit optimizers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> PackedTensor:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{operator} of a packed tensor")


class UnpackableTensor(PackedTensor):
    """What those of torchao can do beside."""

    def dequantize(self) -> Tensor:
        return self.values.clone()

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.copy_.default:
            args[0].values.copy_(args[1])
            return args[0]
        return super().__torch_dispatch__(operator, types, args, kwargs)


class PackedAdam(torch.optim.Optimizer):
    """Adam whose moments are packed, but for those of small tensors."""

    def __init__(
        self, parameters: list[nn.Parameter], packed_from: int, lr: float = 1e-3, kind: Any = PackedTensor
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})
        self.packed_from, self.kind = packed_from, kind

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            moments = []
            for key, beta, value in (("exp_avg", 0.9, p.grad), ("exp_avg_sq", 0.999, p.grad.square())):
                kept = state.get(key, torch.zeros_like(p))
                moment = (kept.values if isinstance(kept, PackedTensor) else kept).lerp(value, 1 - beta)
                state[key] = self.kind(moment) if p.numel() >= self.packed_from else moment
                moments.append(moment / (1 - beta ** state["step"]))
            p.sub_(self.param_groups[0]["lr"] * moments[0] / (moments[1].sqrt() + 1e-8))
