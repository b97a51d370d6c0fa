r"""Adapter weights that cannot leave their constraint.

`lora_A` and `lora_B` of an adapted layer become a :class:`ProjectedLinear` or :class:`ProjectedConv2d`: the same
module, with the same parameter under the same key, which projects its own weight in `forward`. Autograd then projects
the gradient by itself, whatever optimizer, precision or wrapper is around. Code that reads the raw weight (merging,
saving, weighted combinations) is served by *retraction*: the raw weight is put back on the constraint after every
optimizer step, at injection and after loading.

Sides of a weight of shape `(m, n)`, with the bases of DESIGN's four spaces:

========  ================  =================
weight    left, of width m  right, of width n
========  ================  =================
A         rank (keeps)      input (zero)
B         output (zero)     rank (keeps)
========  ================  =================

*zero* means that the component along the basis is 0, *keeps* that it stays what it was at the start. The gradient
space binds A and B together and is handled by :class:`GradientConstraint`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .errors import ConceptBasisError, GradProjConfigError
from .projection import coordinates, orthonormal_basis, remove_component
from .step_hooks import ORDER_RETRACTION, OrderedWeakSet, observe_steps

if TYPE_CHECKING:
    from .basis import LayerBasis

__all__ = [
    "GradientConstraint",
    "ProjectedConv2d",
    "ProjectedLinear",
    "ProjectedWeight",
    "check_supported",
    "check_widths",
    "constrain_adapter",
    "is_sharded",
    "projected_weights",
]

Side = Literal["left", "right"]
_SIDES: tuple[Side, Side] = ("left", "right")


class ProjectedWeight(nn.Module):
    """What `ProjectedLinear` and `ProjectedConv2d` share: the bases, the projection and the retraction."""

    weight: nn.Parameter

    strength: float
    """Share of the component that each step loses; only 1 gives an invariant."""

    keeps: frozenset[Side]
    """Sides on which the component stays what it was, instead of being 0."""

    gradient_constraint: GradientConstraint | None
    """The gradient-space constraint of this layer, one object shared by the modules of A and B."""

    _before_step: dict[Side, Tensor]
    """Coordinates of the weight before the optimizer's step, at strength below 1."""

    @staticmethod
    def adopt(module: nn.Module, strength: float) -> ProjectedWeight:
        """Turn an adapter's `nn.Linear` or `nn.Conv2d` into its projected subclass, in place.

        The class is exchanged on the live module, so that the parameter, its hooks, device and dtype stay as PEFT
        made them.
        """
        for plain, projected in ((nn.Linear, ProjectedLinear), (nn.Conv2d, ProjectedConv2d)):
            if type(module) is plain:
                module.__class__ = projected
                break
        assert isinstance(module, ProjectedWeight)
        module.strength = strength
        module.keeps = frozenset()
        module.gradient_constraint = None
        module._before_step = {}
        for side in _SIDES:
            module.register_buffer(f"concept_{side}", None, persistent=False)
            module.register_buffer(f"start_{side}", None, persistent=False)
        _retraction.add(module)
        return module

    def constrain(self, side: Side, basis: Tensor, *, keep: bool) -> None:
        """Constrain one side to `basis`, float32, shape `(m, k)` for left and `(n, k)` for right."""
        setattr(self, f"concept_{side}", basis.to(self.weight.device) if not self.weight.is_meta else basis)
        self.keeps = self.keeps | {side} if keep else self.keeps - {side}

    def constraints(self) -> Iterator[tuple[Side, Tensor]]:
        """The constrained sides with their bases."""
        for side in _SIDES:
            basis = self._buffers[f"concept_{side}"]
            if basis is not None:
                yield side, basis

    def project(self, weight: Tensor) -> Tensor:
        """`weight`, in the shape of this module's weight, put on the constraint; unchanged at strength below 1."""
        if self.strength < 1.0:
            return weight
        matrix = weight if weight.ndim == 2 else weight.flatten(1)
        for side, basis in self.constraints():
            start = getattr(self, f"start_{side}") if side in self.keeps else None
            start = None if start is None else start.to(matrix.device)
            matrix = remove_component(matrix, basis.to(matrix.device), side=side, target=start)
        return self._in_shape(matrix)

    def _in_shape(self, matrix: Tensor) -> Tensor:
        """A matrix in the shape of the weight; one call less where it has it, in every forward of every layer."""
        return matrix if self.weight.ndim == 2 else matrix.reshape(self.weight.shape)

    @torch.no_grad()
    def restart(self, *, initial: bool) -> None:
        """Begin anew from the weight as it is: after injection (`initial`) or after loading.

        A fresh weight loses the share `strength` of what it has in the concept basis; a loaded one was trained
        under the constraint and is only put back on it where the constraint is exact.
        """
        if self.weight.is_meta:
            return
        matrix = _whole(self.weight).flatten(1)
        if initial or self.strength == 1.0:
            for side, basis in self.constraints():
                if side not in self.keeps:
                    matrix = remove_component(matrix, basis, side=side, strength=self.strength)
            self._write(matrix)
        for side, basis in self.constraints():
            if side in self.keeps:
                setattr(self, f"start_{side}", coordinates(matrix, basis, side=side))

    def keeps_something(self, side: Side) -> bool:
        """Whether what is kept along a side's basis is more than the rounding of the weight as it is."""
        start = getattr(self, f"start_{side}")
        floor = 10 * torch.finfo(self.weight.dtype).eps * _whole(self.weight).norm()
        return start is not None and bool(start.norm() > floor)

    @torch.no_grad()
    def remember(self) -> None:
        """Note the coordinates before a step, which the soft constraint is relative to."""
        if self.strength < 1.0:
            matrix = _whole(self.weight).flatten(1)
            self._before_step = {side: coordinates(matrix, basis, side=side) for side, basis in self.constraints()}

    @torch.no_grad()
    def retract(self) -> None:
        """Put the raw weight back on the constraint; at strength below 1, take back that share of the last step."""
        if self.strength == 1.0:
            self._write(self.project(_whole(self.weight)))
            return
        matrix = _whole(self.weight).flatten(1)
        for side, basis in self.constraints():
            if side in self._before_step:
                target = self._before_step[side]
                matrix = remove_component(matrix, basis, side=side, strength=self.strength, target=target)
        self._write(matrix)
        self._before_step = {}

    def _write(self, matrix: Tensor) -> None:
        # copy_ and not an in-place projection on a reshaped view: of a channels_last weight `reshape` is a copy.
        _overwrite(self.weight, self._in_shape(matrix))

    def _apply(self, fn: Any, recurse: bool = True) -> ProjectedWeight:
        # `.half()` or `.to(bfloat16)` must not round the basis: it would no longer be orthonormal. Only the device
        # of the buffers follows the weight.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer if self.weight.is_meta else buffer.to(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            self.restart(initial=False)
            if self.gradient_constraint is not None:
                self.gradient_constraint.restart()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy or an unpickled module is a module of its own and needs its own retraction.
        super().__setstate__(state)
        _retraction.add(self)


