r"""The concept basis: per adapted layer, orthonormal directions that span a concept.

A basis is a result: it does not change, is equal to another by content, and can be saved, loaded, compared, joined
and printed. How it is computed lives in `fitting.py`, what is done with it in `projection.py`.

As a file it is one safetensors file with a tensor `{module}.{space}` of shape `(d, k)` for each layer and space, and
a header that says which concept of which base model it is, and how it was fitted.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base_models import in_common
from .errors import ConceptBasisError
from .files import locate_file, read_header_json, read_tensor_file, write_tensor_file
from .projection import orthonormal_basis, orthonormality_error, principal_cosines

__all__ = [
    "BASIS_FILE_NAME",
    "FORMAT_VERSION",
    "SPACES",
    "ConceptBasis",
    "LayerBasis",
    "SpaceOverlap",
]

SPACES = ("input", "rank", "output", "gradient")
BASIS_FILE_NAME = "concept_basis.safetensors"
FORMAT_VERSION = "1"

_HALF_DTYPES = (torch.float16, torch.bfloat16)


# One layer


@dataclass(frozen=True, eq=False)
class LayerBasis:
    r"""Orthonormal directions of a concept in the spaces of one layer.

    Tensors are copied to float32 on the CPU. Columns that are orthonormal up to the rounding of their dtype are made
    exactly so, since :math:`A (I - U U^T)` is zero on :math:`U` only to the precision of :math:`U^T U = I`.

    Args:
        input: Shape `(d_in, k)`; for a convolution `d_in` is `c_in * kh * kw`, in the order of
            `weight.reshape(out, -1)`.
        rank: Shape `(r, k)`.
        output: Shape `(d_out, k)`.
        gradient: Shape `(r * (d_in + d_out), k)`: the gradient of A, flattened row by row, and then that of B.

    Raises:
        ConceptBasisError: If all are `None`, or one is not an orthonormal, finite matrix with 1 to d columns.
    """

    input: Tensor | None = None
    rank: Tensor | None = None
    output: Tensor | None = None
    gradient: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.spaces():
            raise ConceptBasisError(f"a layer's basis is empty; give a matrix for at least one of {', '.join(SPACES)}.")
        for space in self.spaces():
            object.__setattr__(self, space, _checked_basis(space, getattr(self, space)))

    def spaces(self) -> tuple[str, ...]:
        """The spaces that have a basis, in the order of `SPACES`."""
        return tuple(space for space in SPACES if getattr(self, space) is not None)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of space and basis, of shape `(d, k)`, in the order of `SPACES`."""
        return ((space, getattr(self, space)) for space in self.spaces())

    def k(self, space: str) -> int:
        """Number of directions in `space`, 0 where it has no basis."""
        basis = getattr(self, _checked_space(space))
        return 0 if basis is None else int(basis.shape[1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerBasis):
            return NotImplemented
        return self.spaces() == other.spaces() and all(
            torch.equal(basis, getattr(other, space)) for space, basis in self.items()
        )

    def __hash__(self) -> int:
        return hash(tuple((space, tuple(basis.shape)) for space, basis in self.items()))

    def __repr__(self) -> str:
        return f"LayerBasis({', '.join(f'{space}={tuple(basis.shape)}' for space, basis in self.items())})"


def _checked_space(space: str) -> str:
    if space not in SPACES:
        raise ConceptBasisError(f"{space!r} is no space of a layer; expected one of {', '.join(SPACES)}.")
    return space


def _checked_basis(space: str, basis: Any) -> Tensor:
    """`basis` as float32 on the CPU with columns that are orthonormal to rounding, or an error that names `space`."""
    if not isinstance(basis, Tensor):
        raise ConceptBasisError(f"the {space} basis is a {type(basis).__name__}; expected a tensor of shape (d, k).")
    if not basis.is_floating_point():
        raise ConceptBasisError(f"the {space} basis has dtype {basis.dtype}; expected a floating-point dtype.")
    if basis.ndim != 2:
        raise ConceptBasisError(f"the {space} basis has shape {tuple(basis.shape)}; expected two dimensions, (d, k).")
    width, count = basis.shape
    if not 0 < count <= width:
        raise ConceptBasisError(
            f"the {space} basis has {count} directions of width {width}; expected at least one, and at most the width."
        )
    wide = basis.detach().to("cpu", torch.float64)
    if not torch.isfinite(wide).all():
        raise ConceptBasisError(f"the {space} basis has values that are not finite; fit it anew.")
    error = orthonormality_error(wide)
    if error > (3e-2 if basis.dtype in _HALF_DTYPES else 1e-4):
        raise ConceptBasisError(
            f"the columns of the {space} basis are not orthonormal: U^T U differs from I by {error:.1e}. "
            "Orthonormalise it with peft_gradproj.projection.orthonormal_basis."
        )
    if error > 1e-6:
        wide = _orthonormalised(wide)
    return wide.to(torch.float32).contiguous().clone()


def _orthonormalised(basis: Tensor) -> Tensor:
    """The orthonormal columns nearest to `basis` in order: the first j span what its first j span."""
    q, r = torch.linalg.qr(basis)
    return q * r.diagonal().sign()


# All layers


class SpaceOverlap(NamedTuple):
    """How far two bases of one layer and space coincide."""

    cosines: Tensor
    """Cosines of the principal angles, largest first, shape `(min(k, l),)`."""

    mean_square: float
    """Mean of their squares: 1 if one span holds the other, 0 if they are orthogonal."""


class ConceptBasis(Mapping[str, LayerBasis]):
    """What must not be learned, as directions in the layers of a base model. Immutable.

    Args:
        layers: The basis of each layer, under the layer's name in the bare base model.
        concept: What the concept is called.
        base_model: Identifier of the base model, if known.
        revision: Its revision, if known.
        fit: How the basis was fitted, JSON-able; `fit["layers"][module][space]` holds the layer's report.

    Raises:
        ConceptBasisError: If there is no layer, or `fit` is not JSON-able.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerBasis],
        concept: str = "",
        base_model: str | None = None,
        revision: str | None = None,
        fit: Mapping[str, Any] | None = None,
    ) -> None:
        if not layers:
            raise ConceptBasisError("the concept basis has no layers; expected a LayerBasis for each adapted layer.")
        for name, layer in layers.items():
            if not isinstance(name, str) or not name:
                raise ConceptBasisError(f"{name!r} is no name of a layer; expected the name of a module of the base.")
            if not isinstance(layer, LayerBasis):
                raise ConceptBasisError(f"layer {name} is a {type(layer).__name__}; expected a LayerBasis.")
        self._layers = dict(layers)
        self._concept = concept
        self._base_model = base_model
        self._revision = revision
        self._fit = None if fit is None else _json_copy(fit)

    @property
    def concept(self) -> str:
        """What the concept is called."""
        return self._concept

    @property
    def base_model(self) -> str | None:
        """Identifier of the base model that the basis belongs to, if known."""
        return self._base_model

    @property
    def revision(self) -> str | None:
        """Revision of the base model, if known."""
        return self._revision

    @property
    def fit(self) -> dict[str, Any] | None:
        """A copy of the notes on how the basis was fitted, if known."""
        return copy.deepcopy(self._fit)

    def __getitem__(self, name: str) -> LayerBasis:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        """Equal directions for the same concept of the same base model; notes on the fit do not count."""
        if not isinstance(other, ConceptBasis):
            return NotImplemented
        mine, others = ((b.concept, b.base_model, b.revision) for b in (self, other))
        return mine == others and self._layers == other._layers

    def __hash__(self) -> int:
        return hash((self._concept, frozenset(self._layers)))

    def __repr__(self) -> str:
        return f"ConceptBasis({self._concept!r}, {len(self)} layers, spaces: {', '.join(self.spaces())})"

    def spaces(self) -> tuple[str, ...]:
        """The spaces in which some layer has a basis, in the order of `SPACES`."""
        return tuple(space for space in SPACES if any(layer.k(space) for layer in self.values()))

    @property
    def nbytes(self) -> int:
        """Size of all tensors, which is that of a float32 file but for its header."""
        return sum(x.nbytes for x in self._tensors().values())

    def digest(self) -> str:
        """SHA-256 over names, shapes and float32 values of all directions, whatever the order of layers or file."""
        sha = hashlib.sha256()
        for key, basis in sorted(self._tensors().items()):
            sha.update(json.dumps([key, list(basis.shape)]).encode())
            sha.update(basis.numpy().astype("<f4", copy=False).tobytes())
        return sha.hexdigest()

    def restrict(self, names: Iterable[str]) -> ConceptBasis:
        """The basis of the layers `names` alone.

        Raises:
            ConceptBasisError: If a layer is not in the basis, or none is named.
        """
        names = list(names)
        missing = [name for name in names if name not in self._layers]
        if missing:
            raise ConceptBasisError(f"the concept basis has no layers {', '.join(missing)}; it has {_some(self)}.")
        fit = self.fit
        if fit is not None and "layers" in fit:
            fit["layers"] = {name: fit["layers"][name] for name in names if name in fit["layers"]}
        layers = {name: self._layers[name] for name in names}
        return ConceptBasis(layers, self._concept, self._base_model, self._revision, fit)

    def part(self, prefix: str) -> ConceptBasis | None:
        """The layers whose names begin with `prefix`, such as `text_encoder.`, without it; `None` if there are none."""
        layers = {name.removeprefix(prefix): layer for name, layer in self.items() if name.startswith(prefix)}
        return self.with_layers(layers) if layers else None

    def with_layers(self, layers: Mapping[str, LayerBasis]) -> ConceptBasis:
        """A basis of other layers that is, in all else, this one: concept, base model, revision and fit.

        Raises:
            ConceptBasisError: If there are no layers.
        """
        return ConceptBasis(layers, self._concept, self._base_model, self._revision, self.fit)

    def union(self, *others: ConceptBasis) -> ConceptBasis:
        """The smallest basis that holds this one and all `others`, orthonormal per layer and space.

        Raises:
            ConceptBasisError: If the bases belong to different base models, or the widths of a layer differ.
        """
        parts = (self, *others)
        names = dict.fromkeys(name for part in parts for name in part)
        layers = {name: _joined(name, [part[name] for part in parts if name in part]) for name in names}
        return ConceptBasis(
            layers,
            " + ".join(dict.fromkeys(part.concept for part in parts if part.concept)),
            in_common("bases of different base models", [part.base_model for part in parts], ConceptBasisError),
            in_common("bases of different revisions", [part.revision for part in parts], ConceptBasisError),
            {"method": "union", "parts": [{"concept": part.concept, "fit": part.fit} for part in parts]},
        )

    def overlap(self, other: ConceptBasis) -> dict[str, dict[str, SpaceOverlap]]:
        """Principal angles to another basis, for each layer and space that both have.

        Returns:
            `{module: {space: SpaceOverlap}}`.

        Raises:
            ConceptBasisError: If the widths of a layer differ.
        """
        result: dict[str, dict[str, SpaceOverlap]] = {}
        for name in self:
            mine, its = self[name], other.get(name)
            shared = [space for space in mine.spaces() if its is not None and its.k(space)]
            for space in shared:
                u, v = getattr(mine, space), getattr(its, space)
                _check_widths(name, space, [u, v])
                cosines = principal_cosines(u, v)
                overlap = SpaceOverlap(cosines, float(cosines.square().mean()))
                result.setdefault(name, {})[space] = overlap
        return result

    def summary(self) -> str:
        """A table to read: for each layer and space its width, its directions, and what the fit reported."""
        rows = [("module", "space", "d", "k", "held-out energy", "reference overlap")]
        for name, layer in self.items():
            for space, basis in layer.items():
                note = _entry(self._fit, "layers", name, space)
                shares = (_share(note.get("energy")), _share(note.get("reference_overlap")))
                rows.append((name, space, str(basis.shape[0]), str(basis.shape[1]), *shares))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        title = f"Concept basis of {self._concept!r}" + (f" in {self._base_model}" if self._base_model else "")
        return "\n".join([title, *(line.rstrip() for line in lines)])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the basis to a file, or into an existing folder as `concept_basis.safetensors`.

        The file appears under its name when it is complete: a reader never sees a part of one.

        Returns:
            The file that was written.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "concept": self._concept,
            "base_model": self._base_model,
            "revision": self._revision,
            "fit": None if self._fit is None else json.dumps(self._fit, sort_keys=True),
        }
        return write_tensor_file(path, BASIS_FILE_NAME, self._tensors(), header)

    @classmethod
    def load(cls, path_or_repo_id: str | os.PathLike[str], *, revision: str | None = None) -> ConceptBasis:
        """Read a basis from a file, a folder that holds `concept_basis.safetensors`, or a repository of the Hub.

        Args:
            path_or_repo_id: What exists on disk is read from there; else it is taken as a Hub id.
            revision: Branch, tag or commit of the repository; without meaning for a path.

        Raises:
            ConceptBasisError: If there is no such basis, or the file is not one.
        """
        path = locate_file(path_or_repo_id, BASIS_FILE_NAME, revision=revision, error=ConceptBasisError)
        tensors = read_tensor_file(path, ConceptBasisError, version=FORMAT_VERSION, writer="ConceptBasis.save")
        metadata = tensors.metadata
        fit = read_header_json(metadata, "fit", f"the note on the fit in the header of {path}", ConceptBasisError)
        if fit is not None and not isinstance(fit, dict):
            raise ConceptBasisError(f"{path}: the header's note on the fit is a {type(fit).__name__}, not an object.")
        layers = _layers_of(path, tensors)
        return cls(layers, metadata.get("concept", ""), metadata.get("base_model"), metadata.get("revision"), fit)

    def _tensors(self) -> dict[str, Tensor]:
        """`{module}.{space}` to basis, of shape `(d, k)`."""
        return {f"{name}.{space}": basis for name, layer in self.items() for space, basis in layer.items()}


def _json_copy(fit: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(fit), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConceptBasisError(f"the notes on the fit cannot be written as JSON: {error}.") from error


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _entry(fit: Any, *keys: str) -> Mapping[str, Any]:
    """What notes on a fit hold under `keys`; those of strangers may hold anything."""
    for key in keys:
        fit = fit.get(key) if isinstance(fit, Mapping) else None
    return fit if isinstance(fit, Mapping) else {}


def _share(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _check_widths(name: str, space: str, bases: list[Tensor]) -> None:
    widths = {basis.shape[0] for basis in bases}
    if len(widths) > 1:
        raise ConceptBasisError(
            f"layer {name} has {space} bases of widths {sorted(widths)}; they belong to different models or ranks."
        )


def _joined(name: str, layers: list[LayerBasis]) -> LayerBasis:
    """The union of the bases of one layer."""
    if len(layers) == 1:
        return layers[0]
    spaces: dict[str, Tensor] = {}
    for space in SPACES:
        bases = [getattr(layer, space) for layer in layers if layer.k(space)]
        _check_widths(name, space, bases)
        if bases:
            # Directions that two bases share differ by float32 rounding: those differences are no directions.
            spaces[space] = orthonormal_basis(torch.cat(bases, dim=1).double(), rtol=1e-5)
    return LayerBasis(**spaces)


# Files


def _layers_of(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, LayerBasis]:
    spaces: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, space = key.rpartition(".")
        if space not in SPACES or not name:
            raise ConceptBasisError(
                f"{path}: {key} is no key of a concept basis; expected {{module}}.{{space}} with a space of "
                f"{', '.join(SPACES)}."
            )
        spaces.setdefault(name, {})[space] = tensor
    layers = {}
    for name, bases in spaces.items():
        try:
            layers[name] = LayerBasis(**bases)
        except ConceptBasisError as error:
            raise ConceptBasisError(f"{path}: layer {name}: {error}") from error
    return layers
