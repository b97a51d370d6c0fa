r"""What an adapter does: the drift on concept probes against the drift on a reference set.

The plain LoRA is put on the base model by the means that everybody uses, PEFT's or diffusers', from the bytes that were
verified. On each set of probes, with the weights :math:`w` that say where in the output to look,

.. math:: D = \sum w (f_\text{adapted}(x) - f_\text{base}(x))^2 / \sum w .

The drift on the reference set says how much was learned at all; the figure is the ratio of the two. It depends on the
probes: they show the concept as whoever made them expects it to appear, and say nothing about other ways.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_folder import ADAPTER_CONFIG_NAME, WEIGHT_NAMES, AdapterFolder, LoraPair, lora_configs
from .errors import BehaviourError, ConceptDataError
from .escaping import regular_expressions
from .probes import ConceptProbes, adapters_disabled, broadcast_weights, call_model, evaluation_mode, placement
from .untrusted import printable

__all__ = [
    "DRIFT_TOLERANCE",
    "BehaviourResult",
    "adapters_removed",
    "load_base_model",
    "load_probes",
    "loaded_adapter",
    "measure_behaviour",
    "measure_drift",
]

DRIFT_TOLERANCE = 0.5
"""Largest drift on the concept probes, as a share of the drift on the reference set. A convention and no law: what an
adapter without protection reaches depends on the concept and on the weights of the probes; measure one to compare."""

_ADAPTER = "gradproj_verified"
_MISMATCH = 1e-3
"""Outputs that differ from the stored ones by more than this share of their energy are those of another model."""


@dataclass(frozen=True)
class BehaviourResult:
    """Drift of an adapter, in mean squares of the model's output."""

    probes: int
    """How many probes were measured on."""

    drift: float
    """On the concept probes."""

    energy: float
    """Mean square of the base model's own outputs there, to compare with."""

    stored_mismatch: float | None
    """How far the base model's outputs are from those stored in the probes, as a share of their energy."""

    reference_probes: int = 0
    reference_drift: float | None = None
    """On the reference set; `None` without one."""

    @property
    def ratio(self) -> float | None:
        """Drift on the concept probes as a share of that on the reference set; `None` without a reference set."""
        if self.reference_drift is None:
            return None
        return self.drift / self.reference_drift if self.reference_drift > 0 else (inf if self.drift > 0 else 0.0)

    @property
    def same_base(self) -> bool:
        """Whether the probes were collected on this base model, as far as they tell."""
        return self.stored_mismatch is None or self.stored_mismatch <= _MISMATCH


def measure_behaviour(
    folder: AdapterFolder,
    pairs: Mapping[str, LoraPair],
    model: nn.Module,
    probes: ConceptProbes,
    reference: ConceptProbes | None = None,
    *,
    batch_size: int = 8,
) -> tuple[BehaviourResult, list[str]]:
    """Measure the drift on both sets, a batch at a time; the model is left as it was.

    Args:
        folder: The published adapter, as it was read.
        pairs: Its layers, under their names in the base model.
        model: The base model, without adapters.
        probes: What shows the concept.
        reference: What is free of it.
        batch_size: Probes at a time, which bounds the memory.

    Returns:
        The figures, and what was loaded otherwise than it was verified.

    Raises:
        BehaviourError: If the adapter does not fit the base model, or the probes do not.
    """
    with loaded_adapter(folder, pairs, model) as faults:
        return measure_drift(model, probes, reference, batch_size=batch_size), faults


def measure_drift(
    model: nn.Module, probes: ConceptProbes, reference: ConceptProbes | None = None, *, batch_size: int = 8
) -> BehaviourResult:
    """Measure the drift of whatever adapters `model` carries; those that are switched off do not count.

    Args:
        model: The base model with its adapters, if any.
        probes: What shows the concept.
        reference: What is free of it.
        batch_size: Probes at a time, which bounds the memory.

    Raises:
        BehaviourError: If the model cannot be run on the probes.
    """
    if batch_size < 1:
        raise BehaviourError(f"batch_size={batch_size}; expected at least 1.")
    drift, energy, mismatch = _drift(model, probes, batch_size)
    other = None if reference is None else _drift(model, reference, batch_size)[0]
    count = 0 if reference is None else len(reference)
    return BehaviourResult(len(probes), drift, energy, mismatch, count, other)


