"""The published folder: what is in it, writing it atomically, reading it suspiciously.

A published adapter is a plain LoRA that everybody can load, and beside it the *concept basis* and a *manifest*,
`gradproj.json`, that binds them: digests and sizes of the files, the settings of the projection, the base model, and
the leakage of each layer as measured in the files. The manifest is written last, so that a folder with a manifest is
complete. The model card and a signature are not bound by it: the Hub lets owners edit the card, and a signature
covers the manifest.

Layers come in either layout, `base_model.model.{module}.lora_A.weight` of PEFT or `unet.{module}.lora_A.weight` (older:
`.lora.down.weight`) of diffusers, and leave this module as `LoraPair`s under the name that the module has in the
bare base model, which is the name that the concept basis uses.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import normalize

from torch import Tensor

from ._version import installed_versions
from .basis import BASIS_FILE_NAME as BASIS_NAME
from .basis import FORMAT_VERSION as BASIS_FORMAT_VERSION
from .basis import SPACES
from .errors import AdapterFolderError
from .files import is_repository, sync
from .projection import dtype_name, leakage
from .untrusted import (
    MAX_FILE_BYTES,
    MAX_JSON_BYTES,
    FileBytes,
    TensorFile,
    check_format_version,
    parse_json,
    parse_json_object,
    parse_safetensors,
    printable,
    read_file,
    shown,
)

if TYPE_CHECKING:
    from .basis import ConceptBasis

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "BASIS_NAME",
    "BOUND_FILES",
    "CHECKABLE_SPACES",
    "DIFFUSERS_CONFIG_KEY",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "PUBLISHED_FILES",
    "SIGNATURE_NAME",
    "SPACES",
    "WEIGHT_NAMES",
    "AdapterFolder",
    "BasisFile",
    "LoraLayers",
    "LoraPair",
    "PublishedFile",
    "download_adapter_folder",
    "has_adapter_weights",
    "layer_leakage",
    "locate_adapter_folder",
    "lora_configs",
    "parse_lora_layers",
    "publishes_basis",
    "read_adapter_folder",
    "read_basis",
    "read_basis_or_adapter",
    "read_settings",
    "rival_weights",
    "size_limit",
    "staged_file",
    "write_sidecars",
]

FORMAT_VERSION = 1

MANIFEST_NAME = "gradproj.json"
SIGNATURE_NAME = "model.sig"
ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

DIFFUSERS_CONFIG_KEY = "lora_adapter_metadata"
"""Where the header of weights in diffusers' layout has the config, if anywhere."""

BOUND_FILES = (*WEIGHT_NAMES, ADAPTER_CONFIG_NAME, BASIS_NAME)
"""The files whose digests the manifest holds."""

PUBLISHED_FILES = (*BOUND_FILES, MANIFEST_NAME, "README.md", SIGNATURE_NAME)
"""Everything that may be published; whatever else lies in the folder stays at home."""

MAX_DIRECTIONS = 4096
"""Largest rank, and number of directions of a basis: the cores that leakage is computed from grow with its square."""

MAX_ELEMENTS = 2**27
"""Largest number of entries of a factor or of a basis: they are computed with in float64, 1 GB at that size."""

MAX_LINES = 2000
"""How many lines, of how many characters, a person is shown; strangers can make them millions."""

CHECKABLE_SPACES = ("input", "rank", "output")
"""The spaces whose promise shows in the weights; what `gradient` promises is about steps."""


# What is in a folder


@dataclass(frozen=True)
class PublishedFile:
    """A file as the manifest has it, or as it is."""

    size: int
    sha256: str


@dataclass(frozen=True, eq=False)
class LoraPair:
    r"""The two factors of one adapted layer, convolutions flattened."""

    a: Tensor
    """Shape `(r, d_in)`; for a convolution `d_in` is `c_in * kh * kw`."""

    b: Tensor
    """Shape `(d_out, r)`."""

    alpha: float | None = None
    """The alpha that is stored beside the tensors, if any."""

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.a.shape[0])

    @property
    def is_float(self) -> bool:
        """Whether both factors are of a floating dtype that leakage can be computed in."""
        return all(t.is_floating_point() and t.dtype.itemsize > 1 for t in (self.a, self.b))


