r"""Concept probes: frozen model inputs that show the concept in the training distribution.

A set of :math:`n` probes holds the inputs :math:`x_i` of the model, the base model's outputs :math:`f_0(x_i)`
(`targets`) and non-negative weights :math:`w_i` that say where in the output the concept is. The online projection
measures on them how far the adapted model has drifted,

.. math:: D(\theta) = \sum_i w_i (f_\theta(x_i) - f_0(x_i))^2 / \sum_i w_i .

Probes protect only what they resemble: they must look like the training data (the user's own pictures with the logo
pasted onto them, under the training captions, noised at random timesteps), not like the concept alone.

As a file they are one safetensors file with the tensors `inputs.{name}`, `targets`, `weights` and `loss_targets`, and
a header that says which concept of which base model they show, and how wide the layers of that model are.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .base_models import identify, in_common, layer_widths, unwrapped
from .errors import ConceptDataError
from .files import locate_file, read_header_json, read_tensor_file, write_tensor_file
from .model_arguments import flatten_arguments, is_encoder_decoder, nest_arguments, place_arguments, unshared

__all__ = [
    "FORMAT_VERSION",
    "PROBES_FILE_NAME",
    "ConceptProbes",
    "ProbeBatch",
    "RunModel",
    "active_beside",
    "adapters_as_before",
    "adapters_disabled",
    "call_model",
    "check_loss_targets",
    "check_probes_fit",
    "collect_concept_probes",
    "evaluation_mode",
    "model_output",
]

PROBES_FILE_NAME = "concept_probes.safetensors"
FORMAT_VERSION = "1"

RunModel = Callable[[Any, dict[str, Any]], Any]
"""`run_model(model, inputs)`: how a model is called when `model(**inputs)` does not do."""

_INPUT_PREFIX = "inputs."


# Probes


@dataclass(frozen=True)
class ProbeBatch:
    """Some probes on a device, ready for the model."""

    inputs: dict[str, Any]
    """Keyword arguments of the model, nested where a name has dots; tensors of shape `(b, *)`."""

    targets: Tensor | None
    """The base model's outputs, shape `(b, *)`, or `None` where they are recomputed."""

    weights: Tensor | None
    """Shape `(b, *)`, broadcastable to the outputs once `broadcast_weights` has aligned them."""

    loss_targets: Tensor | None
    """The training targets of the concept loss, shape `(b, *)`."""


