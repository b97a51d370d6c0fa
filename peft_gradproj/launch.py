"""Run a training script that nobody edited, with gradient projection.

Every `LoraConfig` that the script adds to a model *for training* becomes a `GradProjConfig`: those given to
`add_adapter` of diffusers, of transformers and of PEFT, to `peft.get_peft_model` and `PeftModel`, and those of adapters
that `PeftModel.from_pretrained` and `load_adapter` load as trainable. What the script loads to sample or to evaluate
stays a plain LoRA: loaders call none of these functions, or say that it is not trained, which is why they are wrapped,
and not `LoraConfig`. A LoRA that gets into a model in another way, as by `inject_adapter_in_model`, is refused when an
optimizer is about to step it.

Concept basis, manifest and model card are written beside each set of weights that the script saves, checkpoints
included, before the script's own upload; a card that the script writes itself gets our section when it is uploaded, and
checkpoints stay at home.

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
import operator
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
from weakref import WeakSet

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

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

_ADDING = (
    "add_adapter (diffusers, transformers), get_peft_model, and PeftModel with add_adapter, or with from_pretrained or "
    "load_adapter and is_trainable=True"
)

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
        GradProjConfigError: If neither basis, probes nor markers are given, or the script trained no LoRA that could be
            projected, or trained on what cannot be masked; or if it makes a `GradProjConfig` itself.
        ConceptBasisError: If the basis does not fit the script's model, by names or widths.
        ConceptDataError: If the script's model cannot be run on the probes, or is not the one that they were made with;
            or if its latents are not those of the markers.
    """
    run = LaunchedRun.from_options(options)
    if not module and not Path(script).is_file():
        raise GradProjConfigError(f"there is no script at '{script}'. For a module, give its name with --module.")
    with run.watching():
        exited = _run_script(script, arguments, module=module)
    if exited and not run.trained and {"-h", "--help"} & {*arguments}:
        return
    run.check(script)
    if run.masks is not None:
        _say(str(run.masks))


