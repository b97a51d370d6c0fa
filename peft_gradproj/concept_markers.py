"""The networks that find a concept in latents, kept: what `gradproj mask` learned, for pictures that are encoded anew.

As a file they are one safetensors file with a tensor `{number}.{name}` for each network and each of its weights, and a
header with `format_version`, `concept`, `resolution`, `dilation`, `latent_channels` and, for each network, its share
in `labelled_shares`. `vae_answer`, which files of before have not, is how the VAE of the latents answers to a picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .diffusion_inputs import ANSWER_GRID, dilated
from .errors import ConceptDataError
from .files import locate_file, read_header_json, read_tensor_file, write_tensor_file
from .masks import ConceptMarker, mark_by_any, marker_network
from .untrusted import shown

__all__ = ["FORMAT_VERSION", "MARKERS_FILE_NAME", "ConceptMarkers"]

MARKERS_FILE_NAME = "concept_markers.safetensors"
FORMAT_VERSION = "1"

MAX_VAE_DISTANCE = 0.2
"""How far, relatively, a VAE's answer may be from that of the markers' own. Half precision makes less than 0.01, other
weights made at least 0.46, and the scaling factors of Stable Diffusion and of XL alone make 0.28."""


class ConceptMarkers:
    """Networks that learned from different pictures, and mark together.

    A network misses more in the pictures that it learned from than in others: it was told that what they showed before
    was not pasted. Where masks are drawn once for all pictures, each is therefore marked by a network that did not see
    it. Here it is not known which did. A place is marked where any network marks it, which errs on the side of leaving
    something out of the loss.

    Args:
        markers: As `fit_markers` gives them, at least one, for latents of the same number of channels.
        resolution: The shorter side of the pictures in which they learned to find it, in pixels.
        dilation: By how many latents what was found is widened.
        concept: What is found, in words.
        vae_answer: How the VAE answers whose latents they learned from, a :func:`~.diffusion_inputs.vae_answer`;
            `None` if that is not known.

    Raises:
        ConceptDataError: If there is none, they do not go together, or a number is out of range.
    """

    def __init__(
        self,
        markers: Sequence[ConceptMarker],
        *,
        resolution: int,
        dilation: int = 0,
        concept: str = "",
        vae_answer: Tensor | None = None,
    ) -> None:
        if not markers:
            raise ConceptDataError("there is no network to mark with; expected at least one.")
        self.markers = tuple(markers)
        self.resolution, self.dilation, self.concept, self.vae_answer = resolution, dilation, concept, vae_answer
        if len({marker.channels for marker in self.markers}) > 1:
            raise ConceptDataError("the networks take latents of different numbers of channels; expected one number.")
        if resolution < 1 or dilation < 0 or not all(0 < marker.labelled_share <= 1 for marker in self.markers):
            raise ConceptDataError(
                f"resolution={resolution}, dilation={dilation}, labelled shares "
                f"{[marker.labelled_share for marker in self.markers]}; expected at least 1, at least 0, in (0, 1]."
            )
        if vae_answer is not None and vae_answer.shape != (self.channels, ANSWER_GRID, ANSWER_GRID):
            raise ConceptDataError(
                f"the VAE's answer has shape {tuple(vae_answer.shape)}; expected "
                f"{(self.channels, ANSWER_GRID, ANSWER_GRID)}, as of vae_answer()."
            )

    @property
    def channels(self) -> int:
        """How many channels the latents have."""
        return self.markers[0].channels

    def __repr__(self) -> str:
        return (
            f"ConceptMarkers({self.concept!r}, {len(self.markers)} networks, {self.channels} channels, "
            f"resolution={self.resolution}, dilation={self.dilation})"
        )

    def check_vae(self, answer: Tensor) -> None:
        """Refuse a VAE other than that whose latents the networks learned from, if it is known.

        Args:
            answer: How it answers, a :func:`~.diffusion_inputs.vae_answer`.

        Raises:
            ConceptDataError: If it is another one. In its latents they would find nothing, or anything.
        """
        if self.vae_answer is None:
            return
        distance = float((answer - self.vae_answer).norm() / self.vae_answer.norm().clamp_min(1e-12))
        # What is no number is no small one.
        if not distance <= MAX_VAE_DISTANCE:
            raise ConceptDataError(
                f"the VAE's latents of a test picture differ by {distance:.0%} from those of the VAE that the concept "
                "markers were made with: in these they would find nothing, or anything. Make the markers with "
                "`gradproj mask` on the base model that is trained."
            )

    @torch.no_grad()
    def mark(self, latents: Tensor) -> Tensor:
        """Where the concept is.

        Args:
            latents: As the denoiser is trained on, shape `(N, C, h, w)`. The networks move to their device.

        Returns:
            1 where any network finds it, widened, and 0 elsewhere, float32, shape `(N, 1, h, w)`.
        """
        # A loop in mixed precision must not change what is found.
        with torch.autocast(latents.device.type, enabled=False):
            for marker in self.markers:
                marker.network.to(latents.device)
            found = mark_by_any(self.markers, latents.float())
        return dilated(found, self.dilation)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the networks to a file, or into an existing folder as `concept_markers.safetensors`.

        The file appears under its name when it is complete.

        Returns:
            The file that was written.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "concept": self.concept,
            "resolution": str(self.resolution),
            "dilation": str(self.dilation),
            "latent_channels": str(self.channels),
            "labelled_shares": json.dumps([marker.labelled_share for marker in self.markers]),
            "vae_answer": None if self.vae_answer is None else json.dumps(self.vae_answer.flatten().tolist()),
        }
        tensors = {
            f"{number}.{name}": tensor.cpu().contiguous()
            for number, marker in enumerate(self.markers)
            for name, tensor in marker.network.state_dict().items()
        }
        return write_tensor_file(path, MARKERS_FILE_NAME, tensors, header)

    @classmethod
    def load(cls, path_or_repo_id: str | os.PathLike[str], *, revision: str | None = None) -> ConceptMarkers:
        """Read networks from a file, a folder that holds `concept_markers.safetensors`, or a repository of the Hub.

        Args:
            path_or_repo_id: What exists on disk is read from there; else it is taken as a Hub id.
            revision: Branch, tag or commit of the repository; without meaning for a path.

        Raises:
            ConceptDataError: If there is no such file, or it is malformed.
        """
        path = locate_file(path_or_repo_id, MARKERS_FILE_NAME, revision=revision, error=ConceptDataError)
        file = read_tensor_file(path, ConceptDataError, version=FORMAT_VERSION, writer="`gradproj mask`")
        header = file.metadata
        channels = _whole(header, "latent_channels", path, 1, 2**10)
        tensors, markers = dict(file), []
        for number, share in enumerate(_shares(header, path)):
            markers.append(_marker(number, share, channels, tensors, path))
        if tensors:
            raise ConceptDataError(f"{path} holds {shown(sorted(tensors))}, which is of no network; refused.")
        return cls(
            markers,
            resolution=_whole(header, "resolution", path, 1, 2**16),
            dilation=_whole(header, "dilation", path, 0, 2**10),
            concept=header.get("concept", ""),
            vae_answer=_answer(header, channels, path),
        )


def _marker(number: int, share: float, channels: int, tensors: dict[str, Tensor], path: Path) -> ConceptMarker:
    """The network of a number, whose tensors are taken out of `tensors`."""
    # Without memory and without random numbers, both of which the file has.
    with torch.device("meta"):
        network = marker_network(torch.empty(2, channels, 1, 1))
    state = {}
    for name, expected in network.state_dict().items():
        tensor = tensors.pop(f"{number}.{name}", None)
        if tensor is None or tensor.shape != expected.shape or tensor.dtype != torch.float32:
            raise ConceptDataError(
                f"{path}: {number}.{name} is {_described(tensor)}; expected float32 of shape "
                f"{tuple(expected.shape)}. It is no file of `gradproj mask`, or damaged."
            )
        if not torch.isfinite(tensor).all():
            raise ConceptDataError(f"{path}: {number}.{name} has values that are not finite; make the file anew.")
        state[name] = tensor.clone()
    network.load_state_dict(state, assign=True)
    return ConceptMarker(network.eval().requires_grad_(False), share)


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _shares(header: Mapping[str, str], path: Path) -> list[float]:
    shares = _value(header, "labelled_shares", path)
    if not isinstance(shares, list) or not shares or not all(type(s) is float and 0 < s <= 1 for s in shares):
        raise ConceptDataError(f"{path}: labelled_shares is {shown(shares)}; expected a list of numbers in (0, 1].")
    return shares


def _answer(header: Mapping[str, str], channels: int, path: Path) -> Tensor | None:
    if "vae_answer" not in header:
        return None
    values = _value(header, "vae_answer", path)
    count = channels * ANSWER_GRID**2
    if not isinstance(values, list) or len(values) != count or not all(type(value) is float for value in values):
        raise ConceptDataError(f"{path}: vae_answer is {shown(values)}; expected a list of {count} numbers.")
    return torch.tensor(values).unflatten(0, (channels, ANSWER_GRID, ANSWER_GRID))


def _whole(header: Mapping[str, str], key: str, path: Path, least: int, most: int) -> int:
    value = _value(header, key, path)
    if type(value) is not int or not least <= value <= most:
        raise ConceptDataError(f"{path}: {key} is {shown(value)}; expected a whole number from {least} to {most}.")
    return value


def _value(header: Mapping[str, str], key: str, path: Path) -> Any:
    return read_header_json(header, key, f"{key} in the header of {path}", ConceptDataError)