class ConceptProbes:
    """Frozen inputs, base outputs and weights of `n` concept probes.

    Tensors are copied to the CPU, floating ones to float32.

    Args:
        inputs: The model's keyword arguments, each a tensor with shape `(n, *)`. Nested arguments are nested mappings
            or names with dots: `{"added_cond_kwargs.text_embeds": x}` is passed as `added_cond_kwargs={"text_embeds":
            x}`.
        targets: The base model's outputs, shape `(n, *)`; `None` to recompute them with the trained adapter off,
            at the cost of a further forward on each batch: for language models, whose logits are large, and where
            another adapter is active beside the one that is trained.
        weights: Non-negative, not all zero. The first dimension is `n`, or 1 for weights that all probes share; the
            others are aligned with the output's from the left and broadcast, so that `(n,)`, `(n, tokens)` and
            `(n, 1, height, width)` are all understood. `None` weighs everything alike.
        loss_targets: The training targets of the concept loss (noise or velocity), shape `(n, *)`; needed only by
            `rule="orthogonal"`.
        concept: What must not be learned, in words.
        base_model: Id of the model that made `targets`.
        revision: Commit of the base model.
        run_model: Calls the model, `run_model(model, inputs)`; the default is `model(**inputs)`. It should not hold
            the model itself, which then could not be freed. It cannot be saved in a file: pass it to `load`.
        widths: `(d_in, d_out)` of the base model's layers, by which another model is told; `None` if not known.

    Raises:
        ConceptDataError: If the probes are empty, of unequal number, not finite, or the weights or shapes are wrong.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        loss_targets: Tensor | None = None,
        concept: str = "",
        base_model: str | None = None,
        revision: str | None = None,
        run_model: RunModel | None = None,
        widths: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.inputs: dict[str, Tensor] = {name: _frozen(name, x) for name, x in flatten_arguments(inputs).items()}
        self.targets = None if targets is None else _frozen("targets", targets)
        self.weights = None if weights is None else _frozen("weights", weights)
        self.loss_targets = None if loss_targets is None else _frozen("loss_targets", loss_targets)
        self.concept = concept
        self.base_model = base_model
        self.revision = revision
        self.run_model = run_model
        self.widths = None if widths is None else {name: (d_in, d_out) for name, (d_in, d_out) in widths.items()}
        self._check_numbers()
        self._check_weights()

    def _check_numbers(self) -> None:
        if not self.inputs:
            raise ConceptDataError("concept probes without inputs; expected a tensor for each argument of the model.")
        nest_arguments(self.inputs)  # refuses names that exclude each other
        numbers = {name: x.shape[0] for name, x in self._tensors().items() if name != "weights"}
        if len(set(numbers.values())) > 1:
            raise ConceptDataError(f"concept probes of unequal number: {numbers}; expected one first dimension.")
        if len(self) == 0:
            raise ConceptDataError("concept probes are empty; expected at least one.")
        if self.targets is not None and self.loss_targets is not None and self.targets.shape != self.loss_targets.shape:
            raise ConceptDataError(
                f"targets have shape {tuple(self.targets.shape)}, loss_targets {tuple(self.loss_targets.shape)}; both "
                "are compared with the model's output and must have its shape."
            )

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        if self.weights.shape[0] not in (1, len(self)):
            raise ConceptDataError(
                f"weights have shape {tuple(self.weights.shape)}; the first dimension must be {len(self)}, the number "
                "of probes, or 1 for weights that all share."
            )
        if (self.weights < 0).any():
            raise ConceptDataError("weights are negative somewhere; they must say how much each output counts, >= 0.")
        self._check_shown()
        for outputs in (self.targets, self.loss_targets):
            if outputs is not None:
                broadcast_weights(self.weights, outputs)

    def _check_shown(self) -> None:
        if self.weights is not None and not (self.weights > 0).any():
            raise ConceptDataError("weights are all zero, so no drift could be seen; is the concept in the pictures?")

    def __len__(self) -> int:
        return next(iter(self.inputs.values())).shape[0]

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name}: {tuple(x.shape[1:])}" for name, x in self.inputs.items())
        targets = "recomputed" if self.targets is None else str(tuple(self.targets.shape[1:]))
        return f"ConceptProbes(n={len(self)}, concept={self.concept!r}, inputs={{{inputs}}}, targets={targets})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConceptProbes):
            return NotImplemented
        return self.digest() == other.digest()

    @property
    def nbytes(self) -> int:
        """Size of all tensors, which is that of a float32 file but for its header."""
        return sum(x.nbytes for x in self._tensors().values())

    def digest(self) -> str:
        """The sha256, in hexadecimal, of the names, dtypes, shapes and values of all tensors."""
        sha = hashlib.sha256()
        for name, x in sorted(self._tensors().items()):
            sha.update(f"{name}|{x.dtype}|{tuple(x.shape)}|".encode())
            sha.update(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
        return sha.hexdigest()

    def weighted_indices(self) -> Tensor:
        """Indices of the probes that have a positive weight somewhere, shape `(m,)`; only these can show drift."""
        if self.weights is None or self.weights.shape[0] == 1:
            return torch.arange(len(self), device="cpu")
        return (self.weights.flatten(1).amax(1) if self.weights.ndim > 1 else self.weights).nonzero().flatten()

    def batch(
        self,
        indices: Tensor | Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> ProbeBatch:
        """Probes on a device, as the model takes them.

        Args:
            indices: Which, shape `(b,)`, or a boolean mask of shape `(n,)`.
            device: Where the model is.
            dtype: What floating inputs are cast to. Numbers per probe, of shape `(n,)`, keep float32, since a
                timestep of 999 is not a bfloat16 number; targets and weights keep float32 as well.
        """
        index = self._index(indices)

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index].to(device)

        shared = self.weights is not None and self.weights.shape[0] == 1
        weights = self.weights.to(device) if shared and self.weights is not None else pick(self.weights)
        inputs = place_arguments({name: x[index] for name, x in self.inputs.items()}, device, dtype)
        return ProbeBatch(inputs, pick(self.targets), weights, pick(self.loss_targets))

    def _index(self, indices: Tensor | Sequence[int]) -> Tensor:
        chosen = torch.as_tensor(indices)
        if chosen.dtype != torch.bool:
            return chosen.long()
        if chosen.shape != (len(self),):
            raise ConceptDataError(
                f"a mask of probes has shape {tuple(chosen.shape)}; expected {(len(self),)}, one for each."
            )
        return chosen.nonzero().flatten()

    def select(self, indices: Tensor | Sequence[int]) -> ConceptProbes:
        """The probes at `indices`, shape `(m,)`, or where a boolean mask of shape `(n,)` is true.

        Raises:
            ConceptDataError: If a mask has another shape, or no probe is left.
        """
        index = self._index(indices)
        shared = self.weights is not None and self.weights.shape[0] == 1
        return ConceptProbes(
            {name: x[index] for name, x in self.inputs.items()},
            None if self.targets is None else self.targets[index],
            self.weights if shared or self.weights is None else self.weights[index],
            None if self.loss_targets is None else self.loss_targets[index],
            self.concept,
            self.base_model,
            self.revision,
            self.run_model,
            self.widths,
        )

    def concat(self, *others: ConceptProbes) -> ConceptProbes:
        """These probes followed by others of the same model; their concepts' names are joined by `+`.

        Raises:
            ConceptDataError: If the arguments, shapes, what is stored, or the base models do not agree.
        """
        parts = (self, *others)
        for other in others:
            _check_alike(self, other)
        return ConceptProbes(
            {name: torch.cat([p.inputs[name] for p in parts]) for name in self.inputs},
            _joined([p.targets for p in parts]),
            _joined(_weights_of_each_probe(parts)),
            _joined([p.loss_targets for p in parts]),
            " + ".join(dict.fromkeys(p.concept for p in parts if p.concept)),
            in_common("concept probes of different base models", [p.base_model for p in parts], ConceptDataError),
            in_common("concept probes of different revisions", [p.revision for p in parts], ConceptDataError),
            self.run_model,
            _common_widths(parts),
        )

    def _tensors(self) -> dict[str, Tensor]:
        named = {_INPUT_PREFIX + name: x for name, x in self.inputs.items()}
        outputs = {"targets": self.targets, "weights": self.weights, "loss_targets": self.loss_targets}
        return named | {name: x for name, x in outputs.items() if x is not None}

    def save(self, path: str | os.PathLike[str], *, dtype: str = "float32") -> Path:
        """Write the probes to a file, or into an existing folder as `concept_probes.safetensors`.

        The file appears under its name when it is complete. A custom `run_model` is a function and is not in it.

        Args:
            path: File or folder.
            dtype: `float32`, or `float16` for half the size. Numbers per probe, of shape `(n,)`, keep float32.

        Returns:
            The file that was written.
        """
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is {dtype!r}; expected 'float32' or 'float16'.")
        header = {
            "format_version": FORMAT_VERSION,
            "concept": self.concept,
            "base_model": self.base_model,
            "revision": self.revision,
            "widths": None if self.widths is None else json.dumps(self.widths, separators=(",", ":")),
        }
        tensors = {name: _narrowed(name, x, getattr(torch, dtype)) for name, x in self._tensors().items()}
        return write_tensor_file(path, PROBES_FILE_NAME, tensors, header)

    @classmethod
    def load(
        cls,
        path_or_repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        run_model: RunModel | None = None,
    ) -> ConceptProbes:
        """Read probes from a file, a folder that holds `concept_probes.safetensors`, or a repository of the Hub.

        Args:
            path_or_repo_id: What exists on disk is read from there; else it is taken as a Hub id.
            revision: Branch, tag or commit of the repository; without meaning for a path.
            run_model: As in the constructor, since a file cannot hold it.

        Raises:
            ConceptDataError: If there are no such probes, or the file is malformed.
        """
        path = locate_file(path_or_repo_id, PROBES_FILE_NAME, revision=revision, error=ConceptDataError)
        file = read_tensor_file(path, ConceptDataError, version=FORMAT_VERSION, writer="ConceptProbes.save")
        tensors, header = dict(file), file.metadata
        targets, weights, losses = (tensors.pop(name, None) for name in ("targets", "weights", "loss_targets"))
        unknown = sorted(name for name in tensors if not name.startswith(_INPUT_PREFIX))
        if unknown:
            raise ConceptDataError(f"{path} holds {unknown}, which no concept probes have; refused.")
        inputs = {name[len(_INPUT_PREFIX) :]: x for name, x in tensors.items()}
        about = (header.get("concept", ""), header.get("base_model"), header.get("revision"), run_model)
        widths = _widths(
            read_header_json(header, "widths", f"the widths in the header of {path}", ConceptDataError), path
        )
        return cls(inputs, targets, weights, losses, *about, widths)


def broadcast_weights(weights: Tensor, outputs: Tensor) -> Tensor:
    """`weights` of shape `(n or 1, *)`, aligned with `outputs` from the left, with ones for missing dimensions.

    Raises:
        ConceptDataError: If they cannot be broadcast to the shape of `outputs`.
    """
    aligned = weights.reshape(weights.shape + (1,) * (outputs.ndim - weights.ndim))
    fits = aligned.ndim == outputs.ndim and all(w in (1, o) for w, o in zip(aligned.shape, outputs.shape, strict=True))
    if not fits:
        raise ConceptDataError(
            f"weights of shape {tuple(weights.shape)} do not broadcast to outputs of shape {tuple(outputs.shape)}; "
            "give them the output's dimensions from the left, 1 where they do not vary."
        )
    return aligned


def _widths(value: Any, path: Path) -> dict[str, Sequence[int]] | None:
    if value is not None and not (
        isinstance(value, dict)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value.values())
        and all(type(width) is int for pair in value.values() for width in pair)
    ):
        raise ConceptDataError(f"{path}: the header's widths are not pairs of numbers by layer; collect it anew.")
    return value


def _frozen(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim == 0:
        what = "a number" if isinstance(x, Tensor) else type(x).__name__
        raise ConceptDataError(f"{name} is {what}; expected a tensor whose first dimension counts the probes.")
    x = x.detach().to("cpu", torch.float32 if x.is_floating_point() else x.dtype, copy=True).contiguous()
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise ConceptDataError(f"{name} has values that are not finite; check the encoder and the base model's dtype.")
    return x


def _narrowed(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point() or x.ndim < 2 or dtype == x.dtype:
        return x
    narrow = x.to(dtype)
    if not torch.isfinite(narrow).all():
        raise ConceptDataError(f"{name} has values beyond {dtype}; save the probes as float32.")
    return narrow


def _check_alike(first: ConceptProbes, other: ConceptProbes) -> None:
    def shapes(probes: ConceptProbes) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape[1:]) for name, x in probes._tensors().items() if name != "weights"}

    if shapes(first) != shapes(other):
        raise ConceptDataError(
            f"probes of {shapes(first)} and {shapes(other)} cannot be joined; expected equal shapes."
        )
    if first.run_model is not other.run_model:
        raise ConceptDataError("probes with different run_model cannot be joined; give both the same function.")


def _common_widths(parts: Sequence[ConceptProbes]) -> dict[str, tuple[int, int]] | None:
    known = [p.widths for p in parts if p.widths is not None]
    for widths in known[1:]:
        if widths != known[0]:
            layer = next(name for name in known[0] | widths if known[0].get(name) != widths.get(name))
            raise ConceptDataError(
                f"concept probes of different models cannot be joined: layer '{layer}' has widths "
                f"{known[0].get(layer)} and {widths.get(layer)}. Collect them on one."
            )
    return known[0] if known else None


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [x for x in parts if x is not None]
    return torch.cat(present) if present else None


def _weights_of_each_probe(parts: Sequence[ConceptProbes]) -> list[Tensor | None]:
    shapes = {tuple(p.weights.shape[1:]) for p in parts if p.weights is not None}
    if not shapes:
        return [None] * len(parts)
    if len(shapes) > 1:
        raise ConceptDataError(f"probes with weights of shapes {sorted(shapes)} cannot be joined; expected equal ones.")
    (shape,) = shapes
    return [
        torch.ones(len(p), *shape) if p.weights is None else p.weights.expand(len(p), *shape).contiguous()
        for p in parts
    ]


# Running the model


def model_output(result: Any) -> Tensor:
    """The output that is compared: `.sample`, `.logits`, the first element, or the tensor itself.

    Raises:
        ConceptDataError: If there is no tensor in that place.
    """
    for name in ("sample", "logits"):
        if not isinstance(result, Tensor) and isinstance(getattr(result, name, None), Tensor):
            return getattr(result, name)
    if isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise ConceptDataError(
            f"the model returned {type(result).__name__} without .sample or .logits; pass run_model that returns the "
            "output tensor."
        )
    return result


def call_model(model: nn.Module, inputs: dict[str, Any], run_model: RunModel | None = None) -> Tensor:
    """The model's output on `inputs`, shape `(b, *)`; they may be taken out of what is given to the model."""
    inputs = unshared(inputs)
    return model_output(model(**inputs) if run_model is None else run_model(model, inputs))