@dataclass(frozen=True, eq=False)
class LoraLayers:
    """The tensors of an adapter, sorted into layers and the rest."""

    pairs: dict[str, LoraPair] = field(default_factory=dict)
    """Adapted layers by the module's name in the base model."""

    uncovered: tuple[str, ...] = ()
    """Tensors that are no part of a LoRA pair: magnitudes, biases, embeddings, saved modules."""

    malformed: dict[str, str] = field(default_factory=dict)
    """Layers that are no LoRA, and what is wrong with them."""


@dataclass(frozen=True, eq=False)
class BasisFile:
    """A concept basis as it lies in a file, not yet believed to be one."""

    layers: dict[str, dict[str, Tensor]] = field(repr=False)
    """`{module: {space: tensor}}`."""

    metadata: dict[str, str]
    """The header's `format_version`, `concept`, `base_model`, `revision` and `fit`, as far as they are given."""

    def to_concept_basis(self) -> ConceptBasis:
        """The basis as an object.

        Raises:
            ConceptBasisError: If a matrix is not an orthonormal basis.
        """
        from .basis import ConceptBasis, LayerBasis

        layers = {name: LayerBasis(**spaces) for name, spaces in self.layers.items()}
        known = {key: self.metadata.get(key) for key in ("base_model", "revision")}
        return ConceptBasis(layers, self.metadata.get("concept", ""), **known, fit=self.fit)

    @property
    def fit(self) -> dict[str, Any] | None:
        """How the basis was fitted, as its file says.

        Raises:
            AdapterFolderError: If the note is not a JSON object.
        """
        value = parse_json(self.metadata.get("fit", "null"), "the note on the fit of the concept basis")
        if value is not None and not isinstance(value, dict):
            raise AdapterFolderError(f"the note on the fit of the concept basis is a {type(value).__name__}; refused.")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Names and shapes, JSON-able."""
        shapes = {name: {s: list(t.shape) for s, t in spaces.items()} for name, spaces in self.layers.items()}
        known = {key: self.metadata.get(key) for key in ("concept", "base_model", "revision")}
        return {**known, "fit": self.fit, "layers": shapes}

    def __rich__(self) -> Any:
        from rich.text import Text

        lines = self.to_concept_basis().summary().split("\n")
        more = [f"and {len(lines) - MAX_LINES} more lines; --json has all"] if len(lines) > MAX_LINES else []
        return Text("\n".join(printable(line[:MAX_LINES]) for line in (*lines[:MAX_LINES], *more)))


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A published folder that was read; what it claims is still to be checked."""

    path: Path
    manifest: dict[str, Any]
    weights: dict[str, TensorFile]
    """The files of LoRA tensors by name; one, unless both layouts are published."""

    config: dict[str, Any] | None
    """`adapter_config.json`; diffusers' layout has none."""

    basis: BasisFile | None
    """`None` where it was withheld, or where there is none."""

    files: dict[str, PublishedFile]
    """Size and digest of the bound files, as they are."""

    manifest_file: PublishedFile
    """Size and digest of the manifest itself."""

    @property
    def claimed_files(self) -> dict[str, PublishedFile]:
        """Size and digest of the bound files, as the manifest has them."""
        return {name: PublishedFile(**entry) for name, entry in self.manifest["files"].items()}

    @property
    def basis_published(self) -> str:
        """`full`, `digest` if it was withheld, or `none` if the adapter was trained without."""
        return self.manifest["basis"]["published"]

    def layers(self) -> dict[str, LoraLayers]:
        """The adapted layers of each file of weights."""
        return {name: parse_lora_layers(tensors) for name, tensors in self.weights.items()}

    def to_dict(self) -> dict[str, Any]:
        """What is in the folder, as claimed and unchecked, JSON-able."""
        layers = {
            module: {
                "rank": pair.rank,
                "d_in": pair.a.shape[1],
                "d_out": pair.b.shape[0],
                "dtype": dtype_name(pair.a.dtype),
            }
            for parsed in self.layers().values()
            for module, pair in parsed.pairs.items()
        }
        uncovered = [name for parsed in self.layers().values() for name in (*parsed.uncovered, *parsed.malformed)]
        return {
            "concept": self.manifest["concept"],
            "base_model": self.manifest["base_model"],
            "settings": self.manifest["settings"],
            "files": {name: {"size": f.size, "sha256": f.sha256} for name, f in self.files.items()},
            "layers": layers,
            "uncovered": sorted({*self.manifest["uncovered"], *uncovered}),
            "basis": self.basis_published if self.basis is None else self.basis.to_dict(),
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        content = self.to_dict()
        table = Table("module", "rank", "d_in", "d_out", "dtype", "basis: k by space", title_justify="left")
        for module, layer in list(content["layers"].items())[:MAX_LINES]:
            spaces = {} if self.basis is None else self.basis.layers.get(module, {})
            ks = ", ".join(f"{space} {basis.shape[-1]}" for space, basis in spaces.items())
            table.add_row(*(Text(printable(str(cell))) for cell in (module, *layer.values(), ks)))
        base = self.manifest["base_model"]
        lines = {
            "concept": self.manifest["concept"] or "not named",
            "base model": f"{base['id'] or 'not named'}{' at ' + base['revision'] if base['revision'] else ''}",
            "settings": ", ".join(f"{key} {value}" for key, value in self.manifest["settings"].items()),
            "basis": {"full": "published", "digest": "withheld", "none": "none"}[self.basis_published],
            "uncovered": ", ".join(content["uncovered"]) or "nothing",
        }
        texts = [Text(printable(f"{name}: {value}"[:MAX_LINES])) for name, value in lines.items()]
        count = len(content["layers"])
        more = [Text(f"and {count - MAX_LINES} more layers; --json has all")] if count > MAX_LINES else []
        return Group(*texts, table, *more, Text("As the publisher claims; `gradproj verify` checks it."))


# Layers

_PAIR_SUFFIXES = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<new>[AB])\.weight"
    r"|(?:\.lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|\.processor\.(?P<projection>to_q|to_k|to_v|to_out)_lora\.(?P<processor>down|up)\.weight)"
)
_PEFT_PREFIX = "base_model.model."
_NAMESPACES = ("unet.", "transformer.")