def _say(line: str) -> None:
    """One line for the user, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"gradproj: {line}", file=sys.stderr, flush=True)


def _run_script(script: str, arguments: Sequence[str], *, module: bool) -> bool:
    """Run it as `__main__`; whether it ended by an exit of its own, without an error."""
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
        return True
    finally:
        sys.argv, sys.path[:] = argv, path
    return False


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

    adapted: WeakSet[nn.Module] = field(default_factory=WeakSet)
    """The models that a LoRA was injected into, in whatever way."""

    trained: bool = False
    """Whether an optimizer has taken a step."""

    _checked: WeakSet[torch.optim.Optimizer] = field(default_factory=WeakSet)
    """The optimizers that have stepped since the last LoRA was injected."""

    _adds: bool = False
    """Whether a wrapped function runs, which may call others."""

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
                f"'{script}' has ended without a LoRA that could be projected: it called none of {_ADDING}, with a "
                "LoraConfig for the model of the basis or probes. What it trained, if anything, is unprotected."
            )
        if self.masks is not None and not self.masks.passes:
            raise GradProjConfigError(
                f"'{script}' has ended without a training pass that was masked: it trained no diffusion model with a "
                "LoRA, or none at all. What it trained, if anything, is without masks."
            )

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse the first step of a LoRA that is neither projected nor let through, or is trained without masks."""
        if optimizer in self._checked:
            return
        first, self.trained = not self.trained, True
        for model in self.adapted:
            self._check_step_of(model, _stepped_configs(model, optimizer))
        self._checked.add(optimizer)
        if first and self.projects and not self.configs:
            warnings.warn(
                "the script takes a first step, and no LoRA that could be projected was added: it has called none of "
                f"{_ADDING}. If it adds none, what it trains is unprotected, and it will end with an error.",
                stacklevel=2,
            )

    def _check_step_of(self, model: nn.Module, configs: list[Any]) -> None:
        kind = type(model).__name__
        if configs and self.masks is not None and not self.masks.passes:
            raise GradProjConfigError(
                f"the script takes a step of a LoRA on a {kind}, after no training pass that could be masked. Expected "
                f"a diffusion model that was given its LoRA by one of {_ADDING}. Leave --concept-markers out to train "
                "without masks."
            )
        for config in configs if self.projects else ():
            if isinstance(config, GradProjConfig):
                self._check_made(config)
            elif f"the LoRA on {kind}" not in self.uncovered:
                self._let_through(
                    model, f"it was added in a way that is not projected. Expected one of {_ADDING}, with a LoraConfig."
                )

    # Configs

    def converted(self, config: Any, model: nn.Module) -> Any:
        """The `GradProjConfig` in the place of a script's `LoraConfig`; other configs as they are."""
        if self.masks is not None and not isinstance(model, _transformers_model()):
            self.masks.watch(model)
        if not self.projects or not isinstance(config, LoraConfig):
            return config
        if isinstance(config, GradProjConfig):
            self._check_made(config)
            return config
        names = {name for name, _ in model.named_modules()}
        if self._is_for(model, names):
            self.base_model = self.base_model or identify(model).name
            if self.probes is not None:
                _check_probes(self.probes, model)
            return self._projected(config, self.basis, self.probes)
        return self._converted_text_encoder(config, model, names)

    def _check_made(self, config: GradProjConfig) -> None:
        """Refuse one that is not of the launcher's making."""
        # Basis and probes are no fields of the dataclass, which leaves them out of comparisons.
        parts = operator.attrgetter("concept_basis", "concept_probes")
        if not any(config == made and parts(config) == parts(made) for made in self.configs):
            raise GradProjConfigError(
                "the script makes a GradProjConfig itself, with a basis or probes of its own, which those of the "
                "launcher would not replace. Run it without the launcher and give it the files as it expects them, or "
                "give the launcher nothing but --concept-markers."
            )

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
        self._let_through(model, self._foreign(prefix))
        return config

    def _projected(
        self, config: LoraConfig, basis: ConceptBasis | None, probes: ConceptProbes | None
    ) -> GradProjConfig:
        given = {f.name: getattr(config, f.name) for f in fields(LoraConfig)}
        made = GradProjConfig(**given, **self.options, concept_basis=basis, concept_probes=probes)
        self.configs.append(made)
        return made

    def _let_through(self, model: nn.Module, reason: str) -> None:
        kind = type(model).__name__
        if self.options.get("uncovered", "error") == "error":
            raise GradProjConfigError(
                f"the script trains a LoRA on a {kind}, but {reason} With --uncovered=warn it is trained without "
                "projection, and that is recorded in what is published."
            )
        if self.options["uncovered"] == "warn":
            warnings.warn(f"a LoRA on a {kind} is trained without projection: {reason}", stacklevel=2)
        self.uncovered.append(f"the LoRA on {kind}")

    def _foreign(self, prefix: str) -> str:
        basis = [] if self.basis is None else [f"the basis is for {next(iter(self.basis))}, ..."]
        probes = [] if self.probes is None else [f"the probes are inputs named {', '.join(self.probes.inputs)}"]
        return (
            f"{' and '.join(basis + probes)} of another model. Fit them on this one; layers of a text encoder that is "
            f"trained beside it have the prefix '{prefix}' in the basis."
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
            hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self.check_step(optimizer))
            stack.callback(hook.remove)
            for owner, name, wrap in self._wraps():
                original = inspect.getattr_static(owner, name)
                stack.callback(setattr, owner, name, original)
                setattr(owner, name, wrap(getattr(owner, name)))
            yield

    def _wraps(self) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
        import peft
        from huggingface_hub import HfApi, hf_api
        from peft.tuners.tuners_utils import BaseTuner
        from transformers.integrations.peft import PeftAdapterMixin as TransformersMixin

        # Where it is exported, and where it is defined, which some import it from.
        for module in (peft, peft.mapping_func):
            yield module, "get_peft_model", self._adding
        for kind in {peft.PeftModel, *peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
            for name in {"__init__", "add_adapter"} & vars(kind).keys():
                yield kind, name, self._adding_or_loading
        yield BaseTuner, "inject_adapter", self._injecting
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
        model, config, *_ = inspect.signature(original).parameters

        def convert(given: dict[str, Any]) -> None:
            given[config] = self.converted(given[config], given[model])

        return self._converting(original, convert)

    def _adding_or_loading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of a method of `PeftModel`, whose config says whether the adapter is only loaded."""

        def convert(given: dict[str, Any]) -> None:
            config, model = given["peft_config"], given.get("model")
            if config.inference_mode:
                return
            # Without a model it is `add_adapter`.
            base = given["self"].get_base_model() if model is None else model
            given["peft_config"] = self.converted(config, base)
            if model is None:
                _check_combines(given["self"], given["peft_config"])

        return self._converting(original, convert)

    def _converting(
        self, original: Callable[..., Any], convert: Callable[[dict[str, Any]], None]
    ) -> Callable[..., Any]:
        """Of a function that adds an adapter, called with converted arguments, unless another such has called it."""
        signature = inspect.signature(original)

        @wraps(original)
        def add(*args: Any, **kwargs: Any) -> Any:
            if self._adds:
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            self._adds = True
            try:
                convert(bound.arguments)
                return original(*bound.args, **bound.kwargs)
            finally:
                self._adds = False

        return add

    def _injecting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def inject(tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.adapted.add(model)
            self._checked.clear()
            return original(tuner, model, *args, **kwargs)

        return inject

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


def _stepped_configs(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """The configs of the LoRAs on a model of which an optimizer trains parameters."""
    given = (parameter for group in optimizer.param_groups for parameter in group["params"])
    stepped = {id(parameter) for parameter in given if parameter.requires_grad}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    adapters = {
        name.partition(".")[0] for part in factors for name, weight in part.named_parameters() if id(weight) in stepped
    }
    configs: Any = getattr(model, "peft_config", {})
    return [config for name, config in configs.items() if name in adapters]


def _check_combines(model: Any, config: Any) -> None:
    """PEFT combines no adapters of different types, which it says without a hint of what to do."""
    if isinstance(config, GradProjConfig) and model.peft_type != config.peft_type:
        raise GradProjConfigError(
            "the script adds a LoRA for training beside a plain LoRA that it has only loaded, and PEFT has no model "
            "with both. Merge the loaded one into the base model, or train on a model of its own."
        )


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
