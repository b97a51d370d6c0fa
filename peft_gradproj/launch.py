"""Run a training script that nobody edited, with gradient projection.

Every `LoraConfig` that the script adds to a model *for training* becomes a `GradProjConfig`: those given to
`add_adapter` of diffusers and of transformers, to `peft.get_peft_model`, and those of adapters that
`PeftModel.from_pretrained` loads as trainable. What the script loads to sample or to evaluate stays a plain LoRA:
loaders call none of these functions, which is why they are wrapped, and not `LoraConfig`. Concept basis, manifest and
model card are written beside each set of weights that the script saves, checkpoints included, before the script's own
upload; a card that the script writes itself gets our section when it is uploaded, and checkpoints stay at home.

With concept markers, the loss of diffusion models does not count where they find the concept, whatever the script's
loss is (`loss_masks`). Given alone, adapters stay plain LoRA.

    gradproj launch --concept-basis logo.safetensors train_text_to_image_lora.py --rank=16 ...
    accelerate launch -m peft_gradproj.launch --concept-basis logo.safetensors train_text_to_image_lora.py ...

A basis names the layers of the model that it was fitted on, as they are called there. Those of text encoders, which
some scripts train beside a diffusion model, have the prefix `text_encoder.`, `text_encoder_2.`, ... that diffusers
saves them under.
"""

from __future__ import annotations

import inspect
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from .adapter_folder import write_sidecars
from .base_models import identify
from .basis import ConceptBasis
from .concept_markers import ConceptMarkers
from .config import GradProjConfig
from .errors import AdapterFolderError, ConceptDataError, GradProjConfigError
from .loss_masks import LossMasks
from .probes import ConceptProbes, adapters_disabled, call_model, evaluation_mode, placement
from .saving import complete_card

__all__ = ["MAX_BASE_DISTANCE", "LaunchedRun", "launch"]

MAX_BASE_DISTANCE = 0.5
"""How far, relatively, the base model's outputs may be from the targets of the probes; half precision is below 0.1."""


def launch(script: str, arguments: Sequence[str] = (), *, module: bool = False, **options: Any) -> None:
    """Run a training script with every LoRA that it trains projected, its loss masked, or both.

    What is said of masks goes to standard error, from the first process.

    Args:
        script: Path of the script, or, with `module`, the name of a module.
        arguments: Its command line.
        module: Whether `script` is the name of a module, as for `python -m`.
        **options: The fields of :class:`~peft_gradproj.GradProjConfig` that `LoraConfig` does not have, and
            `concept_markers`, as :class:`~peft_gradproj.ConceptMarkers`, a path or a Hub id.

    Raises:
        GradProjConfigError: If neither basis, probes nor markers are given, or the script added no LoRA that could be
            projected, or trained on what cannot be masked.
        ConceptBasisError: If the basis does not fit the script's model, by names or widths.
        ConceptDataError: If the script's model cannot be run on the probes, or is not the one that they were made with;
            or if its latents are not those of the markers.
    """
    run = LaunchedRun.from_options(options)
    if not module and not Path(script).is_file():
        raise GradProjConfigError(f"there is no script at '{script}'. For a module, give its name with --module.")
    with run.watching():
        _run_script(script, arguments, module=module)
    run.check(script)
    if run.masks is not None:
        _say(str(run.masks))


