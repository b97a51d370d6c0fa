r"""What goes through the layers of a model: features, and gradients of an adapter, seen through hooks.

Features are the inputs and outputs of the layers of the *base*: adapters are switched off, so that a model with
adapters and a bare one show the same. Gradients are those of an adapter's A and B, and of :math:`z = A x`.
A model is left as it was found, also after an exception.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base_models import bare_model, widths_of
from .errors import ConceptBasisError, ConceptDataError
from .probes import adapters_as_before, adapters_disabled, evaluation_mode

__all__ = [
    "Features",
    "LayerGradients",
    "TargetLayer",
    "Vectors",
    "find_adapter",
    "find_layers",
    "observe_features",
    "observe_gradients",
    "undisturbed",
]

Choice = Callable[[tuple[int, ...]], Tensor | None]
"""Given the shape of the positions, such as `(b, n)`, the flat indices of those that are wanted; `None` for all."""

_PERTURBATION = 1e-3
"""Scale of the random B that stands in for a B that is zero, small against a trained one."""


# Layers


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """A layer that an adapter adapts, or would adapt."""

    name: str
    """Its name in the bare base model."""

    base: Any
    """The layer of the base model: Linear, Conv2d, or GPT-2's Conv1D, which is a Linear with its weight transposed."""

    wrapper: Any = None
    """PEFT's layer around it, if adapters are injected."""

    @property
    def d_in(self) -> int:
        """Width of its input space."""
        return self._widths[0]

    @property
    def d_out(self) -> int:
        """Width of its output space."""
        return self._widths[1]

    @property
    def _widths(self) -> tuple[int, int]:
        widths = widths_of(self.base)
        assert widths is not None  # `_checked_layer` refuses others
        return widths

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What, beside its input, decides on its input vectors."""
        if not isinstance(self.base, nn.Conv2d):
            return ()
        conv = self.base
        return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode)

    def input_vectors(self, x: Tensor, choose: Choice | None = None) -> Tensor:
        """One vector per position, shape `(n, d_in)`: tokens of a linear layer, patches of a convolution.

        Args:
            x: The layer's input.
            choose: Which positions are wanted; all if it is `None`.
        """
        if not isinstance(self.base, nn.Conv2d):
            return _rows(x, choose)
        conv = self.base
        # Padding first, in the layer's own mode, since unfold knows zeros alone, and the same on either side.
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x if x.ndim == 4 else x[None], conv._reversed_padding_repeated_twice, mode=mode)
        return _rows(F.unfold(x, conv.kernel_size, conv.dilation, stride=conv.stride).mT, choose)

    def output_vectors(self, y: Tensor, choose: Choice | None = None) -> Tensor:
        """One vector per position, shape `(n, c)`; also for what has the layout of outputs, as `A x` has."""
        return _rows(y.movedim(-3, -1) if isinstance(self.base, nn.Conv2d) else y, choose)


def _rows(vectors: Tensor, choose: Choice | None) -> Tensor:
    """The chosen vectors of a tensor of shape `(*, d)`, shape `(n, d)`; others are not copied."""
    positions = vectors.shape[:-1]
    chosen = None if choose is None else choose(tuple(positions))
    if chosen is None:
        return vectors.reshape(-1, vectors.shape[-1])
    return vectors[torch.unravel_index(chosen.to(vectors.device), positions)]


def find_layers(model: nn.Module, target_modules: str | Sequence[str]) -> list[TargetLayer]:
    """The layers that a LoRA with these `target_modules` adapts, by PEFT's own rules.

    Args:
        model: A bare model, one with adapters injected, or a `PeftModel`; also compiled or parallel ones.
        target_modules: As in `LoraConfig`: names or ends of names, a regular expression, or `"all-linear"`.

    Raises:
        ConceptBasisError: If nothing matches, or what matches is no layer that can be adapted with projection.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import (
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    root = bare_model(model)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules=targets), root)
    layers: list[TargetLayer] = []
    inside: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if name.startswith(inside):
            continue
        base: nn.Module = module
        wrapper: Any = None
        if isinstance(module, BaseTunerLayer):
            base, wrapper = module.get_base_layer(), module
            inside = (*inside, f"{name}.")
        if name and check_target_module_exists(config, name):
            layers.append(_checked_layer(name, base, wrapper))
    if not layers:
        raise ConceptBasisError(
            f"target_modules={target_modules!r} matches no module of {type(root).__name__}. Names are those of "
            "model.named_modules(), without prefixes of PEFT."
        )
    return layers


