"""Many tensors as few vectors, for what is computed on all parameters of an adapter at once.

An adapter has hundreds of small parameters, and what is done to them is cheap: most of the time went into calls, of
which a GPU pays each as a launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Blocks"]

_CPU_LIMIT, _LIMIT = 2**17, 2**22
"""So many elements a vector has at most, but for a single larger tensor. Copies of all parameters in one would add to
the peak memory; on a CPU, what does not fit into the cache is three times as slow."""

_SMALL = 2**20
"""Copies of so many elements, 4 MB, are worth the time that making their vectors again would take."""


@dataclass(frozen=True)
class _Like:
    """What is known of a tensor; not the tensor, which would live as long as the layout."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype


@dataclass
class _Block:
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


class Blocks:
    """A layout of named tensors as vectors, each of one device and dtype.

    Args:
        like: The tensors, of any shapes, whose order, devices and dtypes are those of the vectors.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self._like = {name: _Like(tensor.shape, tensor.device, tensor.dtype) for name, tensor in like.items()}
        self._blocks: list[_Block] = []
        open_blocks: dict[tuple[torch.device, torch.dtype], _Block] = {}
        for name, tensor in like.items():
            kind = (tensor.device, tensor.dtype)
            block = open_blocks.get(kind)
            limit = _CPU_LIMIT if tensor.device.type == "cpu" else _LIMIT
            if block is None or sum(block.sizes) + tensor.numel() > limit:
                block = open_blocks[kind] = _Block()
                self._blocks.append(block)
            block.names.append(name)
            block.sizes.append(tensor.numel())

    def join(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Vectors of the values of `tensors`, in their own dtype.

        Args:
            tensors: Of the shapes of the layout or of no dimension; where one is missing, there are zeros.
        """
        return list(_Joined(self, tensors))

    def joined(self, tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The same vectors, each made when it is asked for: all of them at once would be one more copy.

        Unless that is small.
        """
        small = sum(sum(block.sizes) for block in self._blocks) <= _SMALL
        return self.join(tensors) if small else _Joined(self, tensors)

    def _vector(self, number: int, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([self._flat(name, tensors.get(name)) for name in self._blocks[number].names])

    def _flat(self, name: str, tensor: Tensor | None) -> Tensor:
        like = self._like[name]
        if tensor is None:
            return torch.zeros(like.shape.numel(), dtype=like.dtype, device=like.device)
        return tensor.to(like.device).expand(like.shape).reshape(-1)

    def split(self, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views of vectors as tensors of the layout's names and shapes."""
        found = {}
        for block, vector in zip(self._blocks, vectors, strict=True):
            for name, part in zip(block.names, vector.split(block.sizes), strict=True):
                found[name] = part.view(self._like[name].shape)
        return found

    def sums(self, vectors: Iterable[Tensor]) -> Tensor:
        """The sum of each named tensor that `vectors` hold, in the order of `names`, on the first device."""
        parts = [
            torch.segment_reduce(vector, "sum", lengths=torch.tensor(block.sizes, device=vector.device))
            for block, vector in zip(self._blocks, vectors, strict=True)
        ]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def __eq__(self, other: object) -> bool:
        """Whether vectors of the one are laid out as those of the other."""
        if self is other:
            return True
        return isinstance(other, Blocks) and self._blocks == other._blocks and self._like == other._like

    @property
    def names(self) -> list[str]:
        """All names, block by block."""
        return [name for block in self._blocks for name in block.names]

    def __len__(self) -> int:
        """How many vectors there are."""
        return len(self._blocks)


class _Joined(Sequence[Tensor]):
    def __init__(self, blocks: Blocks, tensors: Mapping[str, Tensor]) -> None:
        self._blocks, self._tensors = blocks, tensors

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._blocks._vector(range(len(self))[index], self._tensors)