def active_beside(layer: Any, adapter_name: str) -> list[str]:
    """The adapters of a layer that are active and another one than this."""
    held = {name for part in layer.adapter_layer_names for name in getattr(layer, part)}
    return [name for name in layer.active_adapters if name in held and name != adapter_name]


@contextmanager
def adapters_disabled(model: nn.Module, *, only: str | None = None) -> Iterator[None]:
    """The base model, whatever adapters are injected; `requires_grad` and what was active before are restored.

    Args:
        model: The model.
        only: An adapter; others that are active stay so.

    Raises:
        ConceptDataError: If an adapter is merged into a layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    # Each layer whose adapters change, those of them that stay active, and all that were.
    switched = []
    for layer in enabled:
        kept, names = ([] if only is None else active_beside(layer, only)), list(layer.active_adapters)
        if not kept or only in names:
            switched.append((layer, kept, names))
    for layer, kept, _ in switched:
        if not kept and isinstance(layer, BaseTunerLayer) and layer.merged:
            # PEFT would take it out of the weights in the next forward pass, and never put it back.
            raise ConceptDataError(
                f"adapter {', '.join(map(repr, layer.merged_adapters))} is merged into a layer, and would be lost "
                "where the base model is run. Make it part of the base model (merge_and_unload of PEFT; "
                "unload_lora_weights of diffusers after fuse_lora), or take it out (unmerge_adapter, unfuse_lora)."
            )
    # PEFT's switch also switches requires_grad, of frozen adapters too, hence the copy.
    flags = [(p, p.requires_grad) for layer in enabled for p in layer.parameters()]
    try:
        for layer, kept, _ in switched:
            if kept:
                layer.set_adapter(kept)
            else:
                layer.enable_adapters(False)
        yield
    finally:
        for layer, kept, names in switched:
            if kept:
                layer.set_adapter(names)
            else:
                layer.enable_adapters(True)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def adapters_as_before(model: nn.Module) -> Iterator[None]:
    """After it, each layer's active adapters, whether they are enabled, and `requires_grad` are as they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    states = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for layer, names, disabled in states:
            # Both switch `requires_grad` as well, and a module that is saved may refuse the names that it has.
            if layer.active_adapters != names:
                layer.set_adapter(names)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def evaluation_mode(model: nn.Module, *, keep_checkpointing: bool = False) -> Iterator[None]:
    """Dropout off, and no fast path past the adapters; the training flag of every single module is restored.

    Args:
        model: The model.
        keep_checkpointing: Whether layers of transformers go on to checkpoint their activations, which they do in
            training mode only; diffusers' do it in either. For passes with gradients, which have to be taken inside.
    """
    # A 4-bit layer of bitsandbytes stays in training mode, in which it computes the same: in evaluation mode, some CPUs
    # pack its weights for good at the first pass without gradients, and no later pass lets gradients through.
    packing = sys.modules["bitsandbytes"].nn.Linear4bit if "bitsandbytes" in sys.modules else ()
    # In evaluation mode, `nn.TransformerEncoderLayer` hands the weights of its layers to a kernel instead of calling
    # them. Of an adapted layer they are the base model's: neither adapter nor hooks would take part.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    flags = [(module, module.training) for module in model.modules()]
    checkpointing = {m for m, training in flags if keep_checkpointing and training and _checkpoints_in_training(m)}
    with ExitStack() as stack:
        for layer in checkpointing:
            stack.enter_context(_checkpointing_in_evaluation(layer))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, _ in flags:
                module.training = isinstance(module, packing) or module in checkpointing
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, training in flags:
                module.training = training