def parse_lora_layers(tensors: Mapping[str, Tensor]) -> LoraLayers:
    """Sort tensors into LoRA layers, under their names in the base model, and the rest.

    Args:
        tensors: An adapter's tensors by key, in PEFT's or diffusers' layout.
    """
    factors: dict[str, dict[str, list[str]]] = {}
    spellings: dict[str, set[tuple[str, bool]]] = {}
    alphas: dict[str, list[str]] = {}
    rest: list[str] = []
    strip = _namespace(tensors)
    for key in tensors:
        found = _factor(key)
        if found is not None:
            name, factor, spelling = found
            module = name.removeprefix(strip)
            factors.setdefault(module, {}).setdefault(factor, []).append(key)
            spellings.setdefault(module, set()).add((spelling, name.startswith(strip)))
        elif key.endswith(".alpha"):
            alphas.setdefault(key.removesuffix(".alpha").removeprefix(strip), []).append(key)
        else:
            rest.append(key)
    pairs: dict[str, LoraPair] = {}
    malformed: dict[str, str] = {}
    for module, keys in factors.items():
        a, b = ([tensors[key] for key in keys.get(factor, ())] for factor in "ab")
        _, _, inner = module.partition(".")
        fault = _fault(a, b)
        if fault is not None:
            malformed[module] = fault
        elif len(spellings[module]) > 1:
            # A loader that knows one of them takes one factor, and leaves the other as it was drawn.
            malformed[module] = f"has its A and B in different spellings, {keys['a'][0]} and {keys['b'][0]}"
        elif inner in factors:
            # transformers takes a name with and without the model's prefix for one layer; the last one counts.
            malformed[module] = f"is adapted as {inner} as well, which a loader may take for the same layer"
        else:
            pairs[module] = LoraPair(a[0].flatten(1), b[0].flatten(1), _alpha(tensors, alphas.get(module, ())))
    # Of two alphas, loaders may take either.
    rest += [
        key for module, keys in alphas.items() if module not in pairs or pairs[module].alpha is None for key in keys
    ]
    return LoraLayers(pairs, tuple(rest), malformed)


def _factor(key: str) -> tuple[str, str, str] | None:
    """Module and factor, `a` or `b`, that a tensor's key names, and in which spelling."""
    match = _PAIR_SUFFIXES.fullmatch(key)
    if match is None:
        return None
    module = match["module"]
    if match["projection"]:
        # Attention processors once held the LoRA; what they adapt is the projection of the attention module.
        module += "." + ("to_out.0" if match["projection"] == "to_out" else match["projection"])
    letter = match["new"] or match["old"] or match["processor"]
    suffix = key.removeprefix(match["module"]).removesuffix(f"{letter}.weight")
    return module, "a" if letter in ("A", "down") else "b", suffix


