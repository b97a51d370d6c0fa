"""LoRA adapters on a pipeline as a stranger puts them there: by PEFT's or diffusers' own loaders, and off again."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter_folder import ADAPTER_CONFIG_NAME, WEIGHT_NAMES, lora_configs
from ..behaviour import adapters_removed
from ..errors import AdapterFolderError, BehaviourError
from ..escaping import NEUTRAL_INITS
from ..files import is_repository, read_json_object
from ..pipelines import PipelineFamily
from ..training_data import first_line
from ..untrusted import printable

__all__ = ["AdapterFile", "adapter_on", "locate_adapter"]

_ADAPTER = "evaluated"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_WRAPPING = ("modules_to_save", "trainable_token_indices", "kasa_config")
"""Options of PEFT by which base layers are replaced, or their weights."""
_A_SUFFIXES = ("lora_A.weight", "lora.down.weight", "lora_down.weight", "lora_linear_layer.down.weight")
"""How tensors A are called in files that diffusers reads: PEFT's name, diffusers' former ones, and kohya's."""


@dataclass(frozen=True)
class AdapterFile:
    """A file of LoRA weights on this machine."""

    source: str
    """As it was asked for: a path or a Hub id."""
    path: Path
    sha256: str
    """Digest of its bytes, in hexadecimal, when it was located."""
    revision: str | None = None
    """The commit on the Hub, if it came from there."""

    def to_dict(self) -> dict[str, Any]:
        """What tells it from others, JSON values."""
        return {"source": self.source, "file": self.path.name, "revision": self.revision, "sha256": self.sha256}


def locate_adapter(path_or_id: str | Path, *, revision: str | None = None) -> AdapterFile:
    """The weights of an adapter in a file, a folder, or a repository of the Hub; safetensors only.

    Args:
        path_or_id: A file, or where `adapter_model.safetensors` or `pytorch_lora_weights.safetensors` is.
        revision: Branch, tag or commit on the Hub.

    Raises:
        AdapterFolderError: If there are no such weights.
    """
    source, path = str(path_or_id), Path(path_or_id)
    commit = None
    if is_repository(source):
        path = _downloaded(source, revision)
        commit = path.name
    elif revision is not None:
        raise AdapterFolderError(f"a revision was given, but {source} is a path; only the Hub has revisions.")
    if os.path.isfile(path) and path.suffix == ".safetensors":
        return AdapterFile(source, path, _digest(path))
    for name in WEIGHT_NAMES:
        if os.path.isfile(path / name):
            return AdapterFile(source, path / name, _digest(path / name), commit)
    raise AdapterFolderError(
        f"there is no adapter at {source}: expected a .safetensors file, or a folder or Hub id with "
        f"{' or '.join(WEIGHT_NAMES)}."
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _downloaded(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        names = [*WEIGHT_NAMES, ADAPTER_CONFIG_NAME]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))
    except (OSError, HTTPError, HFValidationError, ValueError) as error:
        raise AdapterFolderError(
            f"{repo_id} is neither a path, nor a repository that can be fetched ({type(error).__name__}: "
            f"{first_line(error)}). Check the name, the revision, your login and the connection."
        ) from error