def _say(line: str) -> None:
    """One line for the user, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"gradproj: {line}", file=sys.stderr, flush=True)


def _run_script(script: str, arguments: Sequence[str], *, module: bool) -> None:
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    try:
        if module:
            # `python -m` looks in the current folder first; the `gradproj` command has that of the command there.
            sys.path.insert(0, os.getcwd())
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, sys.path[:] = argv, path


@dataclass
class LaunchedRun:
    """What a script trains under projection, from the moment that it adds a LoRA."""

    basis: ConceptBasis | None
    probes: ConceptProbes | None
    options: dict[str, Any]
    """Further options of `GradProjConfig`."""

    masks: LossMasks | None = None
    """What masks the loss, if markers are given."""

    configs: list[GradProjConfig] = field(default_factory=list)
    """Those that were made of the script's."""

    uncovered: list[str] = field(default_factory=list)
    """What was let through although the projection does not cover it."""

    base_model: str | None = None
    """Name of the first model that a LoRA was added to."""

    text_encoders: int = 0
    """How many models were taken for text encoders so far."""

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> LaunchedRun:
        """Load basis, probes and markers, and check the options before the script runs."""
        rest = dict(options)
        markers = rest.pop("concept_markers", None)
        basis, probes = rest.pop("concept_basis", None), rest.pop("concept_probes", None)
        # A config that is thrown away, for its checks and what it loads. Markers need neither basis nor probes.
        alone = {"uncovered": "ignore"} if basis is None and probes is None and markers is not None else {}
        given: Any = {"concept_basis": basis, "concept_probes": probes, "target_modules": ["any"]}
        config: Any = GradProjConfig(**{**rest, **given, **alone})
        if markers is not None and not isinstance(markers, ConceptMarkers):
            markers = ConceptMarkers.load(markers)
        masks = None if markers is None else LossMasks(markers, _say)
        return cls(config.concept_basis, config.concept_probes, rest, masks)

    @property
    def projects(self) -> bool:
        """Whether a basis or probes are given, and not markers alone."""
        return self.basis is not None or self.probes is not None

    def check(self, script: str) -> None:
        """Raise an error if nothing was projected, or masked, that should have been."""
        if self.projects and not self.configs:
            raise GradProjConfigError(
                f"'{script}' has ended without a LoRA that could be projected: it called none of add_adapter "
                "(diffusers, transformers), get_peft_model and PeftModel.from_pretrained(is_trainable=True) with a "
                "LoraConfig for the model of the basis or probes. What it trained, if anything, is unprotected."
            )
        if self.masks is not None and not self.masks.passes:
            raise GradProjConfigError(
                f"'{script}' has ended without a training pass that was masked: it trained no diffusion model with a "
                "LoRA, or none at all. What it trained, if anything, is without masks."
            )

    # Configs

    def converted(self, config: Any, model: nn.Module) -> Any:
        """The `GradProjConfig` in the place of a script's `LoraConfig`; other configs as they are."""
        if self.masks is not None and not isinstance(model, _transformers_model()):
            self.masks.watch(model)
        if not self.projects or not isinstance(config, LoraConfig) or isinstance(config, GradProjConfig):
            return config
        names = {name for name, _ in model.named_modules()}
        if self._is_for(model, names):
            self.base_model = self.base_model or identify(model).name
            if self.probes is not None:
                _check_probes(self.probes, model)
            return self._projected(config, self.basis, self.probes)
        return self._converted_text_encoder(config, model, names)

    def _is_for(self, model: nn.Module, names: set[str]) -> bool:
        """Whether basis and probes are meant for `model`; if it is not theirs, they are refused where they are used."""
        if not isinstance(model, _transformers_model()):
            return True
        by_name = self.basis is not None and any(name in names for name in self.basis)
        return by_name or (self.probes is not None and _takes(model, self.probes.inputs))

    def _converted_text_encoder(self, config: LoraConfig, model: nn.Module, names: set[str]) -> Any:
        self.text_encoders += 1
        prefix = f"text_encoder{'' if self.text_encoders == 1 else f'_{self.text_encoders}'}."
        part = None if self.basis is None else self.basis.part(prefix)
        if part is not None and any(name in names for name in part):
            return self._projected(config, part, None)
        self._let_through(model, prefix)
        return config

    def _projected(
        self, config: LoraConfig, basis: ConceptBasis | None, probes: ConceptProbes | None
    ) -> GradProjConfig:
        given = {f.name: getattr(config, f.name) for f in fields(LoraConfig)}
        made = GradProjConfig(**given, **self.options, concept_basis=basis, concept_probes=probes)
        self.configs.append(made)
        return made

    def _let_through(self, model: nn.Module, prefix: str) -> None:
        kind = type(model).__name__
        if self.options.get("uncovered", "error") == "error":
            raise GradProjConfigError(f"the script trains a LoRA on a {kind}, but {self._foreign(prefix)}")
        if self.options["uncovered"] == "warn":
            warnings.warn(f"a LoRA on a {kind} is trained without projection: {self._foreign(prefix)}", stacklevel=2)
        self.uncovered.append(f"the LoRA on {kind}")

    def _foreign(self, prefix: str) -> str:
        basis = [] if self.basis is None else [f"the basis is for {next(iter(self.basis))}, ..."]
        probes = [] if self.probes is None else [f"the probes are inputs named {', '.join(self.probes.inputs)}"]
        return (
            f"{' and '.join(basis + probes)} of another model. Fit them on this one; layers of a text encoder that is "
            f"trained beside it have the prefix '{prefix}' in the basis. With --uncovered=warn it is trained without "
            "projection, and that is recorded in what is published."
        )

    # Sidecars

    def write_sidecars(self, folder: Any) -> None:
        """Write basis, manifest and model card beside the weights that the script has just saved in `folder`."""
        if not self.configs:
            return
        uncovered = [part for config in self.configs for part in config.uncovered_parts] + self.uncovered
        basis, probes = self.basis, self.probes
        known = basis if basis is not None and basis.base_model else probes
        try:
            write_sidecars(
                folder,
                basis,
                settings=self.configs[0].settings(),
                base_model=(known.base_model if known is not None else None) or self.base_model,
                revision=known.revision if known is not None and known.base_model else None,
                concept=probes.concept if probes is not None else "",
                uncovered=list(dict.fromkeys(uncovered)),
            )
        except (AdapterFolderError, OSError) as error:
            # The weights are there. A training run that has taken days is not lost for want of a manifest.
            warnings.warn(f"no gradproj.json beside the weights in '{folder}': {error}", stacklevel=2)
        else:
            complete_card(folder)

    # Wraps

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap the functions by which scripts add adapters for training and save them."""
        with ExitStack() as stack:
            if self.masks is not None:
                stack.callback(self.masks.stop)
            for owner, name, wrap in self._wraps():
                original = inspect.getattr_static(owner, name)
                stack.callback(setattr, owner, name, original)
                setattr(owner, name, wrap(getattr(owner, name)))
            yield

    def _wraps(self) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
        import peft
        from huggingface_hub import HfApi, hf_api
        from transformers.integrations.peft import PeftAdapterMixin as TransformersMixin

        # Where it is exported, and where it is defined, which some import it from.
        for module in (peft, peft.mapping_func):
            yield module, "get_peft_model", self._adding
        yield peft.PeftModel, "from_pretrained", self._resuming
        yield TransformersMixin, "add_adapter", self._adding
        yield hf_api, "upload_folder", self._uploading
        yield HfApi, "upload_folder", self._uploading
        if find_spec("diffusers") is not None:
            from diffusers import AutoencoderKL
            from diffusers.loaders.lora_base import LoraBaseMixin
            from diffusers.loaders.peft import PeftAdapterMixin

            if self.masks is not None:
                yield AutoencoderKL, "encode", self.masks.marking
            yield PeftAdapterMixin, "add_adapter", self._adding
            yield PeftAdapterMixin, "save_lora_adapter", self._saving
            yield LoraBaseMixin, "write_lora_layers", lambda original: staticmethod(self._saving(original))

    def _adding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of a function whose first arguments are the model and the config, whatever it calls them."""
        signature = inspect.signature(original)
        model, config, *_ = signature.parameters

        @wraps(original)
        def add(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.arguments[config] = self.converted(bound.arguments[config], bound.arguments[model])
            return original(*bound.args, **bound.kwargs)

        return add

    def _resuming(self, original: Callable[..., Any]) -> Any:
        @wraps(original)
        def from_pretrained(cls: Any, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
            names = ("adapter_name", "is_trainable", "config")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if given.get("is_trainable"):
                # As PEFT looks for it: in a subfolder, at a revision, with a token.
                found = {name: value for name, value in given.items() if name not in names}
                config = given.get("config") or PeftConfig.from_pretrained(model_id, **found)
                kwargs = {**kwargs, **given, "config": self.converted(config, model)}
                args = args[len(names) :]
            return original.__func__(cls, model, model_id, *args, **kwargs)  # type: ignore[attr-defined]

        return classmethod(from_pretrained)

    def _saving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @wraps(original)
        def save(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.write_sidecars(signature.bind(*args, **kwargs).arguments["save_directory"])
            return result

        return save

    def _uploading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @wraps(original)
        def upload(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            # Scripts write a card of their own after they have saved, over what is there.
            complete_card(given["folder_path"], repo_id=given["repo_id"])
            # In checkpoints are optimizer states, some of them pickles.
            ignored = given.get("ignore_patterns") or []
            given["ignore_patterns"] = [*([ignored] if isinstance(ignored, str) else ignored), "checkpoint-*"]
            return original(*bound.args, **bound.kwargs)

        return upload


def _transformers_model() -> type:
    """What text encoders and language models are, and denoisers are not."""
    from transformers import PreTrainedModel

    return PreTrainedModel


def _takes(model: nn.Module, inputs: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return all(name.partition(".")[0] in parameters for name in inputs)


def _check_probes(probes: ConceptProbes, model: nn.Module) -> None:
    """Refuse probes of another model: other inputs, other outputs, or, as far as it shows, other weights."""
    kind, batch = type(model).__name__, probes.batch([0], *placement(model))
    advice = "Were the probes collected on another model? Collect them on the one that is trained."
    try:
        with torch.no_grad(), evaluation_mode(model), adapters_disabled(model):
            output = call_model(model, batch.inputs, probes.run_model).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConceptDataError(f"{kind} cannot be run on the concept probes: {error}. {advice}") from error
    if batch.targets is None:
        return
    if output.shape != batch.targets.shape:
        raise ConceptDataError(
            f"{kind} gives outputs of shape {tuple(output.shape[1:])} on the concept probes, whose targets have "
            f"{tuple(batch.targets.shape[1:])}. {advice}"
        )
    distance = float((output - batch.targets).norm() / batch.targets.norm().clamp_min(1e-12))
    if distance > MAX_BASE_DISTANCE:
        raise ConceptDataError(
            f"the outputs of {kind} on the concept probes differ from their targets by {distance:.0%}: it has other "
            f"weights than the base model of the probes. {advice}"
        )


if __name__ == "__main__":
    from .cli import main

    sys.argv[:] = [sys.argv[0], "launch", *sys.argv[1:]]
    main()
