"""`GradProjConfig`: a `LoraConfig` that also says what must not be learned."""

from __future__ import annotations

import numbers
import operator
import os
import warnings
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, TaskType
from peft.utils import PeftType

from .base_models import BaseModel
from .basis import ConceptBasis
from .errors import AdapterFolderError, ConceptBasisError, GradProjConfigError
from .escaping import ESCAPING_OPTIONS
from .files import read_json_object
from .online import ONLINE_OPTIONS, check_options
from .probes import ConceptProbes, check_loss_targets
from .registration import register
from .untrusted import shown

__all__ = ["GradProjConfig", "own_settings"]

_Path = str | os.PathLike[str]

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""For these `get_peft_model` trains the model's head in full."""

_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Those that leave the base weights as they are, and A and B as they were injected."""

_COUNTS = ("probe_every", "probe_batch_size", "probe_history", "probe_seed")
_NUMBERS = ("strength", "restore", "negative_guidance")

_SHOWN_PARTS = 8
"""So many uncovered parts are named in a message; a model may have hundreds of layers."""


@dataclass
class GradProjConfig(LoraConfig):
    """Configuration of a LoRA adapter whose training is projected away from a concept.

    Takes everything that [`~peft.LoraConfig`] takes, except what would escape the projection: DoRA, biases,
    `modules_to_save`, trainable tokens or parameters, LoRA variants, initialisations that change the base model, and
    the task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS, for which PEFT trains the model's head.

    The defaults are meant for probes beside masks, under which the loss does not count where the concept is. Without
    masks they keep next to nothing out of pictures; take `probe_every=4, probe_batch_size=8, probe_history=8`, which
    keep out most of it, at a cost (docs/limits.md).

    Args:
        concept_basis (`ConceptBasis`, path or Hub id, *optional*):
            Per adapted layer, the subspaces that the adapter must not touch (subspace projection).
        concept_probes (`ConceptProbes`, path or Hub id, *optional*):
            Frozen model inputs that show the concept in the training distribution (online projection).
        strength (`float`):
            The share alpha, in [0, 1], of the component that is removed. Only 1 gives a guarantee.
        rule (`"half-space"` or `"orthogonal"`):
            How the probes correct a step. `half-space` projects the step such that the drift on the probes does not
            grow; `orthogonal` is the rule of arXiv 2512.11194, kept for reproduction.
        probe_every (`int`):
            A step is corrected every so many optimizer steps.
        probe_batch_size (`int`):
            Probes per correction, over all processes.
        restore (`float`):
            The share kappa, in [0, 1], of the drift that a corrected step takes back.
        probe_history (`int`):
            How many recent half-spaces a correction satisfies. Each that is kept holds two bytes a parameter, half
            as much as an adapter in float32, and of an adapter in float64 as much as that.
        negative_guidance (`float`):
            How far past the base model's outputs, away from what would be learned of the concept, the outputs on the
            probes are drawn, in multiples eta >= 0 of the base model's errors. At 0 they are drawn to the base model's.
            Needs probes with `loss_targets`, as `gradproj fit` makes of pictures; for others, and with
            `rule="orthogonal"`, it has no effect.
        probe_seed (`int`):
            Seed of the choice of probes.
        uncovered (`"error"`, `"warn"` or `"ignore"`):
            What to do about parts of the adapter that the projection does not cover. What was let through is recorded
            in what is published.

    Raises:
        GradProjConfigError: If a value is out of range, if neither basis nor probes are given, or if something is
            asked for that escapes the projection.
        ConceptBasisError: If the basis cannot be read.
        ConceptDataError: If the probes cannot be read, or have no `loss_targets` and `rule="orthogonal"`.
    """

    # InitVar and not fields: PEFT compares, copies and serialises a config's fields, none of which tensors survive.
    concept_basis: InitVar[ConceptBasis | _Path | None] = None
    concept_probes: InitVar[ConceptProbes | _Path | None] = None
    strength: float = field(default=1.0, metadata={"help": "Share of the concept component that is removed."})
    rule: Literal["half-space", "orthogonal"] = field(
        default="half-space", metadata={"help": "How the concept probes correct a step."}
    )
    probe_every: int = field(default=8, metadata={"help": "A step is corrected every so many optimizer steps."})
    probe_batch_size: int = field(default=2, metadata={"help": "Concept probes per correction."})
    restore: float = field(default=0.5, metadata={"help": "Share of the drift that a corrected step takes back."})
    probe_history: int = field(default=1, metadata={"help": "Recent half-spaces that a correction satisfies."})
    negative_guidance: float = field(
        default=0.0, metadata={"help": "How far past the base model's outputs those on the probes are drawn."}
    )
    probe_seed: int = field(default=0, metadata={"help": "Seed of the choice of concept probes."})
    uncovered: Literal["error", "warn", "ignore"] = field(
        default="error", metadata={"help": "What to do about parts that the projection does not cover."}
    )

    def __post_init__(
        self, concept_basis: ConceptBasis | _Path | None, concept_probes: ConceptProbes | _Path | None
    ) -> None:
        super().__post_init__()
        self.peft_type = register()
        # mypy knows an InitVar only as an argument.
        self.concept_basis = _load(ConceptBasis, concept_basis)  # type: ignore[attr-defined]
        self.concept_probes = _load(ConceptProbes, concept_probes)  # type: ignore[attr-defined]
        self.uncovered_parts: list[str] = []
        # No field either. Of the model that the adapter was injected into: diffusers clears `base_model_name_or_path`.
        self.base_model = BaseModel(None, None)
        self.check()

    def __getstate__(self) -> dict[str, Any]:
        # A process that unpickles this, such as a spawned worker, may not know the type yet.
        return {name: value for name, value in self.__dict__.items() if name != "peft_type"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, peft_type=register())

    def check(self) -> None:
        """Refuse values out of range, and refuse, warn of, or note what escapes the projection, as `uncovered` says.

        Once when the config is made and once before an adapter is injected: PEFT, TRL and users set options in between,
        and what is refused only afterwards would leave an adapter that trains without projection.

        Raises:
            GradProjConfigError: If a value is out of range, or if something escapes and `uncovered="error"`; it names
                them. Whatever `uncovered` says, if a concept basis is given and `init_lora_weights` is an
                initialisation that it would spoil.
            ConceptDataError: If the probes have no `loss_targets` and `rule="orthogonal"`.
        """
        self._check_values()
        self._check_given()
        self._refuse_spoilt_start()
        self.report_uncovered(self._escaping_options())

    def _check_values(self) -> None:
        # NumPy's numbers become plain ones, which the manifest can hold.
        for names, plain, what in ((_COUNTS, operator.index, "an integer"), (_NUMBERS, _real, "a number")):
            for name in names:
                try:
                    setattr(self, name, plain(getattr(self, name)))
                except TypeError:
                    raise GradProjConfigError(f"{name} is {getattr(self, name)!r}; expected {what}.") from None
        check_options(**self.online_options())
        if self.uncovered not in ("error", "warn", "ignore"):
            raise GradProjConfigError(f"uncovered is {self.uncovered!r}; expected 'error', 'warn' or 'ignore'.")

    def _check_given(self) -> None:
        given: Any = self
        if given.concept_probes is not None and self.rule == "orthogonal":
            check_loss_targets(given.concept_probes)
        if given.concept_basis is not None or given.concept_probes is not None:
            return
        self.report_uncovered(
            ["the whole adapter (neither `concept_basis` nor `concept_probes` is given, so nothing is kept out)"]
        )

    def _escaping_options(self) -> list[str]:
        """Options that would train, or change, something that the projection does not reach."""
        escaping = {name: bool(getattr(self, name, None)) for name in ESCAPING_OPTIONS}
        if self.task_type in _TASKS_WITH_HEAD:
            # Some of PEFT's classes set the option only after they have injected the adapter.
            del escaping["modules_to_save"]
            escaping[f"modules_to_save, which PEFT sets for task_type={TaskType(self.task_type).value!r}"] = True
        escaping[f"bias={self.bias!r}"] = self.bias != "none"
        escaping[f"init_lora_weights={self.init_lora_weights!r}"] = self.init_lora_weights not in _PLAIN_INITIALISATIONS
        parts = [name for name, given in escaping.items() if given]
        basis: ConceptBasis | None = self.concept_basis  # type: ignore[attr-defined]
        ranked = [name for name, layer in (basis or {}).items() if layer.rank is not None]
        if ranked and self.init_lora_weights in (False, "orthogonal"):
            # The constraint keeps what B starts with; only if that is zero, a verifier can tell that it was kept.
            parts.append(
                f"the rank space, of layer '{ranked[0]}' among {len(ranked)}, with init_lora_weights="
                f"{self.init_lora_weights!r} (B would not start at zero along it; expected True or 'gaussian')"
            )
        return parts

    def _refuse_spoilt_start(self) -> None:
        basis: ConceptBasis | None = self.concept_basis  # type: ignore[attr-defined]
        if basis is not None and self.init_lora_weights not in _PLAIN_INITIALISATIONS:
            # PiSSA and its like take B A out of the base weights, and the projection a part of B A: the sum would no
            # longer be the base model. EVA makes A and B anew after the injection, without the basis.
            raise GradProjConfigError(
                f"init_lora_weights={self.init_lora_weights!r} cannot go with a concept basis: the adapted model would "
                "not start as the base model, or would lose the basis. Expected one of "
                f"{', '.join(map(repr, _PLAIN_INITIALISATIONS))}. With concept probes alone, uncovered='warn' lets it "
                "through."
            )

    def report_uncovered(self, parts: list[str]) -> None:
        """Refuse, warn of, or note parts that escape the projection, as `uncovered` says.

        Raises:
            GradProjConfigError: If there are any and `uncovered="error"`; it names them.
        """
        parts = [part for part in parts if part not in self.uncovered_parts]
        if not parts:
            return
        shown = parts[:_SHOWN_PARTS] + ([f"{len(parts) - _SHOWN_PARTS} more"] if len(parts) > _SHOWN_PARTS else [])
        message = f"the projection does not cover: {', '.join(shown)}. The concept could be learned there."
        if self.uncovered == "error":
            raise GradProjConfigError(
                f"{message} Leave it out of the config, or extend the concept basis to it; with uncovered='warn' it "
                "is let through and recorded in what is published."
            )
        if self.uncovered == "warn":
            warnings.warn(message, stacklevel=2)
        self.uncovered_parts.extend(parts)

    def online_options(self) -> dict[str, Any]:
        """How the concept probes correct steps, as arguments of `OnlineProjection`."""
        return {name: getattr(self, name) for name in ONLINE_OPTIONS}

    def settings(self) -> dict[str, Any]:
        """The fields that `LoraConfig` does not have, for the manifest; JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in _own_fields()}

    def to_dict(self) -> dict[str, Any]:
        """The plain LoRA that this adapter is for everybody else: `peft_type` LORA and exactly LoraConfig's keys.

        One key more, and stock PEFT warns and diffusers refuses to load the adapter.
        """
        plain = {name: value for name, value in super().to_dict().items() if name not in _own_fields()}
        if plain.get("init_lora_weights") is False:
            # Whoever loads it would get random weights in layers that are targeted and were not saved.
            plain["init_lora_weights"] = True
        return {**plain, "peft_type": PeftType.LORA}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and beside the adapter's weights the concept basis and the manifest.

        PEFT calls it after it has written the weights, which the manifest's digests and leakage are taken from. Where
        there are no weights yet, as in transformers, only the config is written; see `saving.complete_sidecars`.
        """
        from .saving import write_sidecars_of_weights

        super().save_pretrained(save_directory, **kwargs)
        write_sidecars_of_weights(self, save_directory)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Take the file's keys for this class, though the file says LORA."""
        kwargs = super().check_kwargs(**kwargs)
        kwargs.pop("peft_type", None)
        return kwargs

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The options of a plain LoRA in a file. What is ours comes out of the manifest, and from nowhere else.

        Raises:
            AdapterFolderError: If the file is malformed.
        """
        found = read_json_object(Path(path_json_file))
        plain = {f.name for f in fields(LoraConfig)} - {"runtime_config"}
        unknown = sorted(found.keys() - plain)
        if unknown:
            warnings.warn(f"{path_json_file} has options that are ignored: {shown(unknown, 300)}.", stacklevel=2)
        return {name: value for name, value in found.items() if name in plain}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> GradProjConfig:
        """The config of a saved adapter, with its concept basis and its GradProj settings.

        Args:
            pretrained_model_name_or_path: A folder or Hub id that holds a manifest beside the adapter.
            subfolder: As in [`~peft.PeftConfig.from_pretrained`].
            kwargs: As there; `concept_basis` and `concept_probes` override what is found. Probes are not published:
                give them again to go on with online projection.

        Raises:
            AdapterFolderError: If there is no manifest, it is malformed, or there is no `adapter_config.json`, which
                diffusers does not write.
        """
        from .saving import load_settings

        found = load_settings(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "adapter_config.json")):
            raise AdapterFolderError(
                f"'{folder}' has a gradproj.json but no adapter_config.json, as diffusers saves adapters. Make a "
                "GradProjConfig with the options of the training, add it with add_adapter, and load the weights with "
                "peft.set_peft_model_state_dict."
            )
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **{**found, **kwargs})


def own_settings() -> dict[str, Any]:
    """The fields that `LoraConfig` does not have, with their defaults."""
    return {f.name: f.default for f in fields(GradProjConfig) if f.name in _own_fields()}


def _own_fields() -> frozenset[str]:
    return frozenset(f.name for f in fields(GradProjConfig)) - frozenset(f.name for f in fields(LoraConfig))


def _real(given: Any) -> float:
    if not isinstance(given, numbers.Real):
        raise TypeError
    return float(given)


def _load(kind: Any, given: Any) -> Any:
    if given is None or isinstance(given, kind):
        return given
    if isinstance(given, str | os.PathLike):
        return kind.load(given)
    raise ConceptBasisError(
        f"got a {type(given).__name__} where a {kind.__name__}, a path or a Hub id was expected; make one with "
        f"`{kind.__name__}(...)` or `{kind.__name__}.load(...)`."
    )
