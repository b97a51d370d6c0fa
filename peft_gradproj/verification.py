"""Checking a published adapter from its files alone: no base model, no GPU, and nothing believed.

Two groups of checks are made here. *Integrity*: the files are the ones that the manifest binds, of sound dtypes,
shapes and values, and a plain LoRA for the base model that they name. *Orthogonality*: every adapted layer is covered
by a basis that is one, the leakage recomputed from the weights is rounding error, and what the publisher claims is
what we find. They say that the adapter does not act along the concept basis. They do not say that the basis is the
concept's, which the verifier's own basis can tell, nor that the concept cannot be generated.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from ._version import __version__
from .adapter_folder import (
    ADAPTER_CONFIG_NAME,
    BASIS_NAME,
    CHECKABLE_SPACES,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    WEIGHT_NAMES,
    AdapterFolder,
    BasisFile,
    LoraLayers,
    LoraPair,
    layer_leakage,
    locate_adapter_folder,
    lora_configs,
    read_adapter_folder,
    read_basis,
    rival_weights,
)
from .errors import AdapterFolderError, BehaviourError, ConceptBasisError, ConceptDataError
from .escaping import ESCAPING_OPTIONS, NEUTRAL_INITS, PLAIN_NAME, regular_expressions
from .files import is_hub_id
from .projection import LEAST_REMAINDER, dtype_name, orthonormality_error, principal_cosines
from .untrusted import printable, shown

if TYPE_CHECKING:
    from .basis import ConceptBasis
    from .behaviour import BehaviourResult
    from .contrast import ContrastBatches
    from .probes import ConceptProbes

__all__ = ["TOLERANCES", "Check", "LayerResult", "VerificationReport", "unchecked_sarif", "verify_adapter"]

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 5e-3,
}
"""Largest leakage that rounding explains, by the dtype that a factor is stored in."""

ORTHONORMALITY_TOLERANCE = 1e-4
MAX_SCALE = 1e4
"""Largest factor alpha / r that a trained LoRA plausibly has; beyond it, tiny factors hide what they do."""

MAX_ROWS = 20
"""How many findings of one check a person is shown."""

MAX_TEXT = 500
"""How many characters of a name or a finding a person is shown; strangers can make them megabytes long."""

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

VERIFIED, NOT_VERIFIED, UNCHECKED = "verified", "not verified", "could not be checked"

Bases = Mapping[str, Mapping[str, Tensor]]


# The report


@dataclass(frozen=True)
class Check:
    """One thing that was checked: of the whole adapter, or, where it failed, of one layer."""

    name: str
    group: str
    """`integrity`, `orthogonality`, `behaviour` or `signature`."""

    passed: bool | None
    """`None` if it could not be checked."""

    detail: str
    layer: str | None = None
    value: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class LayerResult:
    """What was found in one adapted layer."""

    name: str
    rank: int
    dtype: str
    tolerance: float
    leakage: dict[str, float]
    """By space, against the published basis, or the verifier's where none is published."""


@dataclass(frozen=True)
class VerificationReport:
    """The answer of :func:`verify_adapter`."""

    source: str
    """The folder or repository as it was asked for."""

    commit: str | None
    """The commit that was checked, for a repository of the Hub."""

    checks: tuple[Check, ...]
    layers: tuple[LayerResult, ...] = ()
    notes: tuple[str, ...] = field(default=())
    """What these checks cannot tell about this adapter."""

    behaviour: BehaviourResult | None = None
    """The figures of the drift, where it was measured; the larger ones, where both layouts are published."""

    @property
    def status(self) -> str:
        """`verified`, `not verified`, or `could not be checked` where nothing failed but something was out of reach."""
        results = [check.passed for check in self.checks]
        if False in results:
            return NOT_VERIFIED
        return VERIFIED if results and None not in results else UNCHECKED

    @property
    def ok(self) -> bool:
        """Whether everything was checked and nothing failed."""
        return self.status == VERIFIED

    @property
    def exit_status(self) -> int:
        """0 verified, 1 not verified, 2 could not be checked."""
        return {VERIFIED: 0, NOT_VERIFIED: 1, UNCHECKED: 2}[self.status]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if check.passed is False)

    def to_dict(self) -> dict[str, Any]:
        """The report, JSON-able."""
        return {
            "status": self.status,
            "ok": self.ok,
            "source": self.source,
            "commit": self.commit,
            "checks": [_finite(asdict(check)) for check in self.checks],
            "layers": [{**asdict(layer), "leakage": _finite(layer.leakage)} for layer in self.layers],
            "notes": list(self.notes),
            "behaviour": None if self.behaviour is None else _finite(asdict(self.behaviour)),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_sarif(self) -> dict[str, Any]:
        """What did not pass, in SARIF 2.1.0, as code scanners show it; JSON-able."""
        found = [check for check in self.checks if check.passed is not True]
        results = [
            {
                "ruleId": f"{check.group}/{check.name}".replace(" ", "-"),
                "level": "warning" if check.passed is None else "error",
                "message": {"text": printable(f"{check.layer}: {check.detail}" if check.layer else check.detail)},
                "locations": [
                    {
                        "physicalLocation": {"artifactLocation": {"uri": _uri(Path(self.source, MANIFEST_NAME))}},
                        "logicalLocations": [{"fullyQualifiedName": printable(check.layer or self.source)}],
                    }
                ],
            }
            for check in found
        ]
        rules = [{"id": rule} for rule in dict.fromkeys(result["ruleId"] for result in results)]
        return _sarif(rules, results, {"executionSuccessful": True})

    def render(self, width: int = 120) -> str:
        """The report as plain text, as `print` shows it."""
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=width, color_system=None).print(self)
        return stream.getvalue()

    def __str__(self) -> str:
        return self.render()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", "check", "finding", title=Text(printable(self.source)), title_justify="left")
        seen: Counter[str] = Counter()
        for check in self.checks:
            seen[check.name] += 1
            if seen[check.name] > MAX_ROWS:
                continue
            mark = {True: Text("pass", "green"), False: Text("FAIL", "bold red"), None: Text("?", "yellow")}
            where = f"{check.layer[:MAX_TEXT]}: " if check.layer else ""
            finding = printable(where + check.detail[:MAX_TEXT])
            table.add_row(mark[check.passed], Text(f"{check.group}: {check.name}"), Text(finding))
        for name, count in seen.items():
            if count > MAX_ROWS:
                table.add_row(Text("..."), Text(name), Text(f"and {count - MAX_ROWS} more; --json has all"))
        colour = {VERIFIED: "bold green", NOT_VERIFIED: "bold red", UNCHECKED: "bold yellow"}[self.status]
        lines = [Text(f"commit {self.commit}")] if self.commit else []
        notes = [Text(printable(f"Note: {note}")) for note in self.notes]
        return Group(table, *lines, *notes, Text(self.status, colour))


