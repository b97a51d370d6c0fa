"""Keyword arguments of a model, as they are kept in files and as the model takes them.

Flat, an argument within a mapping has a name with dots: `added_cond_kwargs.text_embeds` is passed as
`added_cond_kwargs={"text_embeds": x}`.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConceptDataError

__all__ = [
    "attention_masks",
    "flatten_arguments",
    "is_encoder_decoder",
    "nest_arguments",
    "place_arguments",
    "unshared",
]


def flatten_arguments(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by names with dots; those that are `None` are left out."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            flat.update(flatten_arguments(value, f"{prefix}{name}."))
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def nest_arguments(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten_arguments`.

    Raises:
        ConceptDataError: If a name is that of a tensor and of a mapping.
    """
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or last in inner:
            raise ConceptDataError(f"the argument {name} is a tensor and a mapping at once; refused.")
        inner[last] = value
    return nested


def place_arguments(
    arguments: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Arguments as a model takes them: those with dots nested, tensors on its device, floating ones in its dtype.

    Numbers per example, of shape `(n,)`, keep their dtype, since a timestep of 999 is not a bfloat16 number.
    """

    def placed(x: Any) -> Any:
        # Other mappings, such as outputs of models, are what they are.
        if type(x) is dict:
            return {name: placed(value) for name, value in x.items()}
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if dtype is not None and x.is_floating_point() and x.ndim > 1 else x.to(device)

    return nest_arguments({name: placed(x) for name, x in arguments.items()})


def unshared(arguments: Any) -> Any:
    """The same values in dictionaries of their own, nested ones too: a caller's `pop` leaves the others as they are."""
    if type(arguments) is dict:
        return {name: unshared(value) for name, value in arguments.items()}
    # What tokenizers and processors of transformers return.
    return copy.copy(arguments) if isinstance(arguments, UserDict) else arguments


def attention_masks(model: nn.Module, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Which positions of the sequences that a language model is given are no padding: of shape `(b, n)`, boolean.

    Of an encoder and a decoder that of each; of the encoder alone only where the decoder's sequence, whose padding
    nobody tells, has another length.
    """
    names = ("attention_mask", "decoder_attention_mask")
    found = {name: arguments.get(name) for name in names}
    masks = {n: m.detach().cpu() != 0 for n, m in found.items() if isinstance(m, Tensor) and m.ndim == 2}
    if is_encoder_decoder(model) and "decoder_attention_mask" not in masks:
        answers = [arguments.get(name) for name in ("labels", "decoder_input_ids", "decoder_inputs_embeds")]
        shapes = [tuple(answer.shape[:2]) for answer in answers if isinstance(answer, Tensor)]
        masks = {name: mask for name, mask in masks.items() if tuple(mask.shape) not in shapes}
    return [*masks.values()]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model answers with the sequence of a decoder, and not with its input's."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