def _namespace(tensors: Mapping[str, Tensor]) -> str:
    """The prefix that stands for the model which the basis was fitted on; text encoders keep theirs."""
    found = [prefix for prefix in (_PEFT_PREFIX, *_NAMESPACES) if any(key.startswith(prefix) for key in tensors)]
    return found[0] if len(found) == 1 else ""


def _fault(found_a: Sequence[Tensor], found_b: Sequence[Tensor]) -> str | None:
    """Why the tensors that are named A and B of one layer are no pair of factors, if they are not."""
    if (len(found_a), len(found_b)) != (1, 1):
        return f"has {len(found_a)} tensors for A and {len(found_b)} for B; expected one of each"
    a, b = found_a[0], found_b[0]
    if a.ndim < 2 or b.ndim != a.ndim:
        return f"has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected two matrices or convolutions"
    if any(size != 1 for size in b.shape[2:]):
        return f"has a B of shape {tuple(b.shape)}; expected a convolution with kernel size 1"
    if a.shape[0] != b.shape[1]:
        return f"has A {tuple(a.shape)} and B {tuple(b.shape)}; expected (r, d_in) and (d_out, r) with one r"
    if a.shape[0] > MAX_DIRECTIONS:
        return f"has rank {a.shape[0]}; at most {MAX_DIRECTIONS} is checked"
    if max(a.numel(), b.numel()) > MAX_ELEMENTS:
        return f"has factors of {a.numel():,} and {b.numel():,} entries; at most {MAX_ELEMENTS:,} are checked"
    return None


def _alpha(tensors: Mapping[str, Tensor], keys: Sequence[str]) -> float | None:
    return float(tensors[keys[0]].item()) if len(keys) == 1 and tensors[keys[0]].numel() == 1 else None


def layer_leakage(pair: LoraPair, bases: Mapping[str, Tensor]) -> dict[str, float]:
    r"""Leakage of a layer in each checkable space that has a basis of the right width.

    As in :func:`peft_gradproj.projection.leakage`. `rank` is at least :math:`\|B R\|_F / \|B\|_F`, since B starts at
    zero and its columns along R keep their start.

    Args:
        pair: The layer's factors.
        bases: By space, shape `(d, k)`, orthonormal columns.
    """
    widths = {"input": pair.a.shape[1], "rank": pair.rank, "output": pair.b.shape[0]}
    result = {}
    for space in CHECKABLE_SPACES:
        basis = bases.get(space)
        if basis is None or basis.ndim != 2 or basis.shape[0] != widths[space] or not basis.is_floating_point():
            continue
        share = leakage(pair.a, pair.b, basis, space=space)
        # Not of B alone, which columns can inflate whose rows in A are zero. Written so that NaN stays.
        result[space] = max(share, _share_of_b(pair.b, basis)) if space == "rank" else share
    return result


def _share_of_b(b: Tensor, basis: Tensor) -> float:
    b = b.double()
    total = b.norm()
    return float((b @ basis.double()).norm() / total) if total > 0 else 0.0


def lora_configs(
    name: str, header: Mapping[str, str], config: Mapping[str, Any] | None
) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """The LoRA configs that loaders take for a file of weights: where each is, for which part, and it.

    Args:
        name: Of the file.
        header: The metadata in it, which diffusers reads.
        config: That of the file beside it, which PEFT reads, if there is one.

    Raises:
        AdapterFolderError: If the header holds another config than a JSON object.
    """
    if name == WEIGHT_NAMES[0]:
        yield ADAPTER_CONFIG_NAME, None, dict(config or {})
    text = header.get(DIFFUSERS_CONFIG_KEY)
    if text is None:
        return
    where = f"{DIFFUSERS_CONFIG_KEY} in {name}"
    merged = parse_json(text, where)
    if not isinstance(merged, dict):
        raise AdapterFolderError(f"{where} is not a JSON object; save the adapter again.")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in merged.items():
        # The option stands behind the part of the pipeline that it is for.
        part, _, option = key.rpartition(".")
        parts.setdefault(part, {})[option] = value
    for part, options in parts.items():
        yield where, part, {"peft_type": "LORA", **options}