def _checkpoints_in_training(module: nn.Module) -> bool:
    kind = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", ())
    return isinstance(module, kind) and bool(getattr(module, "gradient_checkpointing", False))


@contextmanager
def _checkpointing_in_evaluation(layer: Any) -> Iterator[None]:
    """A layer that says it trains, so that it checkpoints, and computes what it checkpoints as in evaluation.

    Its own code may ask for dropout by its own flag, as OPT's and BART's layers do.
    """

    def evaluated(forward: Callable[..., Any], *args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:
            layer.training = True

    def checkpointed(forward: Callable[..., Any], *args: Any) -> Any:
        # Whatever was set for training: gradients of single tensors cannot be asked for through the reentrant kind.
        return checkpoint(evaluated, forward, *args, use_reentrant=False, preserve_rng_state=False)

    trained_with = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = checkpointed
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = trained_with


def collect_concept_probes(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    run_model: RunModel | None = None,
    store_targets: bool = True,
    concept: str = "",
    base_model: str | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> ConceptProbes:
    """Run the base model on inputs that show the concept, and keep what it answers.

    Adapters that are injected already are off meanwhile, and the model is in evaluation mode; both are restored.

    Args:
        model: The model that will be trained. Of one of `torch.compile` or `DistributedDataParallel`, the model within
            is run.
        batches: Yields `(inputs, weights)` or `(inputs, weights, loss_targets)`, with `inputs` a mapping of keyword
            arguments of shape `(b, *)`, and the others as in :class:`ConceptProbes`, or `None`; or yields `inputs`
            alone. Where there are no weights, the padding of an `attention_mask` of shape `(b, n)` does not count (of a
            decoder that of a `decoder_attention_mask`).
        run_model: Calls the model, `run_model(model, inputs)`; the default is `model(**inputs)`.
        store_targets: Whether to keep the outputs; else they are recomputed in training.
        concept: What must not be learned, in words.
        base_model: Id of the base model; by default the name that its config has.
        revision: Commit of the base model; by default that of a model from the Hub's cache.
        progress: Show a progress bar.

    Raises:
        ConceptDataError: If there are no batches, a batch is malformed, or an adapter is merged into the model.
    """
    model = unwrapped(model)
    if base_model is None:
        base_model, known = identify(model)
        revision = revision if revision is not None else known
    about: Any = (concept, base_model, revision, run_model, layer_widths(model))
    parts = []
    with torch.no_grad(), evaluation_mode(model), adapters_disabled(model):
        for batch in _with_progress(batches, progress):
            inputs, weights, loss_targets = _unpacked(batch)
            probes = _Part(inputs, None, weights, loss_targets, *about)
            padding = _padding(model, probes) if weights is None else None
            outputs = _base_outputs(model, probes) if store_targets or padding is not None else None
            if padding is not None and outputs is not None and outputs.shape[:2] == padding.shape:
                weights = (~padding).float()
            parts.append(_Part(inputs, outputs if store_targets else None, weights, loss_targets, *about))
    if not parts:
        raise ConceptDataError("no batches to collect concept probes from; is the iterator used up?")
    return parts[0].concat(*parts[1:])


class _Part(ConceptProbes):
    """A batch of those that are collected, which may show the concept nowhere, if others do."""

    def _check_shown(self) -> None:
        pass


def _padding(model: nn.Module, probes: ConceptProbes) -> Tensor | None:
    """Where the sequences that are answered have padding, `(b, n)`, if they have any: what is said there is noise."""
    mask = probes.inputs.get("decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask")
    return None if mask is None or mask.ndim != 2 or bool(mask.all()) else mask == 0


def _base_outputs(model: nn.Module, probes: ConceptProbes) -> Tensor:
    batch = probes.batch(range(len(probes)), *placement(model))
    return call_model(model, batch.inputs, probes.run_model)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Device and floating dtype that the model's inputs should have."""
    first = next(chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if first is None else first.device
    dtype = getattr(model, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        tensors = chain(model.parameters(), model.buffers())
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
    return device, dtype


def _unpacked(batch: Any) -> tuple[Mapping[str, Any], Tensor | None, Tensor | None]:
    if isinstance(batch, Mapping):
        return batch, None, None
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3) or not isinstance(batch[0], Mapping):
        raise ConceptDataError("a batch of probes must be (inputs, weights) or (inputs, weights, loss_targets).")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def _with_progress(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="concept probes", unit="batch")


# Fitting a model


def check_loss_targets(probes: ConceptProbes) -> None:
    """Refuse probes that `rule="orthogonal"` cannot be computed on.

    Raises:
        ConceptDataError: If they have no `loss_targets`.
    """
    if probes.loss_targets is None:
        raise ConceptDataError(
            "rule='orthogonal' follows the gradient of the concept loss and needs probes with loss_targets (the noise "
            "or velocity); collect them as (inputs, weights, loss_targets)."
        )


def check_probes_fit(probes: ConceptProbes, model: nn.Module, targeted: Sequence[str]) -> None:
    """Refuse probes of another model, as far as it shows without running this one.

    Args:
        probes: The probes.
        model: The model that they would be run on.
        targeted: Names of its layers that are adapted.

    Raises:
        ConceptDataError: If the widths of the layers differ, or the model takes other arguments.
    """
    advice = "Were the probes collected on another model? Collect them on the one that is trained."
    if probes.widths is not None and targeted:
        widths, known = layer_widths(model), [name for name in targeted if name in probes.widths]
        if not known:
            raise ConceptDataError(
                f"the concept probes are of a model that has none of the adapted layers ({targeted[0]}, ...); its "
                f"layers are {next(iter(probes.widths), 'not named')}, ... . {advice}"
            )
        for name in known:
            if name in widths and widths[name] != probes.widths[name]:
                raise ConceptDataError(
                    f"layer '{name}' maps {_arrow(widths[name])}, and in the model of the concept probes "
                    f"{_arrow(probes.widths[name])}. {advice}"
                )
    parameters = inspect.signature(model.forward).parameters
    taken = {name.partition(".")[0] for name in probes.inputs}
    if probes.run_model is None and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(taken - parameters.keys())
        if unknown:
            raise ConceptDataError(
                f"{type(model).__name__} takes no {', '.join(unknown)}, which the concept probes give it. {advice}"
            )


def _arrow(widths: Sequence[int]) -> str:
    return f"{widths[0]} to {widths[1]}"