# Drift


def _drift(model: nn.Module, probes: ConceptProbes, batch_size: int) -> tuple[float, float, float | None]:
    """Drift, energy of the base model's outputs, and relative distance of these from the stored ones."""
    drift = energy = total = mismatch = 0.0
    with torch.no_grad(), evaluation_mode(model):
        for indices in torch.arange(len(probes)).split(batch_size):
            batch = probes.batch(indices, *placement(model))
            adapted = _outputs(model, batch.inputs, probes)
            with adapters_disabled(model):
                base = _outputs(model, batch.inputs, probes)
            weights = torch.ones((), dtype=torch.float64)
            if batch.weights is not None:
                weights = broadcast_weights(batch.weights.double().cpu(), base)
            drift += _sum(weights * (adapted - base).square())
            energy += _sum(weights * base.square())
            total += _sum(weights.expand_as(base))
            if batch.targets is not None:
                mismatch += _sum(weights * (base - batch.targets.double().cpu()).square())
    if not total > 0:
        raise BehaviourError("the weights of the probes are zero everywhere; there is nothing to measure.")
    far = None if probes.targets is None else mismatch / energy if energy > 0 else mismatch
    return drift / total, energy / total, far


def _outputs(model: nn.Module, inputs: dict[str, Any], probes: ConceptProbes) -> Tensor:
    try:
        return call_model(model, inputs, probes.run_model).double().cpu()
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise BehaviourError(
            f"the base model cannot be run on the probes ({type(error).__name__}: {_short(error)}). Were they made for "
            "it? Collect them with collect_concept_probes on this model."
        ) from error


def _sum(x: Tensor) -> float:
    return float(x.sum())


# The adapter on the base model


@contextmanager
def loaded_adapter(folder: AdapterFolder, pairs: Mapping[str, LoraPair], model: nn.Module) -> Iterator[list[str]]:
    """The adapter on `model` as PEFT, or diffusers, puts it there; removed again afterwards.

    Gives a list of what was loaded otherwise than it was verified, empty where all is as it should be.

    Raises:
        BehaviourError: If the model has adapters already, or the adapter cannot be loaded onto it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise BehaviourError("the base model carries adapters already; give it without.")
    name = next(iter(folder.weights))
    with adapters_removed(model):
        with TemporaryDirectory(prefix="gradproj-") as stage, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Path(stage, name).write_bytes(folder.weights[name].source)
            try:
                _load(folder, name, Path(stage), model)
            except BehaviourError:
                raise
            except Exception as error:
                raise BehaviourError(
                    f"the adapter cannot be loaded onto this base model ({type(error).__name__}: {_short(error)})."
                ) from error
        yield list(_differences(model, pairs))


def _load(folder: AdapterFolder, name: str, stage: Path, model: nn.Module) -> None:
    if name == WEIGHT_NAMES[0]:
        from peft import PeftModel

        (stage / ADAPTER_CONFIG_NAME).write_text(json.dumps(_harmless_config(folder.config or {}, folder)))
        PeftModel.from_pretrained(model, str(stage), adapter_name=_ADAPTER)
        return
    if not hasattr(model, "load_lora_adapter"):
        raise BehaviourError(
            f"{name} is diffusers' layout, and the base model is a {type(model).__name__}; expected a diffusers model."
        )
    keys = folder.weights[name]
    for _, _, options in lora_configs(name, keys.metadata, None):
        _refuse_expressions(options)
    prefix = next((p for p in ("unet", "transformer") if any(key.startswith(f"{p}.") for key in keys)), None)
    loader: Any = model
    loader.load_lora_adapter(str(stage), prefix=prefix, adapter_name=_ADAPTER, weight_name=name)


def _harmless_config(config: Mapping[str, Any], folder: AdapterFolder) -> dict[str, Any]:
    """The config without regular expressions, which PEFT would run and a stranger can make to take for ever.

    Where one chooses the layers, they are those of the file.
    """
    _refuse_expressions({key: config.get(key) for key in ("rank_pattern", "alpha_pattern")})
    choice = {key: config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")}
    if isinstance(choice["target_modules"], list) and not any(regular_expressions(choice)):
        return {**config, "auto_mapping": None}
    names = [module for parsed in folder.layers().values() for module in parsed.pairs]
    chosen = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping"))
    return {**config, **chosen, "target_modules": names}


def _refuse_expressions(config: Mapping[str, Any]) -> None:
    for option, _ in regular_expressions(config):
        raise BehaviourError(f"{option} of the adapter holds a regular expression, which is not run.")


def _differences(model: nn.Module, pairs: Mapping[str, LoraPair]) -> Iterator[str]:
    """Where the factors in the model are not those of the file."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name in sorted(pairs.keys() - found.keys()):
        yield f"{name} is in the file and is not loaded; the base model may lack it"
    for name in sorted(found.keys() - pairs.keys()):
        yield f"{name} gets an adapter that is not in the file"
    for name in sorted(found.keys() & pairs.keys()):
        layer = found[name]
        if not isinstance(layer, LoraLayer) or _ADAPTER not in layer.lora_A:
            yield f"{name} gets an adapter that is no LoRA"
            continue
        for factor, expected in ((layer.lora_A, pairs[name].a), (layer.lora_B, pairs[name].b)):
            loaded: Any = factor[_ADAPTER].weight
            weight = loaded.detach().flatten(1).cpu()
            if weight.shape != expected.shape or not torch.equal(weight, expected.to(weight.dtype)):
                yield f"{name} gets other factors than are in the file"
                break