# Writing


def has_adapter_weights(folder: str | os.PathLike[str]) -> bool:
    """Whether the weights of a LoRA adapter are in `folder`, as safetensors."""
    return any(Path(folder, name).is_file() for name in WEIGHT_NAMES)


def write_sidecars(
    folder: str | os.PathLike[str],
    basis: ConceptBasis | None,
    *,
    settings: Mapping[str, Any],
    base_model: str | None,
    revision: str | None = None,
    concept: str = "",
    uncovered: Sequence[str] = (),
    publish_basis: Literal["full", "digest"] = "full",
    recipe: Mapping[str, Any] | None = None,
) -> Path:
    """Write the concept basis and the manifest beside a LoRA that has just been saved.

    Each file appears complete or not at all, the manifest last. An error leaves the former files.

    Args:
        folder: Holds the adapter's weights, and `adapter_config.json` in PEFT's layout.
        basis: What the adapter was projected away from; `None` if it was trained with concept probes only.
        settings: The GradProj fields of the config, JSON-able; `strength` among them.
        base_model: Identifier of the base model; that of the basis if `None`.
        revision: Its revision; that of the basis if `None`.
        concept: What must not be learned, in words, where there is no basis that says it.
        uncovered: What the projection did not cover, by name.
        publish_basis: `digest` withholds the basis: publishing what was removed can help an attacker. A verifier
            then brings his own.
        recipe: How the adapter was trained, JSON-able.

    Returns:
        The manifest's path.

    Raises:
        AdapterFolderError: If the folder has no weights, they cannot be read or are too large to be verified, something
            is not JSON-able, or a basis lies in a folder that is not to publish one.
    """
    folder = Path(folder)
    if publish_basis not in ("full", "digest"):
        raise AdapterFolderError(f"publish_basis is {publish_basis!r}; expected 'full' or 'digest'.")
    publish = basis is not None and publish_basis == "full"
    if not publish and (folder / BASIS_NAME).exists():
        raise AdapterFolderError(
            f"{folder} holds a {BASIS_NAME} that is not to be published with this adapter; move it out of the folder "
            "and save again."
        )
    for path in (folder / name for name in WEIGHT_NAMES):
        if path.is_file() and path.stat().st_size > size_limit(path.name):
            raise AdapterFolderError(
                f"{path} has {path.stat().st_size:,} bytes; at most {size_limit(path.name):,} can be verified. Save "
                "the adapter in half precision, with a lower rank or in fewer layers."
            )
    sources = _read_bound(folder, (*WEIGHT_NAMES, ADAPTER_CONFIG_NAME))
    if not any(name in sources for name in WEIGHT_NAMES):
        raise AdapterFolderError(f"{folder} holds no {' or '.join(WEIGHT_NAMES)}; save the adapter there first.")
    with staged_file(folder, BASIS_NAME) as staged_basis, staged_file(folder, MANIFEST_NAME) as staged_manifest:
        if basis is not None and publish:
            basis.save(staged_basis)
            sources[BASIS_NAME] = FileBytes(BASIS_NAME, bytearray(staged_basis.read_bytes()))
        manifest = _manifest(sources, basis, publish, settings, base_model, revision, concept, uncovered, recipe)
        _write_json(staged_manifest, manifest)
        if publish:
            os.replace(staged_basis, folder / BASIS_NAME)
        os.replace(staged_manifest, folder / MANIFEST_NAME)
    sync(folder)
    return folder / MANIFEST_NAME


def _manifest(
    sources: Mapping[str, FileBytes],
    basis: ConceptBasis | None,
    publish: bool,
    settings: Mapping[str, Any],
    base_model: str | None,
    revision: str | None,
    concept: str,
    uncovered: Sequence[str],
    recipe: Mapping[str, Any] | None,
) -> dict[str, Any]:
    base_model = base_model or (basis.base_model if basis is not None else None) or None
    if revision is None and basis is not None and basis.base_model == base_model:
        revision = basis.revision
    return {
        "format_version": FORMAT_VERSION,
        "concept": basis.concept if basis is not None else concept,
        "base_model": {"id": base_model, "revision": revision},
        "settings": dict(settings),
        "files": {name: {"size": s.size, "sha256": s.sha256} for name, s in sorted(sources.items())},
        "basis": {
            "published": "none" if basis is None else "full" if publish else "digest",
            "digest": None if basis is None else basis.digest(),
        },
        "leakage": {} if basis is None else _measured_leakage(sources, basis),
        "uncovered": list(uncovered),
        "versions": installed_versions("torch", "peft", "transformers", "diffusers", "safetensors"),
        "recipe": None if recipe is None else dict(recipe),
    }