def _checked_layer(name: str, base: nn.Module, wrapper: Any) -> TargetLayer:
    if widths_of(base) is None:
        raise ConceptBasisError(
            f"{name} is a {type(base).__name__}; a concept basis can be fitted for Linear, Conv1D and Conv2d. "
            "Narrow target_modules."
        )
    if isinstance(base, nn.Conv2d) and base.groups != 1:
        raise ConceptBasisError(
            f"{name} is a convolution of {base.groups} groups; expected one. Narrow target_modules."
        )
    if wrapper is not None and getattr(wrapper, "merged", False):
        raise ConceptBasisError(f"an adapter is merged into {name}; unmerge it, so that the base's features show.")
    return TargetLayer(name, base, wrapper)


# The model's state


@contextmanager
def undisturbed(model: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """Evaluation mode, and after it every mode, `requires_grad`, active adapter and random state as before."""
    with torch.random.fork_rng(), evaluation_mode(model), adapters_as_before(model):
        torch.manual_seed(seed)
        yield


def _activate(model: nn.Module, adapter_name: str) -> None:
    """Make one adapter active; inside :func:`undisturbed`, which undoes it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter_name)
            module.enable_adapters(True)


# Features


@dataclass(frozen=True, eq=False)
class Vectors:
    """What a layer was given, or gave, in one call."""

    chosen: Tensor
    """The vectors of the positions that were wanted, shape `(n, d)`."""

    shape: tuple[int, ...]
    """Of the whole tensor that they are from."""


@dataclass
class Features:
    """The inputs and outputs of the layers in one forward pass, a list with one entry per call."""

    inputs: dict[str, list[Vectors]] = field(default_factory=dict)
    outputs: dict[str, list[Vectors]] = field(default_factory=dict)

    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each layer and call, the layer that first had the same input: layers with equal sources share vectors."""


@contextmanager
def observe_features(
    model: nn.Module, layers: Sequence[TargetLayer], spaces: Sequence[str]
) -> Iterator[Callable[..., Features]]:
    """A function that runs a forward pass, given as a callable, and returns the features of `layers` in it.

    Only what `spaces` asks for is kept, of inputs that several layers have, one copy, and of the positions those alone
    that its second argument, a `Choice`, wants, if it is given: whole activations of all layers can take ten times the
    memory of the model.
    """
    features = Features()
    wanted: Choice | None = None
    recording = False
    seen: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, str, Vectors]] = {}

    def vectors(tensor: Tensor, to_vectors: Callable[[Tensor, Choice | None], Tensor]) -> Vectors:
        chosen = to_vectors(tensor.detach(), wanted)
        if chosen.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            # A copy, since what follows in the model may write into the tensor.
            chosen = chosen.clone()
        return Vectors(chosen, tuple(tensor.shape))

    def note_input(layer: TargetLayer, x: Tensor) -> None:
        if not recording:
            return
        key = (id(x), layer.geometry)
        version = 0 if x.is_inference() else x._version
        known = seen.get(key)
        # An id may be given anew, and a tensor may be written to: neither is the same input.
        if known is None or known[0]() is not x or known[1] != version:
            known = seen[key] = (weakref.ref(x), version, layer.name, vectors(x, layer.input_vectors))
        features.inputs.setdefault(layer.name, []).append(known[3])
        features.sources[layer.name] = (*features.sources.get(layer.name, ()), known[2])

    def note_output(layer: TargetLayer, y: Tensor) -> None:
        if recording:
            features.outputs.setdefault(layer.name, []).append(vectors(y, layer.output_vectors))

    def run(forward: Callable[[], Any], choose: Choice | None = None) -> Features:
        nonlocal features, wanted, recording
        features, wanted, recording = Features(), choose, True
        try:
            with torch.no_grad(), adapters_disabled(model):
                forward()
        finally:
            recording = False
            seen.clear()
        return features

    with ExitStack() as stack:
        for layer in layers:
            if "input" in spaces:
                hook = layer.base.register_forward_pre_hook(lambda _, args, layer=layer: note_input(layer, args[0]))
                stack.callback(hook.remove)
            if "output" in spaces:
                hook = layer.base.register_forward_hook(lambda _, args, y, layer=layer: note_output(layer, y))
                stack.callback(hook.remove)
        yield run