@contextmanager
def adapters_removed(*models: nn.Module) -> Iterator[None]:
    """All adapters taken off again at the end, whoever put them there, PEFT, diffusers or transformers.

    What requires gradients and what is in training mode is as before, too: loaders freeze the base model, and PEFT's
    brings it to evaluation mode.
    """
    gradients = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    training = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for model in models:
            _remove_adapters(model)
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


def _remove_adapters(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(model):
            delattr(model, attribute)


# The base model


def load_base_model(path_or_id: str, *, revision: str | None = None, variant: str | None = None) -> nn.Module:
    """The part of a base model that LoRA adapts: a diffusers pipeline's UNet or transformer, or a transformers model.

    Weights are read from safetensors only, and no code of the repository is run.

    Args:
        path_or_id: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        variant: Of the weights, such as `fp16`.

    Raises:
        BehaviourError: If there is no such model.
    """
    try:
        return _load_base_model(path_or_id, {"revision": revision} if revision else {}, variant)
    except BehaviourError:
        raise
    except Exception as error:
        raise BehaviourError(
            f"the base model {path_or_id} cannot be loaded ({type(error).__name__}: {_short(error)}). Expected a "
            "folder or Hub id of a diffusers pipeline or a transformers model, with safetensors; where they are there "
            "only as a variant, such as fp16, name it."
        ) from error


def _load_base_model(path_or_id: str, options: dict[str, Any], variant: str | None) -> nn.Module:
    weights = {**options, "variant": variant, "use_safetensors": True}
    index = _json_of(path_or_id, "model_index.json", options)
    if index is not None:
        import diffusers

        for part in ("unet", "transformer"):
            library, kind = (index.get(part) or [None, None])[:2]
            if library == "diffusers":
                return getattr(diffusers, kind).from_pretrained(path_or_id, subfolder=part, **weights)
        raise BehaviourError(f"the pipeline {path_or_id} has neither a UNet nor a transformer of diffusers.")
    config = _json_of(path_or_id, "config.json", options)
    if config is None:
        raise BehaviourError(f"{path_or_id} holds neither model_index.json nor config.json; it is no base model.")
    if "_class_name" in config:
        import diffusers

        kind = getattr(diffusers, config["_class_name"])
    else:
        import transformers

        kind = getattr(transformers, (config.get("architectures") or ["AutoModel"])[0])
    return kind.from_pretrained(path_or_id, **weights)


def _json_of(path_or_id: str, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(path_or_id, name)
    if not Path(path_or_id).is_dir():
        try:
            path = Path(hf_hub_download(path_or_id, name, **options))
        except EntryNotFoundError:
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_probes(given: Any) -> ConceptProbes:
    """Probes, or those in a file, folder or repository of the Hub.

    Raises:
        ConceptDataError: If there are none.
    """
    if isinstance(given, ConceptProbes):
        return given
    if isinstance(given, str | Path):
        return ConceptProbes.load(given)
    raise ConceptDataError(f"got a {type(given).__name__} where ConceptProbes, or their file, were expected.")


def _short(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:300]
