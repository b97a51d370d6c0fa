"""What a config and a model write beside LoRA weights, and what a config reads back."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn

from .adapter_folder import (
    DIFFUSERS_CONFIG_KEY,
    MANIFEST_NAME,
    PUBLISHED_FILES,
    WEIGHT_NAMES,
    has_adapter_weights,
    publishes_basis,
    read_settings,
    write_sidecars,
)
from .base_models import BaseModel
from .basis import BASIS_FILE_NAME, ConceptBasis
from .errors import AdapterFolderError, GradProjError
from .files import saved_checkpoints
from .folder_swap import entries, replaced_folder
from .untrusted import shown

if TYPE_CHECKING:
    from .config import GradProjConfig
    from .probes import ConceptProbes

__all__ = [
    "check_output",
    "complete_card",
    "complete_sidecars",
    "load_settings",
    "save_adapter",
    "save_sidecars",
    "write_config_sidecars",
    "write_sidecars_of_weights",
]


_SAVED_BESIDE = ("generation_config.json",)
"""What transformers saves beside the adapter of a model that generates, each time anew."""


def check_output(output_dir: str | os.PathLike[str]) -> None:
    """Refuse, for a training script's run without a basis, a folder with that of an earlier one.

    Nothing that is saved beside it would verify, which would show only at the end.

    Raises:
        AdapterFolderError: If there is one in the folder, or in a checkpoint there.
    """
    for folder in (Path(output_dir), *saved_checkpoints(output_dir)):
        if (folder / BASIS_FILE_NAME).exists():
            raise AdapterFolderError(
                f"{folder} holds a {BASIS_FILE_NAME} of an earlier run, and this one has no --concept_basis; give "
                "that, or another --output_dir."
            )


def save_sidecars(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write the concept basis and the manifest beside LoRA weights that are already in `folder`.

    `save_pretrained` of PEFT and of transformers does it by itself. Call it after diffusers' `save_lora_weights` or
    `save_lora_adapter`.

    Args:
        model: The model with the adapter.
        folder: Where its LoRA weights were saved.
        adapter_name: Which adapter.

    Raises:
        AdapterFolderError: If the model has no such GradProj adapter, or there are no LoRA weights in the folder.
    """
    write_config_sidecars(_config_of(model, adapter_name, folder), folder)


def _config_of(model: nn.Module, adapter_name: str, folder: str | os.PathLike[str]) -> GradProjConfig:
    from .config import GradProjConfig

    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, GradProjConfig):
        raise AdapterFolderError(
            f"{type(model).__name__} has no adapter '{adapter_name}' made by a GradProjConfig; nothing to write beside "
            f"the weights in '{os.fspath(folder)}'."
        )
    return config


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    save: Callable[[Path], Any] | None = None,
) -> Path:
    """Save an adapter so that a kill at any point leaves the former state of the folder or the new one.

    The stock means save into a sibling, which then takes the folder's place in one step. `save_pretrained` alone writes
    the weights in place: a kill then leaves a torn folder, which does not verify. Saves at the same time do not mix;
    the last one stays. Call it in one process of a distributed run.

    Args:
        model: The model with the adapter: a `PeftModel`, or one of transformers or diffusers.
        folder: Replaced as a whole, so it may hold nothing but a published adapter. Its model card and `images` are
            kept, a signature is not, since it is over other files.
        adapter_name: Which adapter.
        save: Saves the weights into the folder that it is given, where the model's own means do not do, such as
            `lambda stage: StableDiffusionPipeline.save_lora_weights(stage, unet_lora_layers=...)`.

    Returns:
        The folder.

    Raises:
        AdapterFolderError: If the folder holds other things, or no such adapter was saved.
    """
    folder = Path(folder)
    _config_of(model, adapter_name, folder)
    strange = sorted(entry for entry in entries(folder) if entry not in (*PUBLISHED_FILES, *_SAVED_BESIDE, "images"))
    if strange:
        raise AdapterFolderError(
            f"{folder} also holds {', '.join(strange[:5])}; it would be replaced as a whole. Give a folder of its own."
        )
    with replaced_folder(folder) as stage:
        kept = [entry for entry in ("README.md", "images") if entry in entries(folder)]
        for entry in kept:
            copy = shutil.copytree if (folder / entry).is_dir() else shutil.copy2
            copy(folder / entry, stage / entry)
        (save or (lambda path: _save_by_stock_means(model, path, adapter_name)))(stage)
        save_sidecars(model, stage, adapter_name)
    return folder


