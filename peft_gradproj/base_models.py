"""Which base model something belongs to: its name, its commit, and the widths of its layers.

A concept basis and concept probes mean nothing on another model than theirs. Names of layers and widths always tell a
model of another architecture; the Hub ids tell two of one architecture, where both are known. Folders have no name
that is the same on two machines, so that paths are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from .errors import GradProjError
from .files import is_repository

__all__ = [
    "BaseModel",
    "bare_model",
    "identify",
    "in_common",
    "layer_widths",
    "names_conflict",
    "unwrapped",
    "widths_of",
]

_CACHED = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")


class BaseModel(NamedTuple):
    """A base model as it is called in files."""

    name: str | None
    """A Hub id, or the folder that it was read from."""

    revision: str | None
    """The commit on the Hub, if it came from there."""


def identify(model: Any) -> BaseModel:
    """The name that a model or pipeline has in its config; of what lies in the Hub's cache, the id and the commit."""
    config = getattr(model, "config", None)
    for source in (config, model):
        name = source.get("_name_or_path") if isinstance(source, Mapping) else getattr(source, "name_or_path", None)
        if isinstance(name, str) and name:
            cached = _CACHED.search(name)
            if cached is None:
                return BaseModel(name, None)
            return BaseModel(cached["id"].replace("--", "/", 1), cached["commit"])
    return BaseModel(None, None)


def names_conflict(name: str | None, model: nn.Module) -> str | None:
    """The Hub id of `model`, if it is known, `name` is one as well, and they differ."""
    other = identify(model).name
    if name is None or other is None or name == other or not (is_repository(name) and is_repository(other)):
        return None
    return other


def in_common(what: str, names: Iterable[str | None], error: type[GradProjError]) -> str | None:
    """The one name, of a base model or its revision, that parts to be joined have, as far as they have one.

    Args:
        what: What the parts are, for the message: "bases of different base models".
        names: Of each part.
        error: Raised if two have different ones.
    """
    known = list(dict.fromkeys(name for name in names if name is not None))
    if len(known) > 1:
        raise error(f"{what} cannot be joined: {', '.join(known)}. Make them on one.")
    return known[0] if known else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within what `torch.compile`, `DataParallel` and `DistributedDataParallel` put around it."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def bare_model(model: nn.Module) -> nn.Module:
    """The model whose layers have the names of the base: also without the wrappers of `PeftModel` and its tuner."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    model = unwrapped(model)
    if isinstance(model, PeftModel):
        return bare_model(model.get_base_model())
    return bare_model(model.model) if isinstance(model, BaseTuner) else model


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """`(d_in, d_out)` of a layer that LoRA adapts, `c_in * kh * kw` for a convolution; `None` of another module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1], module.out_channels
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def layer_widths(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The widths of all layers of the base model that LoRA could adapt, under their names there."""
    return {name: widths for name, module in _base_modules(model) if (widths := widths_of(module)) is not None}


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model under their names there, whatever adapters are injected."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: tuple[str, ...] = ()
    for name, module in bare_model(model).named_modules():
        if name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted = (*adapted, f"{name}.")
            module = module.get_base_layer()
        yield name, module