# Gradients


@dataclass
class LayerGradients:
    """What the loss of one batch says of an adapter's layer."""

    down: list[Tensor]
    """:math:`z = A x`, one entry per call, in the layout of outputs with `r` channels."""

    up: list[Tensor]
    r"""The gradient of the loss in :math:`z`, :math:`s B^T \delta`, same shapes."""

    flat: Tensor
    """The gradients of A and B, flattened, shape `(r * (d_in + d_out),)`."""


def find_adapter(layers: Sequence[TargetLayer], adapter_name: str | None) -> str:
    """The adapter whose gradients are meant: `adapter_name`, or the only one that there is.

    Raises:
        ConceptBasisError: If a layer does not have it, or it is not clear which.
    """
    names = {layer.name: set(getattr(layer.wrapper, "lora_A", {})) for layer in layers}
    if adapter_name is None:
        known = sorted(set().union(*names.values()))
        if len(known) != 1:
            raise ConceptBasisError(
                f"the rank and gradient spaces belong to an adapter, and the model has {len(known)} in these layers "
                f"({', '.join(known) or 'none'}); inject it before fitting, and name it with adapter_name."
            )
        adapter_name = known[0]
    missing = [name for name, adapters in names.items() if adapter_name not in adapters]
    if missing:
        raise ConceptBasisError(
            f"adapter {adapter_name!r} does not adapt {', '.join(missing[:5])}; fit the rank and gradient spaces with "
            "the target_modules of the adapter."
        )
    return adapter_name


@contextmanager
def observe_gradients(
    model: nn.Module, layers: Sequence[TargetLayer], adapter_name: str
) -> Iterator[Callable[[Callable[[], Tensor]], dict[str, LayerGradients]]]:
    """A function that runs a loss, given as a callable, and returns the gradients of the adapter's layers.

    No `.grad` is written. Where B is zero, as it is at the start, a small random B takes its place meanwhile, since
    the gradient of A is zero otherwise.
    """
    activations: dict[str, list[Tensor]] = {}
    recording = False

    def note(layer: TargetLayer, z: Tensor) -> None:
        # Gradient checkpointing calls the layers again in the backward pass.
        if recording:
            activations.setdefault(layer.name, []).append(z)

    def run(loss: Callable[[], Tensor]) -> dict[str, LayerGradients]:
        nonlocal recording
        activations.clear()
        _activate(model, adapter_name)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in layers:
            for matrix in _matrices(layer, adapter_name):
                matrix.requires_grad_(True)
        recording = True
        try:
            with torch.enable_grad():
                value = _checked_loss(loss())
        finally:
            recording = False
        called = [layer for layer in layers if layer.name in activations]
        wanted = [t for layer in called for t in (*activations[layer.name], *_matrices(layer, adapter_name))]
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        gradients = iter(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True))
        result = {}
        for layer in called:
            down = [z.detach() for z in activations[layer.name]]
            up = [next(gradients) for _ in down]
            flat = torch.cat([next(gradients).flatten().float(), next(gradients).flatten().float()])
            result[layer.name] = LayerGradients(down, up, flat)
        activations.clear()
        return result

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_without_zero(_matrices(layer, adapter_name)[1]))
            module = layer.wrapper.lora_A[adapter_name]
            hook = module.register_forward_hook(lambda _, args, z, layer=layer: note(layer, z))
            stack.callback(hook.remove)
        yield run


def _matrices(layer: TargetLayer, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B."""
    return layer.wrapper.lora_A[adapter_name].weight, layer.wrapper.lora_B[adapter_name].weight


@contextmanager
def _without_zero(b: nn.Parameter) -> Iterator[None]:
    if bool(b.detach().any()):
        yield
        return
    with torch.no_grad():
        b.normal_(std=_PERTURBATION)
    try:
        yield
    finally:
        with torch.no_grad():
            b.zero_()


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConceptDataError(
            f"loss_fn returned {type(loss).__name__ if not isinstance(loss, Tensor) else tuple(loss.shape)}; "
            "expected a scalar tensor."
        )
    if not loss.requires_grad:
        raise ConceptDataError("the loss does not depend on the adapter; run_model must not switch off gradients.")
    if not torch.isfinite(loss):
        raise ConceptDataError(f"the loss is {loss.item()}; expected a finite value. Check the batch for overflow.")
    return loss.sum()