def _measured_leakage(sources: Mapping[str, FileBytes], basis: ConceptBasis) -> dict[str, dict[str, float | None]]:
    """Leakage of each layer that the basis covers, from the bytes that are published."""
    result: dict[str, dict[str, float | None]] = {}
    for name in WEIGHT_NAMES:
        layers = parse_lora_layers(parse_safetensors(sources[name], name)) if name in sources else LoraLayers()
        for module, pair in layers.pairs.items():
            if module in basis and pair.is_float:
                measured = layer_leakage(pair, dict(basis[module].items()))
                result[module] = {space: value if isfinite(value) else None for space, value in measured.items()}
    return result


@contextmanager
def staged_file(folder: Path, name: str) -> Iterator[Path]:
    """A name in `folder` to prepare a file under; what is left there is removed."""
    # Not as a file of tensors: diffusers might take what a kill leaves for the adapter.
    path = folder / f".{secrets.token_hex(6)}.{name}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterFolderError(
            f"settings or recipe cannot be written as JSON: {error}. Give plain strings, finite numbers, lists and "
            "dictionaries."
        ) from error
    with open(path, "x", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


# Reading


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The GradProj settings of a published adapter, or `None` where there is no manifest.

    Raises:
        AdapterFolderError: If there is a manifest and it is malformed.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / MANIFEST_NAME):
        return None
    return _read_manifest(folder)[0]["settings"]


def publishes_basis(folder: str | os.PathLike[str]) -> bool:
    """Whether the manifest in `folder` says that the concept basis lies beside it.

    Raises:
        AdapterFolderError: If there is no manifest, or it is malformed.
    """
    return _read_manifest(Path(folder))[0]["basis"]["published"] == "full"


def read_adapter_folder(path: str | os.PathLike[str]) -> AdapterFolder:
    """Read a published folder and believe nothing in it.

    Raises:
        AdapterFolderError: If something is missing, malformed, too large or leads out of the folder.
    """
    folder = Path(path)
    # Not by methods of the path, which raise where a name is too long or a folder may not be entered.
    if not os.path.isdir(folder):
        fault = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise AdapterFolderError(
            f"{folder} {fault}; expected the folder of a published adapter, or its id on the Hub (user/name)."
        )
    try:
        _refuse_confusable(os.listdir(folder), str(folder))
    except OSError as error:
        raise AdapterFolderError(f"{folder} cannot be read: {error.strerror or error}.") from error
    manifest, manifest_source = _read_manifest(folder)
    absent = [name for name in manifest["files"] if not os.path.lexists(folder / name)]
    if absent:
        raise AdapterFolderError(f"{folder} lacks {', '.join(absent)}, which its manifest lists; publish it again.")
    sources = _read_bound(folder, BOUND_FILES)
    weights = {n: parse_safetensors(sources[n], str(folder / n)) for n in WEIGHT_NAMES if n in sources}
    if not weights:
        raise AdapterFolderError(f"{folder} holds no {' or '.join(WEIGHT_NAMES)}; there is no adapter to check.")
    config = sources.get(ADAPTER_CONFIG_NAME)
    basis = sources.get(BASIS_NAME)
    return AdapterFolder(
        path=folder,
        manifest=manifest,
        weights=weights,
        config=None if config is None else parse_json_object(config.data, str(folder / ADAPTER_CONFIG_NAME)),
        basis=None if basis is None else _parse_basis(basis, folder / BASIS_NAME),
        files={name: PublishedFile(source.size, source.sha256) for name, source in sources.items()},
        manifest_file=PublishedFile(manifest_source.size, manifest_source.sha256),
    )