def _save_by_stock_means(model: nn.Module, stage: Path, adapter_name: str) -> None:
    from peft import PeftModel

    from .probes import adapters_as_before

    saver: Any = model
    if not isinstance(model, PeftModel):
        if hasattr(model, "save_lora_adapter"):
            saver.save_lora_adapter(str(stage), adapter_name=adapter_name)
        else:
            with adapters_as_before(model):
                # transformers saves the adapter that is active, and none where several are.
                saver.set_adapter(adapter_name)
                saver.save_pretrained(str(stage))
        return
    saver.save_pretrained(str(stage), selected_adapters=[adapter_name])
    if adapter_name != "default":
        # PEFT gives every other adapter a folder of its own.
        for path in (stage / adapter_name).iterdir():
            path.replace(stage / path.name)
        (stage / adapter_name).rmdir()


def write_config_sidecars(config: GradProjConfig, folder: str | os.PathLike[str]) -> None:
    """Write the sidecars of `config` beside the LoRA weights in `folder`."""
    basis: ConceptBasis | None = config.concept_basis  # type: ignore[attr-defined]
    probes: ConceptProbes | None = config.concept_probes  # type: ignore[attr-defined]
    given = [BaseModel(x.base_model, x.revision) for x in (basis, probes) if x is not None]
    known = [BaseModel(config.base_model_name_or_path, None), *given, config.base_model]
    name = next((each.name for each in known if each.name), None)
    # A commit of another repository would be none of this one.
    revision = next((each.revision for each in known if each.revision and each.name == name), None)
    write_sidecars(
        folder,
        basis,
        settings=config.settings(),
        base_model=name,
        revision=config.revision or revision,
        concept=probes.concept if probes is not None else "",
        uncovered=config.uncovered_parts,
    )
    _warn_of_a_lost_scale(config, Path(folder, WEIGHT_NAMES[1]))


def _warn_of_a_lost_scale(config: GradProjConfig, weights: Path) -> None:
    """Warn if diffusers would load `weights`, in its layout, at another scale than they were trained at.

    Where the file does not say, it takes alpha = r for every layer, of a stock LoRA just the same.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    sizes = [(config.r, config.lora_alpha)]
    sizes += [(ranks.get(key, config.r), alphas.get(key, config.lora_alpha)) for key in {*ranks, *alphas}]
    if all(alpha == (sqrt(rank) if config.use_rslora else rank) for rank, alpha in sizes) or not weights.is_file():
        return
    with safe_open(weights, framework="pt") as file:
        names = [*(file.metadata() or {}), *file.keys()]
    if not any(name == DIFFUSERS_CONFIG_KEY or name.endswith(".alpha") for name in names):
        warnings.warn(
            f"'{weights}' does not say with which alpha the adapter was trained, and diffusers will load it as if that "
            "were its rank, so that it acts at another scale. Give save_lora_weights the config as well, such as "
            "unet_lora_adapter_metadata=unet.peft_config['default'].to_dict(), or train with lora_alpha=r.",
            stacklevel=4,
        )


def write_sidecars_of_weights(config: GradProjConfig, folder: str | os.PathLike[str]) -> None:
    """Write the sidecars of `config` if there are weights in `folder` to bind them to; a failure is a warning."""
    if has_adapter_weights(folder):
        try:
            write_config_sidecars(config, folder)
        except (AdapterFolderError, OSError) as error:
            # The weights are there, and other adapters may be waiting to be saved. No training run that has taken days
            # is to end at a checkpoint for want of a manifest.
            warnings.warn(
                f"the weights were saved in '{os.fspath(folder)}', but no gradproj.json that fits them, so that they "
                f"cannot be verified: {error}",
                stacklevel=2,
            )
    elif Path(folder, "adapter_model.bin").is_file():
        warnings.warn(
            f"'{os.fspath(folder)}' holds the adapter as a pickle, which cannot be verified, so no gradproj.json was "
            "written. Save it with safe_serialization=True.",
            stacklevel=2,
        )
    elif any(Path(folder).glob("adapter_model-*-of-*.safetensors")):
        warnings.warn(
            f"'{os.fspath(folder)}' holds the adapter in several files, which cannot be verified, so no gradproj.json "
            "was written. Save it with a larger max_shard_size.",
            stacklevel=2,
        )


def complete_card(folder: str | os.PathLike[str], *, repo_id: str | None = None) -> None:
    """Write our section into the model card in `folder`, if there is a manifest; a card that cannot be is a warning.

    Nobody is to lose a training run, or an upload, for want of a card.

    Args:
        folder: Where an adapter was saved.
        repo_id: Where it is about to be uploaded to.
    """
    from .model_card import write_model_card
    from .verification import verify_adapter

    if not Path(folder, MANIFEST_NAME).is_file():
        return
    try:
        write_model_card(folder, verify_adapter(folder), repo_id=repo_id)
    except (GradProjError, OSError) as error:
        warnings.warn(f"the model card in '{os.fspath(folder)}' does not tell of the checks: {error}", stacklevel=2)


def complete_sidecars(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the sidecars beside what transformers' `save_pretrained` has just saved, if that was a GradProj adapter.

    It saves the active adapter, and the config before the weights.
    """
    from .config import GradProjConfig

    configs = getattr(model, "peft_config", {})
    active = model.active_adapters() if configs else []  # type: ignore[operator]
    config = configs.get(active[0]) if active else None
    if isinstance(config, GradProjConfig):
        write_sidecars_of_weights(config, folder)