class ProjectedLinear(ProjectedWeight, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` whose effective weight is its own weight projected off the concept basis."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.project(self.weight), self.bias)


class ProjectedConv2d(ProjectedWeight, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` whose effective weight is its own weight projected off the concept basis."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.project(self.weight), self.bias)


class GradientConstraint:
    r"""The gradient space of one layer: :math:`Q^T (A, B)` stays what it was at the start.

    To first order, no step then changes the concept's loss. It couples A and B, so it is kept by retraction alone:
    there is no forward projection for it. Beside other spaces, whose retraction follows, it is kept only nearly.

    Args:
        a: The module of A, with `r * d_in` weights.
        b: The module of B, with `d_out * r` weights.
        basis: :math:`Q`, float32, shape `(r * d_in + d_out * r, k)`, orthonormal columns.
        strength: Share of each step's component that is removed.
    """

    def __init__(self, a: ProjectedWeight, b: ProjectedWeight, basis: Tensor, strength: float) -> None:
        self.a, self.b, self.basis, self.strength = a, b, basis, strength
        self._of: dict[tuple[bool, bool], _Kept] = {}

    def _kept(self) -> _Kept:
        """Of what is trained: what is frozen may not be moved, and has no part in the steps."""
        a, b = (module.weight.requires_grad for module in (self.a, self.b))
        if (a, b) not in self._of:
            # Where one is trained after the other, each has its own, so that no start is noted twice.
            split = self.a.weight.numel()
            if a == b:
                kept = _Kept((self.a, self.b), self.basis)
            elif a:
                kept = _Kept((self.a,), orthonormal_basis(self.basis[:split]))
            else:
                kept = _Kept((self.b,), orthonormal_basis(self.basis[split:]))
            self._of[a, b] = kept
        kept = self._of[a, b]
        kept.basis = kept.basis.to(self.a.weight.device)
        return kept

    def restart(self) -> None:
        """Keep, from the next step on, the coordinates that A and B have before it."""
        for kept in self._of.values():
            kept.start = None

    def remember(self) -> None:
        """Note the coordinates before a step: of the first one, and at strength below 1 of each."""
        kept = self._kept()
        # Not earlier: DDP broadcasts the weights of the first process, and transformers loads a saved adapter into one
        # that is injected already, both past `load_state_dict`. Not of each step: what low precision rounds away of
        # the corrections would add up.
        if kept.start is None or self.strength < 1.0:
            kept.start = coordinates(kept.flat(), kept.basis, side="left")

    @torch.no_grad()
    def retract(self) -> None:
        """Move A and B back along the basis."""
        kept = self._kept()
        if kept.start is None:
            return
        target = kept.start.to(kept.basis.device)
        flat = remove_component(kept.flat(), kept.basis, side="left", strength=self.strength, target=target).squeeze(1)
        if self.strength < 1.0:
            # The step of a wrapper encloses that of the optimizer: a share that is left is not to be shared again.
            kept.start = None
        for module, values in zip(kept.modules, flat.split([m.weight.numel() for m in kept.modules]), strict=True):
            _overwrite(module.weight, values.reshape(module.weight.shape))


@dataclass
class _Kept:
    """What a gradient constraint keeps of some weights: their coordinates along a basis."""

    modules: tuple[ProjectedWeight, ...]
    basis: Tensor
    start: Tensor | None = None

    def flat(self) -> Tensor:
        return torch.cat([_whole(module.weight).float().flatten() for module in self.modules]).unsqueeze(1)


class _Retraction:
    """Retracts every projected weight of the process that an optimizer has just stepped."""

    def __init__(self) -> None:
        self._modules: OrderedWeakSet[ProjectedWeight] = OrderedWeakSet()

    def add(self, module: ProjectedWeight) -> None:
        self._modules.add(module)
        observe_steps(self, ORDER_RETRACTION)

    def _stepped_by(self, optimizer: torch.optim.Optimizer) -> list[ProjectedWeight]:
        # By identity and through the module, at each step: PEFT, FSDP and dtype casts replace Parameter objects.
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [module for module in self._modules if id(module.weight) in stepped]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for constraint in _constraints_of(self._stepped_by(optimizer)):
            constraint.remember()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for constraint in _constraints_of(self._stepped_by(optimizer)):
            constraint.retract()


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is spread over processes (FSDP2, tensor parallelism)."""
    tensor_module = sys.modules.get("torch.distributed.tensor")
    return tensor_module is not None and isinstance(weight, tensor_module.DTensor)


def _whole(weight: Tensor) -> Tensor:
    """The values of a weight; of a sharded one they are gathered, for which all processes must ask together.

    The constrained axis may be the one that is sharded, and A and B are small.
    """
    weight = weight.detach()
    return weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def _overwrite(weight: Tensor, values: Tensor) -> None:
    """Write `values`, which all processes have alike, into a weight that may be sharded."""
    if is_sharded(weight):
        from torch.distributed.tensor import DTensor, Replicate

        sharded: Any = weight
        whole = DTensor.from_local(values, sharded.device_mesh, [Replicate()] * sharded.device_mesh.ndim)
        values = whole.redistribute(placements=sharded.placements)
    weight.copy_(values)


def _constraints_of(modules: list[ProjectedWeight]) -> list[GradientConstraint | ProjectedWeight]:
    shared = {id(m.gradient_constraint): m.gradient_constraint for m in modules if m.gradient_constraint is not None}
    # The gradient space first: input and output, which can be verified from the weights, must hold last.
    return [*shared.values(), *modules]


_retraction = _Retraction()


def constrain_adapter(
    layer: Any, adapter_name: str, name: str, basis: LayerBasis, *, strength: float, initial: bool = True
) -> None:
    """Put the constraints of `basis` on one adapter of one layer, replacing those it has in the same spaces.

    Args:
        layer: The `LoraLayer`; its A and B for the adapter are `nn.Linear` or `nn.Conv2d`.
        adapter_name: Which of its adapters.
        name: The layer's name in the base model, for messages.
        basis: Bases of the widths `d_in` (for a convolution `c_in * kh * kw`), `r`, `d_out`,
            `r * d_in + d_out * r`.
        strength: Share alpha of the component that is removed, in [0, 1].
        initial: Whether the weights are fresh; see :meth:`ProjectedWeight.restart`.

    Raises:
        GradProjConfigError: If the layer is of a kind that is not supported.
        ConceptBasisError: If a width does not fit.
    """
    check_supported(layer, name)
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    check_widths(name, basis, d_in=a.weight[0].numel(), d_out=b.weight.shape[0], rank=a.weight.shape[0])
    a, b = (m if isinstance(m, ProjectedWeight) else ProjectedWeight.adopt(m, strength) for m in (a, b))
    if basis.input is not None:
        a.constrain("right", basis.input, keep=False)
    if basis.output is not None:
        b.constrain("left", basis.output, keep=False)
    if basis.rank is not None:
        a.constrain("left", basis.rank, keep=True)
        b.constrain("right", basis.rank, keep=True)
    for module in (a, b):
        module.restart(initial=initial)
    if basis.gradient is not None:
        a.gradient_constraint = b.gradient_constraint = GradientConstraint(a, b, basis.gradient, strength)


def check_supported(module: nn.Module, name: str) -> None:
    """Refuse modules whose adapters cannot be projected.

    Args:
        module: A module of the base model, adapted or not.
        name: Its name in the base model.

    Raises:
        GradProjConfigError: If it is not Linear, Conv1D or Conv2d, or is a grouped convolution; it names the module.
    """
    from transformers.pytorch_utils import Conv1D

    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(base, nn.Linear | nn.Conv2d | Conv1D) or getattr(base, "groups", 1) != 1:
        raise GradProjConfigError(
            f"layer '{name}' is a {type(base).__name__}; gradient projection supports Linear, Conv1D and Conv2d "
            "with groups=1. Take it out of `target_modules` (or list it in `exclude_modules`)."
        )


def projected_weights(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ProjectedWeight]]:
    """Names and modules of the adapter's projected A and B in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, ProjectedWeight) and name.rpartition(".")[2] == adapter_name:
            yield name, module


def check_widths(name: str, basis: LayerBasis, d_in: int, d_out: int, rank: int) -> None:
    """Refuse a basis of other widths than its layer has.

    Args:
        name: The layer's name in the base model, for messages.
        basis: Its basis.
        d_in: Width of its input, for a convolution `c_in * kh * kw`.
        d_out: Width of its output.
        rank: The adapter's rank in this layer.

    Raises:
        ConceptBasisError: If a width does not fit.
    """
    expected = {"input": d_in, "rank": rank, "output": d_out, "gradient": rank * (d_in + d_out)}
    for space, width in expected.items():
        given = getattr(basis, space)
        if given is not None and given.shape[0] != width:
            raise ConceptBasisError(
                f"layer '{name}': the {space} basis has width {given.shape[0]}, but the layer needs {width}. Was the "
                "basis fitted on another model, or with another `r`? Fit it on this one."
            )