def read_basis(path: str | os.PathLike[str]) -> BasisFile:
    """Read the file of a concept basis, or the one in a folder, and believe nothing in it.

    Raises:
        AdapterFolderError: If it is missing, malformed or too large.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _parse_basis(read_file(path, BASIS_NAME, limit=MAX_FILE_BYTES), path / BASIS_NAME)
    if not os.path.exists(path):
        raise AdapterFolderError(f"{path} does not exist; expected the file of a concept basis.")
    real = path.resolve()
    return _parse_basis(read_file(real.parent, real.name, limit=MAX_FILE_BYTES), path)


def read_basis_or_adapter(path_or_repo: str | os.PathLike[str]) -> BasisFile | AdapterFolder:
    """Read whichever of the two is there: the file of a concept basis, or a published adapter.

    Raises:
        AdapterFolderError: If neither is there, or it is malformed.
    """
    path = Path(path_or_repo)
    bare_basis = not os.path.exists(path / MANIFEST_NAME) and os.path.exists(path / BASIS_NAME)
    if os.path.isfile(path) or bare_basis:
        return read_basis(path)
    return read_adapter_folder(locate_adapter_folder(path_or_repo)[0])


def locate_adapter_folder(
    path_or_repo: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[Path, str | None]:
    """The folder of a published adapter, fetched from the Hub if it is not there; and the commit, if it was.

    Raises:
        AdapterFolderError: If it cannot be fetched, or a revision is asked for of a local folder.
    """
    path = Path(path_or_repo)
    if is_repository(path_or_repo):
        return download_adapter_folder(str(path_or_repo), revision=revision)
    if revision is not None:
        raise AdapterFolderError(f"a revision was given, but {path} is a path; only the Hub has revisions.")
    return path, None


def download_adapter_folder(repo_id: str, *, revision: str | None = None) -> tuple[Path, str]:
    """Fetch the published files of a repository of the Hub, and nothing else.

    Args:
        repo_id: `user/name`.
        revision: Branch, tag or commit; the default branch if `None`.

    Returns:
        The folder in the Hub's cache, and the commit that it holds.

    Raises:
        AdapterFolderError: If the repository cannot be reached, or a file is over its limit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        try:
            commit, names = _published_on_hub(repo_id, revision)
        except OfflineModeIsEnabled:
            # What was fetched before is in the cache, under the commit's name.
            commit, names = revision, list(PUBLISHED_FILES)
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=names))
    except AdapterFolderError:
        raise
    except (OSError, HTTPError, HFValidationError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise AdapterFolderError(
            f"{repo_id} is neither a folder, nor a repository that can be fetched ({type(error).__name__}: {reason}). "
            "Check the name, the revision, your login and the connection."
        ) from error
    return folder, folder.name


def _published_on_hub(repo_id: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The commit that `revision` is, and the published files that it has; all within their limits."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    _refuse_confusable(siblings, repo_id)
    rivals = rival_weights(siblings)
    if rivals:
        raise AdapterFolderError(
            f"{repo_id} also holds {', '.join(rivals[:5])}, which a loader may take for the adapter; there is no "
            "saying which weights were checked. Its owner should remove it."
        )
    names = sorted(name for name in siblings if name in PUBLISHED_FILES)
    for name in names:
        if siblings[name] > size_limit(name):
            raise AdapterFolderError(
                f"{name} of {repo_id} has {siblings[name]:,} bytes; at most {size_limit(name):,} are read."
            )
    if MANIFEST_NAME not in names:
        raise AdapterFolderError(f"{repo_id} holds no {MANIFEST_NAME}; it was not published with peft-gradproj.")
    return info.sha, names


def rival_weights(names: Iterable[str]) -> list[str]:
    """Files that PEFT or diffusers may load instead of the published weights.

    Both fall back to pickles. diffusers takes any file whose name ends like that of its weights, and where there is
    none, the first safetensors file that it finds; except under names with `checkpoint`, `optimizer` or `scheduler`.
    """
    names = list(names)
    endings = (*WEIGHT_NAMES, *(name.replace(".safetensors", ".bin") for name in WEIGHT_NAMES))
    if WEIGHT_NAMES[1] not in names:
        endings = (*endings, ".safetensors")
    others = (name for name in names if name not in PUBLISHED_FILES and name.endswith(endings))
    return [name for name in others if not any(word in name for word in ("checkpoint", "optimizer", "scheduler"))]


def size_limit(name: str) -> int:
    """The most bytes that are read of a published file."""
    return MAX_FILE_BYTES if name.endswith(".safetensors") else MAX_JSON_BYTES


def _read_bound(folder: Path, names: Sequence[str]) -> dict[str, FileBytes]:
    return {name: read_file(folder, name, limit=size_limit(name)) for name in names if os.path.lexists(folder / name)}


def _refuse_confusable(entries: Iterable[str], where: str) -> None:
    """Refuse names that a file system, or a reader, may take for published ones."""
    for entry in entries:
        for name in (*BOUND_FILES, MANIFEST_NAME):
            if entry != name and _looks_like(entry, name):
                raise AdapterFolderError(f"{where} holds {shown(entry)} beside, or for, {name}; refused. Remove it.")


def _looks_like(entry: str, name: str) -> bool:
    """Whether `entry` is `name` but for case, invisible characters, and less than half of the letters of other scripts.

    Which letters look alike is not asked: whoever honestly writes a name in another script writes all of it so.
    """
    letters = [c for c in normalize("NFKC", entry).casefold() if c.isprintable()]
    if len(letters) != len(name):
        return False
    same = sum(letter == expected for letter, expected in zip(letters, name, strict=True))
    foreign = sum(not letter.isascii() for letter in letters)
    return same + foreign == len(name) and same > foreign


def _parse_basis(source: FileBytes, where: Path) -> BasisFile:
    tensors = parse_safetensors(source, str(where))
    check_format_version(tensors.metadata.get("format_version"), BASIS_FORMAT_VERSION, str(where))
    layers: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        module, _, space = key.rpartition(".")
        if not module or space not in SPACES:
            raise AdapterFolderError(
                f"{where} holds a tensor {key}; expected {{module}}.{{space}} with a space of {', '.join(SPACES)}."
            )
        shape = tensors.infos[key].shape
        if not shape:
            raise AdapterFolderError(f"{key} in {where} is a single number; expected a matrix of shape (d, k).")
        if shape[-1:] > (MAX_DIRECTIONS,) or prod(shape) > MAX_ELEMENTS:
            raise AdapterFolderError(
                f"{key} in {where} has shape {shape}; at most {MAX_DIRECTIONS} directions and {MAX_ELEMENTS:,} entries "
                "are read."
            )
        layers.setdefault(module, {})[space] = tensors[key]
    return BasisFile(layers, tensors.metadata)


# The manifest


def _read_manifest(folder: Path) -> tuple[dict[str, Any], FileBytes]:
    where = folder / MANIFEST_NAME
    if not os.path.lexists(where):
        raise AdapterFolderError(f"{folder} holds no {MANIFEST_NAME}; it was not published with peft-gradproj.")
    source = read_file(folder, MANIFEST_NAME, limit=MAX_JSON_BYTES)
    manifest = parse_json_object(source.data, str(where))
    check_format_version(manifest.get("format_version"), FORMAT_VERSION, str(where))
    for key, (valid, expected) in _MANIFEST_FIELDS.items():
        if key not in manifest or not valid(manifest[key]):
            raise AdapterFolderError(f"{where}: {key!r} is missing or malformed; expected {expected}.")
    return manifest, source


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in BOUND_FILES
        and isinstance(entry, dict)
        and set(entry) == {"size", "sha256"}
        and type(entry["size"]) is int
        and isinstance(entry["sha256"], str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        for name, entry in value.items()
    )


def _is_basis(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"published", "digest"}
        and value["published"] in ("full", "digest", "none")
        and _is_text(value["digest"])
    )


def _is_leakage(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(spaces, dict) and all(_is_number(share) for share in spaces.values()) for spaces in value.values()
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


_MANIFEST_FIELDS: dict[str, tuple[Any, str]] = {
    "concept": (lambda v: isinstance(v, str), "text"),
    "base_model": (
        lambda v: isinstance(v, dict) and set(v) == {"id", "revision"} and all(map(_is_text, v.values())),
        "an object of id and revision",
    ),
    "settings": (lambda v: isinstance(v, dict), "an object"),
    "files": (_is_files, f"size and sha256 for names out of {', '.join(BOUND_FILES)}, without any path"),
    "basis": (_is_basis, "an object of published ('full', 'digest' or 'none') and digest"),
    "leakage": (_is_leakage, "a number for each layer and space"),
    "uncovered": (lambda v: isinstance(v, list) and all(isinstance(e, str) for e in v), "a list of names"),
    "versions": (lambda v: isinstance(v, dict), "an object"),
    "recipe": (lambda v: v is None or isinstance(v, dict), "an object, or null"),
}