def load_settings(path_or_repo_id: str, *, subfolder: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """The GradProj settings and the concept basis of a saved adapter, as keyword arguments for `GradProjConfig`.

    Raises:
        AdapterFolderError: If there is no such adapter, or its settings are none that this release knows.
    """
    folder = path_or_repo_id if subfolder is None else os.path.join(path_or_repo_id, subfolder)
    if not os.path.isdir(folder):
        folder = _download(path_or_repo_id, subfolder, kwargs)
    settings = read_settings(folder)
    if settings is None:
        raise AdapterFolderError(
            f"'{path_or_repo_id}' has no gradproj.json, so it is no GradProj adapter. Load a plain LoRA with "
            "peft.LoraConfig.from_pretrained."
        )
    settings = _known_settings(settings)
    if "concept_basis" not in kwargs and publishes_basis(folder):
        settings["concept_basis"] = ConceptBasis.load(os.path.join(folder, "concept_basis.safetensors"))
    return settings


def _known_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, if they are numbers and words of a `GradProjConfig`: others could name files, or servers, to read.

    Raises:
        AdapterFolderError: If they are not.
    """
    from .config import own_settings

    defaults = own_settings()
    for name, value in settings.items():
        expected = type(defaults.get(name))
        sound = isinstance(value, int | float) if expected is float else type(value) is expected
        if name not in defaults or not sound or isinstance(value, bool):
            raise AdapterFolderError(
                f"gradproj.json has the setting {shown(name)} = {shown(value)}, which this release does not know; "
                "expected numbers and words of a GradProjConfig. Update peft-gradproj."
            )
    return dict(settings)


def _download(repo_id: str, subfolder: str | None, kwargs: dict[str, Any]) -> str:
    """The folder in the Hub's cache with the manifest, and the basis if there is one and none is given."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

    options = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "local_files_only")}
    try:
        manifest = Path(hf_hub_download(repo_id, "gradproj.json", subfolder=subfolder, **options))
        # Not told by whether a download fails: then a fault of the network would switch projection off.
        if "concept_basis" not in kwargs and publishes_basis(manifest.parent):
            # Of the commit that the manifest is of; someone may publish meanwhile.
            options["revision"] = manifest.parents[len(PurePosixPath(subfolder or "").parts)].name
            hf_hub_download(repo_id, "concept_basis.safetensors", subfolder=subfolder, **options)
    except (HTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise AdapterFolderError(
            f"no GradProj adapter at '{repo_id}': {error}. Expected a folder or a Hub id with a gradproj.json."
        ) from error
    return str(manifest.parent)