def unchecked_sarif(error: Exception) -> dict[str, Any]:
    """What SARIF says where there is no report: that the run failed, and why; JSON-able."""
    notification = {"level": "error", "message": {"text": printable(str(error))}}
    return _sarif([], [], {"executionSuccessful": False, "toolExecutionNotifications": [notification]})


def _uri(path: Path) -> str:
    """Relative paths stay so: scanners show what is found in the file of that name in their checkout."""
    # As bytes, since names on disk need not be text.
    return path.as_uri() if path.is_absolute() else quote(os.fsencode(path.as_posix()))


def _sarif(rules: list[Any], results: list[Any], invocation: Mapping[str, Any]) -> dict[str, Any]:
    driver = {"name": "gradproj", "version": __version__, "rules": rules}
    run = {"tool": {"driver": driver}, "results": results, "invocations": [dict(invocation)]}
    return {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; what is not finite is null, and the detail says so."""
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}


# Verification


def verify_adapter(
    path_or_repo: str | os.PathLike[str],
    *,
    basis: ConceptBasis | str | os.PathLike[str] | None = None,
    basis_tolerance: float | None = None,
    base_model: nn.Module | str | os.PathLike[str] | None = None,
    variant: str | None = None,
    probes: ConceptProbes | str | os.PathLike[str] | None = None,
    reference: ConceptProbes | str | os.PathLike[str] | None = None,
    drift_tolerance: float = 0.5,
    batch_size: int = 8,
    refit: ContrastBatches | str | os.PathLike[str] | None = None,
    refit_tolerance: float = 0.05,
    public_key: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> VerificationReport:
    """Check integrity and orthogonality of a published adapter, from its files alone, and behaviour if asked to.

    Behaviour takes a base model and concept probes: the drift on them is compared with the drift on a reference set,
    which says how much was learned at all. Without a reference set the drift is told and not judged.

    A refit takes a base model and the batches that the published basis was fitted from: it is fitted anew, by the
    recipe in its file, and has to be the same. Where it has rank or gradient spaces, or layers that the base model does
    not have, these could not be checked.

    An adapter that was trained with concept probes only, or whose basis was withheld, leaves orthogonality out of
    reach: integrity is reported and the status is `could not be checked`, unless the verifier brings a basis.

    Args:
        path_or_repo: A folder, or the id of a repository of the Hub, of which only the published files are fetched.
        basis: The verifier's own concept basis, or its file. The adapter has to be orthogonal to it as well.
        basis_tolerance: Largest leakage against the verifier's own basis, rounding error by default. Two honest fits
            of one concept differ, so that a basis which is not the published one needs a larger value.
        base_model: The base model without adapters, or the folder or Hub id of a diffusers pipeline or transformers
            model, of which no code is run.
        variant: Of its weights, such as `fp16`, if it is loaded here.
        probes: Concept probes for that model, or their file.
        reference: Probes that are free of the concept, and show what was to be learned.
        drift_tolerance: Largest drift on the probes, as a share of that on the reference set; see
            :data:`peft_gradproj.behaviour.DRIFT_TOLERANCE`.
        batch_size: Probes at a time, which bounds the memory.
        refit: The contrast batches of the published basis, or their file. Their digest has to be the one that the
            recipe names, if it names one.
        refit_tolerance: Largest sine of a principal angle between the published basis and the one that was fitted
            anew; see :data:`peft_gradproj.refit.REFIT_TOLERANCE`.
        public_key: PEM file of the key that must have signed the adapter.
        revision: Branch, tag or commit of the repository.

    Returns:
        The report; `report.ok` only if everything was checked and nothing failed.

    Raises:
        AdapterFolderError: If there is no such adapter, it is malformed, or it is refused as unsafe to read.
        ConceptBasisError: If the verifier's own basis is none.
        SignatureError: If the public key cannot be used, or the `signing` extra is not installed.
        BehaviourError: If the base model cannot be loaded, or it, the adapter and the probes or batches do not fit.
        ConceptDataError: If there are no such probes or batches.
    """
    if (base_model is None) != (probes is None and refit is None) or (reference is not None and probes is None):
        raise BehaviourError(
            "behaviour needs a base model and concept probes, a refit a base model and contrast batches; give both, or "
            "neither."
        )
    batches = None if refit is None else _contrast_batches(refit)
    own = None if basis is None else _own_basis(basis)
    path, commit = locate_adapter_folder(path_or_repo, revision=revision)
    folder = _read(path, path_or_repo, commit)
    layers = folder.layers()
    integrity = [*_check_files(folder), *_check_config(folder, layers), *_check_base(folder), *_check_tensors(layers)]
    orthogonality, results = _check_orthogonality(folder, layers, own, basis_tolerance)
    signature = [] if public_key is None else [_check_signature(folder, public_key)]
    behaviour: list[Check] = []
    figures: BehaviourResult | None = None
    # Where integrity failed, loaders of others would have to read what we refuse to.
    sound = all(check.passed for check in integrity)
    model = _base_model(folder, base_model, variant) if sound and base_model is not None else None
    if batches is not None:
        orthogonality += _check_refit(folder, layers, orthogonality, model, batches, refit_tolerance)
    if probes is not None:
        behaviour, figures = _check_behaviour(folder, layers, model, probes, reference, drift_tolerance, batch_size)
    checks = (*integrity, *orthogonality, *behaviour, *signature)
    notes = tuple(_notes(folder, own, batches is not None, public_key is not None))
    return VerificationReport(str(path_or_repo), commit, checks, tuple(results), notes, figures)


def _read(path: Path, source: str | os.PathLike[str], commit: str | None) -> AdapterFolder:
    try:
        return read_adapter_folder(path)
    except AdapterFolderError as error:
        if commit is None:
            raise
        # Not where the cache keeps it, but what was looked at.
        raise AdapterFolderError(str(error).replace(str(path), f"{source} at commit {commit}")) from error


def _check_signature(folder: AdapterFolder, public_key: str | os.PathLike[str]) -> Check:
    from .signing import check_signature

    name, passed, detail = check_signature(folder, public_key)
    return Check(name, "signature", passed, detail)


def _own_basis(basis: ConceptBasis | str | os.PathLike[str]) -> ConceptBasis:
    if not isinstance(basis, str | os.PathLike):
        return basis
    if os.path.exists(basis):
        return read_basis(basis).to_concept_basis()
    from .basis import ConceptBasis

    return ConceptBasis.load(basis)


def _contrast_batches(given: ContrastBatches | str | os.PathLike[str]) -> ContrastBatches:
    from .contrast import ContrastBatches

    return ContrastBatches.load(given) if isinstance(given, str | os.PathLike) else given


def _base_model(folder: AdapterFolder, given: nn.Module | str | os.PathLike[str], variant: str | None) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    from .behaviour import load_base_model

    named = folder.manifest["base_model"]
    revision = named["revision"] if named["id"] == str(given) else None
    return load_base_model(str(given), revision=revision, variant=variant)


def _notes(folder: AdapterFolder, own: ConceptBasis | None, refitted: bool, key_given: bool) -> Iterator[str]:
    if not key_given and os.path.lexists(folder.path / SIGNATURE_NAME):
        yield f"there is a {SIGNATURE_NAME}, but nothing says whose; give the public key that you expect."
    spaces = {space for layer in (folder.basis.layers if folder.basis else {}).values() for space in layer}
    if "gradient" in spaces:
        yield "the gradient space constrains training steps; it cannot be checked from the weights."
    if "rank" in spaces:
        yield (
            "in the rank space only B is checked, whose columns along the basis start at zero; that A kept its start "
            "there cannot be checked from the weights."
        )
    if own is not None and folder.manifest["basis"]["digest"] is not None:
        same = own.digest() == folder.manifest["basis"]["digest"]
        yield f"your basis is {'' if same else 'not '}the one that the manifest's digest names."
    if _has_expressions(folder):
        yield (
            "the config holds regular expressions, which are not run here; PEFT runs them on the names of all layers "
            "when it loads the adapter."
        )
    if refitted:
        yield "whether the contrast batches show the concept is for you to see in them; a refit does not tell."
    if folder.basis is not None and own is None and not refitted:
        yield "whether the published basis is the concept's is not checked; compare it with a basis of your own."


def _gathered(name: str, group: str, failures: Iterable[Check], summary: str, **figures: Any) -> list[Check]:
    """The failed checks under one name, or one passed check."""
    return list(failures) or [Check(name, group, True, summary, **figures)]


# Behaviour


def _check_behaviour(
    folder: AdapterFolder,
    layers: Mapping[str, LoraLayers],
    base_model: nn.Module | None,
    probes: Any,
    reference: Any,
    tolerance: float,
    batch_size: int,
) -> tuple[list[Check], BehaviourResult | None]:
    from .behaviour import load_probes, measure_behaviour

    if base_model is None:
        return [Check("drift", "behaviour", None, "not measured, since integrity failed")], None
    given = load_probes(probes), None if reference is None else load_probes(reference)
    checks: list[Check] = []
    measured: list[BehaviourResult] = []
    # Where both layouts are published, either may be loaded.
    for name, parsed in layers.items():
        pairs = _pairs_of(None if name == WEIGHT_NAMES[0] else "", parsed)
        one = replace(folder, weights={name: folder.weights[name]})
        figures, faults = measure_behaviour(one, pairs, base_model, *given, batch_size=batch_size)
        which = f"{name}: " if len(layers) > 1 else ""
        wrong = [Check("loaded", "behaviour", False, which + fault) for fault in faults]
        summary = f"the base model gets {len(pairs)} layers from {name}, and no other"
        checks += [*_gathered("loaded", "behaviour", wrong, summary), _judged_drift(figures, tolerance, which)]
        measured.append(figures)
    return checks, max(measured, key=lambda figures: figures.drift)


def _judged_drift(figures: BehaviourResult, tolerance: float, which: str) -> Check:
    drift, energy, ratio = figures.drift, figures.energy, figures.ratio
    detail = f"{which}on {figures.probes} probes the outputs move by {drift:.3g} in mean squares of {energy:.3g}"
    if not figures.same_base:
        far = figures.stored_mismatch
        return Check("drift", "behaviour", None, f"the probes were collected on another base model: off by {far:.2g}")
    if ratio is None:
        detail += "; give a reference set to judge that by how much was learned at all"
        return Check("drift", "behaviour", None, detail, value=drift)
    detail += f"; on {figures.reference_probes} of the reference set by {figures.reference_drift:.3g}"
    detail += f"; the ratio is {ratio:.3g}, expected at most {tolerance:g}"
    # Written so that NaN fails.
    return Check("drift", "behaviour", bool(ratio <= tolerance), detail, value=ratio, tolerance=tolerance)


# Integrity


def _check_files(folder: AdapterFolder) -> list[Check]:
    claimed, found = folder.claimed_files, folder.files
    digests = [
        Check("digests", "integrity", False, _difference(name, claimed[name], found[name]))
        for name in claimed
        if claimed[name] != found[name]
    ]
    unlisted = [
        Check("files", "integrity", False, f"{name} is not in the manifest; it was added afterwards")
        for name in found
        if name not in claimed
    ]
    for name in rival_weights(os.listdir(folder.path)):
        unlisted.append(Check("files", "integrity", False, f"a loader may take {name} for the adapter; remove it"))
    if (BASIS_NAME in found) != (folder.basis_published == "full"):
        unlisted.append(
            Check("files", "integrity", False, f"the manifest says of the basis {folder.basis_published!r}, but "
                  f"{BASIS_NAME} is {'there' if BASIS_NAME in found else 'missing'}")
        )  # fmt: skip
    return [
        *_gathered("digests", "integrity", digests, f"{len(found)} files are the ones that the manifest binds"),
        *_gathered("files", "integrity", unlisted, "nothing is missing or added"),
    ]


def _difference(name: str, claimed: Any, found: Any) -> str:
    if claimed.size != found.size:
        return f"{name} has {found.size:,} bytes; the manifest says {claimed.size:,}"
    return f"{name} has SHA-256 {found.sha256[:16]}...; the manifest says {claimed.sha256[:16]}..."


def _check_tensors(layers: Mapping[str, LoraLayers]) -> list[Check]:
    shapes, dtypes, values = [], [], []
    for parsed in layers.values():
        for module, fault in parsed.malformed.items():
            shapes.append(Check("shapes", "integrity", False, fault, layer=module))
        for module, pair in parsed.pairs.items():
            if not pair.is_float or torch.float64 in (pair.a.dtype, pair.b.dtype):
                # Loaders round float64, which undoes cancellations that only it can hold.
                detail = f"is stored as {pair.a.dtype} and {pair.b.dtype}; expected float32, float16 or bfloat16"
                dtypes.append(Check("dtypes", "integrity", False, detail, layer=module))
            else:
                unsound = _value_fault(pair)
                values += [Check("values", "integrity", False, unsound, layer=module)] if unsound else []
    count = sum(len(parsed.pairs) for parsed in layers.values())
    if count == 0:
        shapes.append(Check("shapes", "integrity", False, "there is no LoRA layer in the files"))
    return [
        *_gathered("shapes", "integrity", shapes, f"{count} layers have fitting A and B"),
        *_gathered("dtypes", "integrity", dtypes, "all layers are of floating dtypes"),
        *_gathered("values", "integrity", values, "all values are finite and representable"),
    ]


def _value_fault(pair: LoraPair) -> str | None:
    for name, tensor in (("A", pair.a), ("B", pair.b)):
        largest = float(tensor.abs().max())
        if not isfinite(largest):
            return f"{name} has values that are not finite"
        # Of float32, in which processors that take denormal numbers for zero compute: what is small in float16 is not
        # in that. bfloat16 has its range.
        if 0 < largest < torch.finfo(torch.float32).tiny:
            return f"{name} has denormal numbers only, which a processor may take for zero or round away"
    return None


# The adapter's config

_HARMLESS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias"),
        *("fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config"),
    }
)
_REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[*+]|\{\d*,\d*\})")
"""In a regular expression, a group repeated without a fixed count: what makes matching take for ever."""


def _check_config(folder: AdapterFolder, layers: Mapping[str, LoraLayers]) -> list[Check]:
    failures: list[str] = []
    for name, parsed in layers.items():
        for where, part, config in lora_configs(name, folder.weights[name].metadata, folder.config):
            failures += [f"{where}: {fault}" for fault in _config_faults(config, _pairs_of(part, parsed))]
        failures += [
            f"{module} has alpha {pair.alpha}; expected a finite number up to {MAX_SCALE:g} times its rank"
            for module, pair in parsed.pairs.items()
            if pair.alpha is not None and not abs(pair.alpha) <= MAX_SCALE * pair.rank
        ]
    checks = [Check("config", "integrity", False, fault) for fault in failures]
    return _gathered("config", "integrity", checks, "a plain LoRA, without options that escape the projection")


def _pairs_of(part: str | None, parsed: LoraLayers) -> dict[str, LoraPair]:
    """The layers of one part of a pipeline; the model that the basis belongs to is every part but text encoders.

    PEFT's layout has no parts (`None`): what is called so there is a module of the model.
    """
    if part is None:
        return parsed.pairs
    encoders = {m: pair for m, pair in parsed.pairs.items() if m.startswith("text_encoder")}
    if part.startswith("text_encoder"):
        return {m.removeprefix(f"{part}."): pair for m, pair in encoders.items() if m.startswith(f"{part}.")}
    return {m: pair for m, pair in parsed.pairs.items() if m not in encoders}


def _config_faults(config: Mapping[str, Any], pairs: Mapping[str, LoraPair]) -> Iterator[str]:
    """Why `config` is not that of a plain LoRA with factors `pairs`."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {shown(config.get('peft_type'))}; expected 'LORA'"
    for option, value in config.items():
        # PEFT asks of some whether they are true, and of some whether they are there.
        off = value is None or value is False or value == []
        if not off and option in ESCAPING_OPTIONS:
            yield f"{option} is set: {ESCAPING_OPTIONS[option]}, outside of the projection"
        elif value and option not in _HARMLESS:
            yield f"{shown(option)} is set, which this release does not know and cannot judge"
    if config.get("bias", "none") != "none":
        yield f"bias is {shown(config['bias'])}; expected 'none'"
    # With these, a layer that is targeted and not in the files changes nothing.
    init = config.get("init_lora_weights", True)
    if init is not True and not (isinstance(init, str) and init.lower() in NEUTRAL_INITS):
        yield f"init_lora_weights is {shown(init)}: {_init_fault(init)}"
    for option, text in regular_expressions(config):
        if _REPEATED_GROUP.search(text):
            yield f"{option} holds {shown(text)}, a regular expression that may take for ever to match"
    yield from _scale_faults(config)
    yield from _rank_faults(config, pairs)


def _init_fault(init: Any) -> str:
    if init:
        return "it is not known to leave the base model as it is; expected true"
    # Whatever is false, and null too, is one thing to PEFT.
    return "layers that are targeted and not in the files get random weights; expected true"


def _has_expressions(folder: AdapterFolder) -> bool:
    files = folder.weights.items()
    configs = (config for name, file in files for _, _, config in lora_configs(name, file.metadata, folder.config))
    return any(True for config in configs for _ in regular_expressions(config))


def _scale_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_positive, pattern.values())):
            yield f"{key} is {shown(pattern)}; expected positive numbers by module"
            return
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            yield f"{key} is {shown(config.get(key))}; expected a positive number"
            return
    alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if max(alphas) / min(ranks) > MAX_SCALE:
        yield f"lora_alpha / r reaches {max(alphas) / min(ranks):.3g}; expected at most {MAX_SCALE:g}"


