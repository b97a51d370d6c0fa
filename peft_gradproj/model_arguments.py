"""Keyword arguments of a model, as they are kept in files and as the model takes them.

Flat, an argument within a mapping has a name with dots: `added_cond_kwargs.text_embeds` is passed as
`added_cond_kwargs={"text_embeds": x}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ConceptDataError

__all__ = ["flatten_arguments", "nest_arguments", "place_arguments"]


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
    flat: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Flat arguments as a model takes them: nested, tensors on its device, floating ones in its dtype.

    Numbers per example, of shape `(n,)`, keep their dtype, since a timestep of 999 is not a bfloat16 number.
    """

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if dtype is not None and x.is_floating_point() and x.ndim > 1 else x.to(device)

    return nest_arguments({name: placed(x) for name, x in flat.items()})
