"""Contrast batches: the model's inputs that a concept basis is fitted from, as a file.

`fit_concept_basis` notes in the basis how it was fitted, and the digest of its batches. Whoever has these can fit it
anew and compare (`refit`). The publisher hands them over, or publishes them as a data set; they show the concept, which
may be a reason not to.

As a file they are one safetensors file with the tensors `concept.{batch}.{argument}` and
`reference.{batch}.{argument}`; nested arguments are names with dots.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConceptDataError
from .files import read_tensor_file, write_atomically
from .model_arguments import flatten_arguments

__all__ = ["FORMAT_VERSION", "BatchesDigest", "ContrastBatches"]

FORMAT_VERSION = "1"

_HALVES = ("concept", "reference")
_KEY = re.compile(r"(concept|reference)\.(0|[1-9]\d{0,5})\.(\w+(?:\.\w+){0,7})", re.ASCII)

Batch = Mapping[str, Any]


class ContrastBatches:
    """The batches of a concept set and of a reference set, as `fit_concept_basis` takes them.

    Args:
        concept: The model's keyword arguments on each batch that shows the concept: tensors, or mappings of tensors.
        reference: The same of batches that do not.

    Raises:
        ConceptDataError: If there are no concept batches, or one holds something else than tensors.
    """

    def __init__(self, concept: Iterable[Batch], reference: Iterable[Batch] = ()) -> None:
        self.concept, self.reference = ([_flat(batch) for batch in half] for half in (concept, reference))
        """Batches with flat names, such as `added_cond_kwargs.text_embeds`."""
        if not self.concept:
            raise ConceptDataError("there are no concept batches; expected at least one.")

    def __repr__(self) -> str:
        return f"ContrastBatches({len(self.concept)} of the concept, {len(self.reference)} of the reference)"

    def digest(self) -> str:
        """SHA-256, in hexadecimal, over names, dtypes, shapes and values of all batches."""
        digest = BatchesDigest()
        for half, batches in zip(_HALVES, (self.concept, self.reference), strict=True):
            for batch in batches:
                digest.add(half, batch)
        return str(digest.hexdigest())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the batches to a file, which appears under its name when it is complete.

        Returns:
            The file.
        """
        from safetensors.torch import save

        tensors = {
            # A copy: halves share timesteps and the like, which the format does not know.
            f"{half}.{index}.{name}": tensor.detach().cpu().contiguous().clone()
            for half, batches in zip(_HALVES, (self.concept, self.reference), strict=True)
            for index, batch in enumerate(batches)
            for name, tensor in batch.items()
        }
        write_atomically(Path(path), save(tensors, metadata={"format_version": FORMAT_VERSION}))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ContrastBatches:
        """Read batches from a file, and believe nothing in it.

        Raises:
            ConceptDataError: If there is no such file, or it is malformed.
        """
        path = Path(path)
        if not path.is_file():
            raise ConceptDataError(f"{path} does not exist; expected a file of contrast batches.")
        file = read_tensor_file(path, ConceptDataError, version=FORMAT_VERSION, writer="ContrastBatches.save")
        found: dict[str, dict[int, dict[str, Tensor]]] = {half: {} for half in _HALVES}
        for key in file:
            match = _KEY.fullmatch(key)
            if match is None:
                raise ConceptDataError(
                    f"{path} holds {key[:80]!r}; expected names concept.(batch).(argument) or "
                    "reference.(batch).(argument)."
                )
            half, index, name = match.groups()
            found[half].setdefault(int(index), {})[name] = file[key]
        for half, batches in found.items():
            if batches and max(batches) != len(batches) - 1:
                raise ConceptDataError(f"the {half} batches in {path} are not numbered 0, 1, 2 and so on; refused.")
        return cls(*([batches[index] for index in sorted(batches)] for batches in found.values()))


class BatchesDigest:
    """The digest of :class:`ContrastBatches`, taken of batches as they come by."""

    def __init__(self) -> None:
        self._halves = {half: hashlib.sha256() for half in _HALVES}
        self._known = True

    def add(self, half: str, batch: Any) -> None:
        """Take in the next batch of one half, `concept` or `reference`."""
        if not self._known:
            return
        try:
            tensors = _flat(batch)
        except ConceptDataError:
            # Pictures, strings, objects: what the model gets of them depends on code.
            self._known = False
            return
        sha = self._halves[half]
        sha.update(f"{len(tensors)} tensors".encode())
        for name, tensor in sorted(tensors.items()):
            sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def hexdigest(self) -> str | None:
        """The digest; `None` if some batch holds something else than tensors."""
        if not self._known:
            return None
        return hashlib.sha256("".join(sha.hexdigest() for sha in self._halves.values()).encode()).hexdigest()


def _flat(batch: Any) -> dict[str, Tensor]:
    """Tensors by names with dots."""
    if not isinstance(batch, Mapping):
        raise ConceptDataError(f"a batch is a {type(batch).__name__}; expected a mapping of tensors by argument.")
    flat = flatten_arguments(batch)
    for name, value in flat.items():
        if not isinstance(value, Tensor):
            raise ConceptDataError(f"{name} is a {type(value).__name__}; expected a tensor.")
    return flat