def _rank_faults(config: Mapping[str, Any], pairs: Mapping[str, LoraPair]) -> Iterator[str]:
    """Layers whose rank is not the one that `r` and `rank_pattern` give them.

    PEFT takes the pattern's keys for regular expressions, and the first that matches counts. Those of strangers are not
    run, since they can be made to take for ever: a key that is more than a name allows its rank to every layer for
    which no name stands before it.
    """
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(map(_is_positive, [config.get("r"), *pattern.values()])):
        return
    names: dict[str, tuple[int, float]] = {}
    allowed: dict[float, int] = {}
    for place, (key, rank) in enumerate(pattern.items()):
        if PLAIN_NAME.fullmatch(key):
            names.setdefault(key.removesuffix("$"), (place, rank))
        else:
            allowed.setdefault(rank, place)
    for module, pair in pairs.items():
        found = [names[name] for name in (f"^{module}", *_suffixes(module)) if name in names]
        place, rank = min(found, default=(len(pattern), config["r"]))
        if pair.rank != rank and allowed.get(pair.rank, place) >= place:
            others = (other for other, before in allowed.items() if before < place)
            expected = [rank, *islice(others, 4)]
            yield f"{module} has rank {pair.rank}; the config says {' or '.join(map(shown, expected))}"


def _suffixes(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


_COMMIT = re.compile("[0-9a-f]{40}")


def _check_base(folder: AdapterFolder) -> list[Check]:
    claimed = folder.manifest["base_model"]
    named = {"the manifest": (claimed["id"], claimed["revision"])}
    if folder.config is not None:
        config = folder.config
        named[ADAPTER_CONFIG_NAME] = (config.get("base_model_name_or_path"), config.get("revision"))
    if folder.basis is not None:
        metadata = folder.basis.metadata
        named[BASIS_NAME] = (metadata.get("base_model"), metadata.get("revision"))
    # A folder is called otherwise on every machine: an adapter may be trained in one of the base that the basis names.
    folders = {where: name for where, (name, _) in named.items() if _is_path(name)}
    names = {where: name for where, (name, _) in named.items() if name and where not in folders}
    revisions = {where: revision for where, (_, revision) in named.items() if revision}
    # What a branch or a tag stands for is not known here.
    commits = {where: revision for where, revision in revisions.items() if _COMMIT.fullmatch(str(revision))}
    compared = revisions if len(commits) in (0, len(revisions)) else commits
    failures = []
    for what, values in (("base model", names), ("revision of the base model", compared)):
        if len(set(map(repr, values.values()))) > 1:
            listed = ", ".join(f"{shown(value)} in {where}" for where, value in values.items())
            failures.append(Check("base model", "integrity", False, f"the {what} differs: {listed}"))
    found = [shown(name) for name in (*names.values(), *folders.values())]
    summary = found[0] if found else "no base model is named"
    if found and revisions:
        summary += f" at {' or '.join(dict.fromkeys(map(shown, revisions.values())))}"
    if names and folders:
        listed = ", ".join(f"{shown(path)} in {where}" for where, path in folders.items())
        summary += f"; not compared with it, since they are paths of the publisher: {listed}"
    return _gathered("base model", "integrity", failures, summary)


def _is_path(name: Any) -> bool:
    """Whether it cannot be the id of a repository; of `a/b`, which may be either, it is the id that counts."""
    return isinstance(name, str) and bool(name) and not is_hub_id(name)


# Orthogonality


def _check_orthogonality(
    folder: AdapterFolder, layers: Mapping[str, LoraLayers], own: ConceptBasis | None, own_tolerance: float | None
) -> tuple[list[Check], list[LayerResult]]:
    published = folder.basis.layers if folder.basis is not None else None
    brought = None if own is None else {name: dict(layer.items()) for name, layer in own.items()}
    if published is None and brought is None:
        return [Check("leakage", "orthogonality", None, _why_unchecked(folder))], []
    checks = _check_strength(folder)
    results: list[LayerResult] = []
    if published is not None and folder.basis is not None:
        checks += _check_basis(folder, folder.basis, layers)
        checks += _check_coverage(folder, layers, published, "the concept basis")
        results, leaks = _check_leakage(layers, published, "leakage", None)
        checks += [*leaks, *_check_claims(folder, results)]
    if brought is not None:
        own_results, leaks = _check_leakage(layers, brought, "leakage against your basis", own_tolerance)
        checks += _check_coverage(folder, layers, brought, "your basis")
        checks += [*_misfits(layers, brought), *leaks]
        if published is not None:
            checks += _compare_bases(published, brought, layers)
        elif own is not None and own.digest() == folder.manifest["basis"]["digest"]:
            checks += _check_claims(folder, own_results)
        results = results or own_results
    return checks, results


def _why_unchecked(folder: AdapterFolder) -> str:
    if folder.basis_published == "digest":
        return "the concept basis was withheld by the publisher; bring your own to check against it"
    return (
        "no concept basis is published: what concept probes protect shows in the model's behaviour and not in the "
        "weights; bring a basis of your own to check against it"
    )


def _check_strength(folder: AdapterFolder) -> list[Check]:
    strength = folder.manifest["settings"].get("strength")
    exact = isinstance(strength, int | float) and strength == 1
    detail = "1, removed in full" if exact else f"is {shown(strength)}; only 1 gives a guarantee"
    return [Check("strength", "orthogonality", exact, detail)]


def _check_basis(folder: AdapterFolder, basis: BasisFile, layers: Mapping[str, LoraLayers]) -> list[Check]:
    failures = []
    claimed = folder.manifest["basis"]
    for module, spaces in basis.layers.items():
        for space, matrix in spaces.items():
            fault = _basis_fault(space, matrix)
            for pair in (parsed.pairs.get(module) for parsed in layers.values()):
                fault = fault or (None if pair is None else _width_fault(space, matrix, pair))
            if fault is not None:
                failures.append(Check("basis", "orthogonality", False, f"the {space} basis {fault}", layer=module))
    if not failures and claimed["digest"] != _digest(basis):
        failures.append(Check("basis", "orthogonality", False, "is another than the one whose digest the manifest has"))
    if basis.metadata.get("concept", "") != folder.manifest["concept"]:
        detail = f"is for {shown(basis.metadata.get('concept'))}; the manifest says {shown(folder.manifest['concept'])}"
        failures.append(Check("basis", "orthogonality", False, detail))
    count = sum(len(spaces) for spaces in basis.layers.values())
    return _gathered("basis", "orthogonality", failures, f"{count} bases are orthonormal, of the right widths")


def _basis_fault(space: str, matrix: Tensor) -> str | None:
    if matrix.ndim != 2 or matrix.dtype not in (torch.float32, torch.float64):
        return f"has shape {tuple(matrix.shape)} and {matrix.dtype}; expected a float32 matrix (d, k)"
    if not torch.isfinite(matrix).all():
        return "has values that are not finite"
    width, count = matrix.shape
    if not 0 < count <= width:
        return f"has {count} directions of width {width}; expected 1 to {width}"
    error = orthonormality_error(matrix)
    if error > ORTHONORMALITY_TOLERANCE:
        return f"is not orthonormal: U^T U differs from I by {error:.2g}; expected at most {ORTHONORMALITY_TOLERANCE:g}"
    return None


def _width_fault(space: str, matrix: Tensor, pair: LoraPair) -> str | None:
    d_in, d_out, rank = pair.a.shape[1], pair.b.shape[0], pair.rank
    width = {"input": d_in, "output": d_out, "rank": rank, "gradient": rank * (d_in + d_out)}[space]
    return None if matrix.shape[0] == width else f"has width {matrix.shape[0]}; the layer's is {width}"


def _misfits(layers: Mapping[str, LoraLayers], own: Bases) -> Iterator[Check]:
    """Layers whose width is not that of the verifier's basis: nothing could be measured there."""
    for parsed in layers.values():
        for module, pair in parsed.pairs.items():
            for space, matrix in own.get(module, {}).items():
                fault = _width_fault(space, matrix, pair)
                if fault is not None:
                    yield Check("your basis", "orthogonality", False, f"the {space} basis {fault}", layer=module)


def _digest(basis: BasisFile) -> str | None:
    try:
        return basis.to_concept_basis().digest()
    except ConceptBasisError:
        return None


def _check_coverage(folder: AdapterFolder, layers: Mapping[str, LoraLayers], bases: Bases, whose: str) -> list[Check]:
    failures = []
    for parsed in layers.values():
        for module in (*parsed.pairs, *parsed.malformed):
            if not any(space in bases.get(module, {}) for space in CHECKABLE_SPACES):
                detail = f"is adapted, but {whose} covers it in none of the spaces {', '.join(CHECKABLE_SPACES)}"
                failures.append(Check("coverage", "orthogonality", False, detail, layer=module))
        for tensor in parsed.uncovered:
            failures.append(Check("coverage", "orthogonality", False, "is uncovered: no part of a LoRA pair", tensor))
    for part in folder.manifest["uncovered"]:
        failures.append(Check("coverage", "orthogonality", False, "is uncovered, says the publisher", part))
    count = sum(len(parsed.pairs) for parsed in layers.values())
    return _gathered("coverage", "orthogonality", failures, f"{whose} covers all {count} adapted layers")


def _check_leakage(
    layers: Mapping[str, LoraLayers], bases: Bases, name: str, tolerance: float | None
) -> tuple[list[LayerResult], list[Check]]:
    results = list(_measured(layers, bases))
    failures = []
    worst = 0.0
    for result in results:
        allowed = result.tolerance if tolerance is None else tolerance
        for space, value in result.leakage.items():
            worst = max(worst, value)
            # Written so that NaN fails.
            if not value <= allowed:
                found = (
                    f"{value:.3g} of the update lies in the {space} basis" if isfinite(value) else _unmeasured(space)
                )
                detail = f"{found}; expected at most {allowed:g}"
                failures.append(Check(name, "orthogonality", False, detail, result.name, value, allowed))
    summary = f"at most {worst:.2g} of any layer's update lies in the basis: rounding error"
    if tolerance is not None:
        summary = f"at most {worst:.2g} of any layer's update lies in the basis; up to {tolerance:g} was allowed"
    if not any(result.leakage for result in results):
        failures.append(Check(name, "orthogonality", False, "no adapted layer could be measured against the basis"))
    return results, _gathered(name, "orthogonality", failures, summary, value=worst, tolerance=tolerance)


def _unmeasured(space: str) -> str:
    return (
        f"how much of the update lies in the {space} basis cannot be measured, since A, B or the basis are not finite, "
        f"or the update is less than {LEAST_REMAINDER:g} of factors that cancel; publish finite factors of the same "
        "update that do not cancel, as its singular value decomposition has them"
    )


def _measured(layers: Mapping[str, LoraLayers], bases: Bases) -> Iterator[LayerResult]:
    for parsed in layers.values():
        for module, pair in parsed.pairs.items():
            if pair.is_float:
                tolerance = max(TOLERANCES[pair.a.dtype], TOLERANCES[pair.b.dtype])
                dtype = dtype_name(pair.b.dtype)
                yield LayerResult(module, pair.rank, dtype, tolerance, layer_leakage(pair, bases.get(module, {})))


def _check_claims(folder: AdapterFolder, results: Iterable[LayerResult]) -> list[Check]:
    claims = {(name, s): v for name, spaces in folder.manifest["leakage"].items() for s, v in spaces.items()}
    found = {(result.name, s): (v, result.tolerance) for result in results for s, v in result.leakage.items()}
    failures = []
    for name, space in claims.keys() | found.keys():
        claim = claims.get((name, space))
        value, tolerance = found.get((name, space), (None, None))
        if claim is None or value is None or tolerance is None or not abs(claim - value) <= tolerance:
            claimed, measured = ("nothing" if v is None else f"{v:.3g}" for v in (claim, value))
            detail = f"the manifest claims {claimed} for the {space} space; {measured} was found"
            failures.append(Check("claims", "orthogonality", False, detail, name, value, tolerance))
    failures.sort(key=lambda check: (check.layer or "", check.detail))
    return _gathered("claims", "orthogonality", failures, "the claimed leakage is the one that was found")


def _compare_bases(published: Bases, own: Bases, layers: Mapping[str, LoraLayers]) -> list[Check]:
    """How much of the verifier's basis the published one holds, by principal angles; it is told and not judged."""
    smallest, where = 1.0, ""
    for module in {name for parsed in layers.values() for name in parsed.pairs}:
        for space in CHECKABLE_SPACES:
            u, v = published.get(module, {}).get(space), own.get(module, {}).get(space)
            if u is None or v is None or u.shape[0] != v.shape[0] or _basis_fault(space, u) is not None:
                continue
            cosine = float(principal_cosines(u, v).min()) if v.shape[1] <= u.shape[1] else 0.0
            if cosine <= smallest:
                smallest, where = cosine, f"{module}, {space}"
    detail = (
        f"the least cosine of a principal angle between your basis and the published one is {smallest:.4f} ({where})"
        if where
        else "your basis and the published one share no layer and space"
    )
    return [Check("principal angles", "orthogonality", bool(where), detail, value=smallest if where else None)]


def _check_refit(
    folder: AdapterFolder,
    layers: Mapping[str, LoraLayers],
    orthogonality: Iterable[Check],
    base_model: nn.Module | None,
    batches: ContrastBatches,
    tolerance: float,
) -> list[Check]:
    """Whether the published basis is what its recipe gives, fitted anew."""
    from .base_models import layer_widths
    from .refit import Recipe, compare_bases, refit_basis

    def unchecked(reason: str) -> list[Check]:
        return [Check("refit", "orthogonality", None, f"the published basis was not fitted anew: {reason}")]

    if folder.basis is None:
        return unchecked("it was withheld" if folder.basis_published == "digest" else "there is none")
    if base_model is None:
        return unchecked("integrity failed")
    if any(check.name == "basis" and not check.passed for check in orthogonality):
        return unchecked("it is not sound")
    try:
        recipe = Recipe.of(folder.basis.fit)
    except ConceptBasisError as error:
        return unchecked(str(error))
    given = batches.digest()
    if recipe.digest not in (None, given):
        detail = f"the contrast batches have SHA-256 {given[:16]}...; the recipe names {shown(recipe.digest)}"
        return [Check("refit", "orthogonality", False, detail)]
    try:
        refitted = refit_basis(recipe, base_model, batches)
    except (ConceptBasisError, ConceptDataError) as error:
        return [Check("refit", "orthogonality", False, f"the recipe gives no basis: {error}")]
    adapted = {module for parsed in layers.values() for module in parsed.pairs}
    compared = compare_bases(folder.basis.layers, refitted, adapted, layer_widths(base_model), tolerance=tolerance)
    checks = [
        Check("refit", "orthogonality", False, each.detail + recipe.caveats, each.layer, each.sine, tolerance)
        for each in compared.differences
    ]
    if not checks and compared.worst is not None:
        summary = f"what was fitted anew is as published, up to a sine of {compared.worst:.2g}; up to {tolerance:g} "
        summary += "is rounding"
        if recipe.digest is None:
            summary += "; the recipe names no digest of its batches"
        checks.append(Check("refit", "orthogonality", True, summary, value=compared.worst, tolerance=tolerance))
    for reason, bases in compared.unchecked.items():
        detail = f"not fitted anew, since {reason}: {', '.join(bases)}"
        checks.append(Check("refit", "orthogonality", None, detail))
    return checks