@contextmanager
def adapter_on(family: PipelineFamily, adapter: AdapterFile) -> Iterator[None]:
    """The adapter on the pipeline, and the pipeline as it was afterwards.

    PEFT's layout is loaded onto the denoiser by `PeftModel.from_pretrained`, others by `load_lora_weights`, which may
    adapt text encoders as well, or, where its tensors are named as in the denoiser, by its `load_lora_adapter`.

    Raises:
        BehaviourError: If the pipeline has adapters already, this one does not fit, it changes the base for good, or
            its file is no longer what was located.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    encoders = [getattr(family.pipeline, name, None) for name in _TEXT_ENCODERS]
    models = [model for model in (family.denoiser, *encoders) if isinstance(model, nn.Module)]

    def adapted() -> bool:
        return any(isinstance(module, BaseTunerLayer) for model in models for module in model.modules())

    if adapted():
        raise BehaviourError("the base pipeline carries adapters already; give it without.")
    keys, header = _header(adapter)
    _check_comes_off(adapter, header)
    with adapters_removed(*models):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _load(family, adapter, keys, models)
            except Exception as error:
                raise BehaviourError(
                    f"the adapter {adapter.source} cannot be loaded onto this pipeline ({type(error).__name__}: "
                    f"{printable(first_line(error))})."
                ) from error
        if not adapted():
            raise BehaviourError(
                f"the adapter {adapter.source} adapts no layer of this pipeline; was it trained on another base model?"
            )
        # After it was loaded, so that nothing can come between.
        if _digest(adapter.path) != adapter.sha256:
            raise BehaviourError(
                f"the adapter {adapter.source} was overwritten while it was evaluated: {adapter.path} is not the file "
                "that it was. Evaluate it again when nobody writes to it, or a copy of it."
            )
        yield


def _check_comes_off(adapter: AdapterFile, header: Mapping[str, str]) -> None:
    """Refuse what loaders write into the base model: it stays there, and the other models would be measured with it."""
    config = adapter.path.with_name(ADAPTER_CONFIG_NAME)
    beside = read_json_object(config.resolve()) if config.is_file() else None
    stays = [
        f"{option}={value!r}"
        for _, _, options in lora_configs(adapter.path.name, header, beside)
        for option, value in options.items()
        if (option == "bias" and value != "none")
        or (option == "init_lora_weights" and value not in (None, True, False, *NEUTRAL_INITS))
        or (option in _WRAPPING and value not in (None, False, []))
    ]
    if stays:
        raise BehaviourError(
            f"the adapter {adapter.source} changes the base model itself ({printable(', '.join(stays))[:300]}), which "
            "cannot be taken off again to measure the other models. Give one without; PEFT's save_pretrained makes it "
            "of such initialisations with path_initial_model_for_weight_conversion."
        )


def _header(adapter: AdapterFile) -> tuple[set[str], dict[str, str]]:
    """The names of the tensors in a file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter.path, framework="pt") as file:
            return set(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BehaviourError(
            f"the adapter {adapter.source} cannot be loaded: {adapter.path} cannot be read as safetensors "
            f"({type(error).__name__}: {printable(first_line(error))})."
        ) from error


def _load(family: PipelineFamily, adapter: AdapterFile, keys: set[str], models: list[nn.Module]) -> None:
    from peft.tuners.lora import LoraLayer

    folder, name = str(adapter.path.parent), adapter.path.name
    if name == WEIGHT_NAMES[0]:
        from peft import PeftModel, get_peft_model_state_dict

        model = PeftModel.from_pretrained(family.denoiser, folder, adapter_name=_ADAPTER)
        loaded = set(get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False))
        if keys != loaded:
            # PEFT lets them pass: layers that the file lacks keep their start, which does nothing.
            raise ValueError(
                f"{len(loaded - keys)} tensors are not in the file, and {len(keys - loaded)} of the file not in the "
                f"model, such as {min(keys ^ loaded)}"
            )
        return
    if any(key.startswith("base_model.model.") for key in keys):
        raise ValueError(
            f"it has PEFT's layout, whose loader reads files that are called {WEIGHT_NAMES[0]}, with an "
            f"{ADAPTER_CONFIG_NAME} beside them; rename it"
        )
    roots = {key.partition(".")[0] for key in keys}
    if roots <= {child for child, _ in family.denoiser.named_children()}:
        family.denoiser.load_lora_adapter(folder, prefix=None, adapter_name=_ADAPTER, weight_name=name)
    else:
        family.pipeline.load_lora_weights(folder, adapter_name=_ADAPTER, weight_name=name, use_safetensors=True)
    given = sum(key.endswith(_A_SUFFIXES) for key in keys)
    layers = [module for model in models for module in model.modules() if isinstance(module, LoraLayer)]
    found = sum(_ADAPTER in layer.lora_A for layer in layers)
    if found < given:
        # diffusers only logs it.
        raise ValueError(f"{given - found} of the {given} layers that the file adapts are not in this pipeline")
