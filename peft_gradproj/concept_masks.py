"""Masks of a concept in training pictures that nobody has labelled, for any pipeline's pictures.

The pictures are divided into two folds. On the latents of each fold, onto which the concept is pasted, a small network
learns to find it (`masks`), and marks the pictures of the other fold. The same networks say how much of what was pasted
onto the other fold they find: an estimate of what they miss. Rows with equal pictures, as of data with several captions
a picture, are in one fold: a network that learned from a picture takes what it shows for not pasted.

A concept that pictures show can be found: an overlay, which is pasted; pairs, whose other halves are what it is not; or
pictures with masks, where the training pictures, unlabelled, take the place of the other halves.

Pictures are scaled such that their shorter side has the resolution, and seen in squares, as the networks have learned
them: as many that overlap by half as the longer side takes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .clock import Clock
from .concept_fit import Concept, iter_concept_examples
from .concept_markers import ConceptMarkers
from .concepts import ConceptSet, Overlay, nth_of_shuffles
from .diffusion_inputs import dilated, mask_weights, vae_answer
from .errors import ConceptDataError
from .masks import GUARDED_SHARE, ConceptMarker, fit_markers, guarded, places
from .pipelines import PictureEncoder, checked_resolution, load_encoder
from .telling_phrases import TellingPhrase, find_telling_phrases
from .training_data import TrainingData, draw_frame

__all__ = ["ConceptMasks", "MaskReport", "find_concept"]

FOLDS = 2
CELLS_IN_A_STEP = 2**16
"""A training step of the networks sees about so many latents' places, whatever the resolution."""
GRID = 64
"""Rows and columns of the grid on which places in pictures of different sizes are compared."""
NAMED = 20
"""So many pictures that cannot be read are named in an error."""
CROP = 0.5
"""The networks learn from parts of the squares, and so not where in the pictures they are."""


# Results


class ConceptMasks(Sequence[Image.Image]):
    """Where the concept is in pictures: mode L, 255 there and 0 elsewhere, each of its picture's size.

    They are kept at the resolution of the latents, and drawn when they are asked for.

    Args:
        cells: For each picture an array of bool, shape `(h, w)`.
        sizes: Widths and heights of the pictures, as many.
        markers: The networks that found it, where they are kept.
    """

    def __init__(
        self,
        cells: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        markers: ConceptMarkers | None = None,
    ) -> None:
        self.cells, self.sizes, self.markers = tuple(cells), tuple(sizes), markers

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def marked(self) -> int:
        """In how many pictures anything is masked."""
        return sum(bool(marked.any()) for marked in self.cells)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> ConceptMasks: ...

    def __getitem__(self, index: int | slice) -> Image.Image | ConceptMasks:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        levels = Image.fromarray(self.cells[index].astype(np.uint8) * 255)
        return levels.resize(self.sizes[index], Image.Resampling.NEAREST)

    def areas(self) -> list[float]:
        """Of each picture the share that is masked."""
        return [float(marked.mean()) for marked in self.cells]

    def select(self, indices: Sequence[int]) -> ConceptMasks:
        """The masks of some of the pictures, as `datasets` selects their rows."""
        return ConceptMasks([self.cells[i] for i in indices], [self.sizes[i] for i in indices], self.markers)

    def guarded(self, *, share: float = GUARDED_SHARE) -> ConceptMasks:
        """Masks that, in pictures in which the concept was not found where others show it, cover that as well.

        See :func:`peft_gradproj.masks.guarded`. Places in pictures of different sizes are the same if they lie at the
        same share of width and height.

        Args:
            share: Of the pictures in which it was found; what fewer of them show it at is not covered.
        """
        grids = self._grids()
        cells = list(self.cells)
        for number, covered in enumerate(guarded(grids, share=share)):
            # What stays as it is stays so to the cell: grids are coarse.
            if not torch.equal(covered, grids[number]):
                cells[number] = _resampled(covered[0].numpy(), cells[number].shape)[0, 0].numpy()
        return ConceptMasks(cells, self.sizes, self.markers)

    def places(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where the middle eight in ten of the pictures show the concept, as an overlay's ranges `across` and `down`.

        See :func:`peft_gradproj.masks.places`. What is found by mistake lies anywhere, and is mostly left out.

        Raises:
            ConceptDataError: If nothing is masked.
        """
        return places(self._grids(), quantile=0.1)

    def _grids(self) -> Tensor:
        """All masks at one size, bool, shape `(N, 1, GRID, GRID)`."""
        return torch.cat([_resampled(marked, (GRID, GRID)) for marked in self.cells])


def _resampled(marked: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """Marks of shape `(h, w)` at another size, widened rather than lost; bool, shape `(1, 1, *size)`."""
    return F.adaptive_max_pool2d(torch.from_numpy(marked).float()[None, None], size).bool()


@dataclass(frozen=True)
class MaskReport:
    """What was found, and how far it can be trusted."""

    pictures: int
    found: int
    """In so many of them the concept was found."""
    guarded: int
    """In so many it was not found where others show it, and that is masked as well."""
    across: tuple[float, float] | None
    """Where it was found across the middle eight in ten of them, as of an `Overlay`; `None` if in no picture."""
    down: tuple[float, float] | None
    """The same down the pictures."""
    area: float
    """Share of the pictures' area that is masked, mean over all pictures."""
    recall: float
    """Share of a pasted concept's area that is masked, mean over pictures that the network had not learned from. An
    estimate for what was pasted, or given with the concept, not for what is in the pictures."""
    recall_error: float
    """Its standard error over the pictures, for these two networks; 0, which proves nothing, where all was found."""
    recall_pictures: int
    """How many it was estimated on."""
    labelled_share: list[float]
    """Of either network, see `ConceptMarker`: near 1 where only what was pasted shows the concept."""
    resolution: int
    """The shorter side of the pictures in which it was looked for, in pixels."""
    pairs: int
    """Examples that either network learned from."""
    seconds: dict[str, float]
    """Of each part: `pictures`, `load`, `examples`, `networks`, `marks`."""
    telling_phrases: list[TellingPhrase]
    """Phrases that captions of pictures in which it was found have, and others have not, or less often: they may name
    the concept, and are better taken out."""
    left_out: int = 0
    """So many pictures are not in that copy, since too much of them is masked."""
    leave_out_above: float = 1.0
    """The share of a picture, in [0, 1], above which that is too much."""
    captions_changed: int = 0
    """From so many of the captions in the copy a phrase was taken out."""
    folder: str | None = None
    """Where a copy of the pictures with the masks was written, if it was."""

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        written = f"\nwritten to {self.folder}" if self.folder else ""
        if self.left_out:
            written += f", but for {self.left_out} pictures of which more than {self.leave_out_above:.1%} is masked"
        if self.captions_changed:
            written += f"; phrases were taken out of {self.captions_changed} captions"
        return (
            f"found in {self.found} of {self.pictures} pictures, guarded against in {self.guarded}; "
            f"{self.area:.1%} of their area is masked\n"
            f"{self._where()}{self._named()}"
            f"recall: {self.recall:.1%} of the concept's area (standard error {self.recall_error:.1%}) in "
            f"{self.recall_pictures} examples that the network had not seen; these were pasted or given, and what is "
            "in the pictures may be harder to find\n"
            f"{sum(self.seconds.values()):.1f} s, at a resolution of {self.resolution}{written}"
        )

    def _where(self) -> str:
        if self.across is None or self.down is None:
            return ""
        across, down = (f"{low:.2f} {high:.2f}" for low, high in (self.across, self.down))
        return f"eight in ten lie within --across {across}, as many within --down {down}, 0 to 1 over the picture\n"

    def _named(self) -> str:
        if not self.telling_phrases:
            return ""
        phrases = ", ".join(
            f"{told.phrase!r} is in {told.shown} of their captions and {told.others} others"
            for told in self.telling_phrases
        )
        return (
            f"captions may name it: {phrases}. What these pictures teach beside it is tied to its name then; take what "
            "names it out of the captions, with --remove-phrase\n"
        )


# Finding


def find_concept(
    pipeline_or_id: Any,
    concept: Concept,
    data: TrainingData,
    *,
    name: str = "",
    resolution: int | None = None,
    num_pairs: int = 384,
    steps: int = 300,
    dilation: int = 0,
    guard: bool = False,
    batch_size: int = 4,
    revision: str | None = None,
    variant: str | None = None,
    device: str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> tuple[ConceptMasks, MaskReport]:
    """Mark a concept in training pictures, each by a network that learned from others.

    Pictures are read one by one, all of them once before the work begins, so that none is found unreadable when it is
    nearly done; the latents of the examples are kept, about `2 * num_pairs` times those of a picture.

    Args:
        pipeline_or_id: A pipeline of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5, its folder, or its Hub id, of which only
            the VAE is loaded then, in float32.
        concept: An overlay, pairs, or pictures with masks; the latter two at least two.
        data: The training pictures, at least two different ones. Captions only tell which phrases may name the concept.
        name: What the concept is called.
        resolution: The shorter side to which pictures are scaled to look for it; what the pipeline makes by default. It
            need not be that of the training, but the concept has to be seen at it.
        num_pairs: Examples that each network learns from, at least 16; every picture is used once before one is used
            twice.
        steps: Training steps of each network.
        dilation: By how many latents to widen what was found. A latent depends on its neighbours' pixels, too, so that
            a margin is the safer choice; on small latents it takes much of the picture.
        guard: Mask also, in pictures in which it was not found where others show it, these places
            (:meth:`ConceptMasks.guarded`).
        batch_size: Pictures that the VAE encodes at once.
        revision: Branch, tag or commit on the Hub, if the pipeline is loaded here.
        variant: Of its weights, such as `fp16`, likewise.
        device: Where to, likewise.
        progress: Show progress bars.
        seed: Of everything that is random: crops, places of the overlay, the networks' start and order.

    Returns:
        The masks of the pictures, in their order, turned upright where they have an EXIF orientation, with the networks
        as their `markers`; and the report.

    Raises:
        ConceptDataError: If the pipeline is of no known family, the concept is words, pictures cannot be read, or it
            and the data do not give examples for both networks.
    """
    if min(num_pairs - 15, steps, batch_size, dilation + 1) < 1:
        raise ConceptDataError(
            f"num_pairs={num_pairs}, steps={steps}, batch_size={batch_size}, dilation={dilation}; expected at least "
            "16, 1, 1 and 0."
        )
    clock = Clock()
    findable = _findable(concept, data)
    with clock("pictures"), _bar("pictures", len(data), progress) as bar:
        firsts = _first_rows(data, bar)
    different = sorted({*firsts})
    sources = _sources(findable, data, different)
    with clock("load"):
        if isinstance(pipeline_or_id, str | Path):
            encoder = load_encoder(str(pipeline_or_id), revision=revision, variant=variant, device=device)
        else:
            encoder = PictureEncoder.of(pipeline_or_id)
    side = checked_resolution(encoder, resolution)

    with clock("examples"), _bar("examples", FOLDS * num_pairs, progress) as bar:
        examples = [
            _encoded(source, encoder, side, num_pairs, batch_size, FOLDS * seed + number, bar)
            for number, source in enumerate(sources)
        ]
    with clock("networks"), _bar("networks", FOLDS * steps, progress) as bar:
        markers = fit_markers(
            [(fold.latents, fold.masks) for fold in examples],
            steps=steps,
            batch_size=max(8, min(64, CELLS_IN_A_STEP // examples[0].masks[0].numel())),
            crop=CROP,
            seed=seed,
            progress=lambda done: bar.update(done - bar.n),
        )
    recalls = torch.cat([fold.recalls(marker, dilation) for fold, marker in zip(examples, markers, strict=True)])
    marks: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
    with clock("marks"), _bar("masks", len(different), progress) as bar:
        for number, row in enumerate(different):
            picture, _ = data[row]
            marked = _marked(picture, encoder, markers[number % FOLDS], side, dilation, batch_size)
            marks[row] = marked, picture.size
            bar.update()
    cells, sizes = zip(*(marks[first] for first in firsts), strict=True)

    about: Any = {"concept": name, "vae_answer": vae_answer(encoder.vae)}
    kept = ConceptMarkers(markers, resolution=side, dilation=dilation, **about)
    found = ConceptMasks(cells, sizes, kept)
    masks = found.guarded() if guard else found
    across, down = found.places() if found.marked else (None, None)
    report = MaskReport(
        pictures=len(data),
        found=found.marked,
        guarded=sum(not np.array_equal(*pair) for pair in zip(found.cells, masks.cells, strict=True)),
        across=across,
        down=down,
        area=float(np.mean(masks.areas())),
        recall=float(recalls.mean()),
        recall_error=float(recalls.std() / math.sqrt(len(recalls))),
        recall_pictures=len(recalls),
        labelled_share=[marker.labelled_share for marker in markers],
        resolution=side,
        pairs=num_pairs,
        seconds=clock.seconds,
        telling_phrases=find_telling_phrases(
            [data.caption(row) for row in range(len(data))], [bool(marked.any()) for marked in cells]
        ),
    )
    return masks, report


def _bar(name: str, total: int, wanted: bool) -> Any:
    return tqdm(total=total, desc=name, disable=not wanted)


# Examples


@dataclass(frozen=True)
class _Source:
    """What examples of the concept are made of."""

    concept: Overlay | ConceptSet
    data: TrainingData

    def __len__(self) -> int:
        """How many examples have different pictures."""
        return len(self.data) if isinstance(self.concept, Overlay) else len(self.concept)

    def parts(self, count: int) -> list[tuple[_Source, int]]:
        """What to learn from and what the labelled share is measured on, an eighth, each with a number of examples.

        They share pictures only where there are few.
        """
        held_out = count // 8
        if len(self) < 16:
            return [(self, count - held_out), (self, held_out)]
        chosen = [[i for i in range(len(self)) if (i % 8 == 7) == last] for last in (False, True)]
        return [(self._selected(chosen[0]), count - held_out), (self._selected(chosen[1]), held_out)]

    def _selected(self, indices: Sequence[int]) -> _Source:
        if isinstance(self.concept, Overlay):
            return replace(self, data=self.data.select(indices))
        return replace(self, concept=ConceptSet([self.concept[i] for i in indices]))

    def examples(
        self, count: int, side: int, seed: int
    ) -> Iterator[tuple[Image.Image, Image.Image, Image.Image | None]]:
        """Squares with the concept, masks of it, and squares without it, or unlabelled, where they say more."""
        examples = iter_concept_examples(self.concept, self.data, count=count, resolution=side, seed=seed)
        for number, example in enumerate(examples):
            assert example.mask is not None
            other = example.without
            if isinstance(self.concept, Overlay):
                other = None
            elif other is None:
                other = self._plain(number, side, seed)
            yield example.picture, example.mask, other

    def _plain(self, number: int, side: int, seed: int) -> Image.Image:
        picture, _ = self.data[nth_of_shuffles(number, len(self.data), seed)]
        frame = draw_frame(picture.size, side, center=False, generator=np.random.default_rng([seed, 3, number]))
        return frame.apply(picture)


def _findable(concept: Concept, data: TrainingData) -> Overlay | ConceptSet:
    """The concept, if pictures show it and there are enough."""
    if not isinstance(concept, Overlay | ConceptSet):
        raise ConceptDataError(
            "words cannot be found in pictures; give the concept as an overlay, as pairs, or as pictures with masks."
        )
    _check_count("training pictures", len(data))
    if isinstance(concept, ConceptSet):
        _check_count("examples", len(concept))
    return concept


def _check_count(what: str, count: int) -> None:
    if count < FOLDS:
        raise ConceptDataError(
            f"{count} of {what} cannot be divided into {FOLDS} folds, one to learn from and one to look at."
        )


def _first_rows(data: TrainingData, bar: Any) -> list[int]:
    """For each row the first one whose picture looks the same, pixel for pixel: itself, where there is no other.

    Raises:
        ConceptDataError: If pictures cannot be read, which names them all.
    """
    known: dict[bytes, int] = {}
    firsts: list[int] = []
    failed: list[str] = []
    for row in range(len(data)):
        try:
            shown = data[row][0].convert("RGB")
        except ConceptDataError as error:
            failed.append(str(error))
        else:
            # In memory are the digests and not the pictures.
            digest = hashlib.sha256(shown.tobytes())
            digest.update(repr(shown.size).encode())
            firsts.append(known.setdefault(digest.digest(), row))
        bar.update()
    if failed:
        more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        raise ConceptDataError(
            f"{len(failed)} of the {len(data)} pictures cannot be used; mend them or leave them out: "
            f"{'; '.join(failed[:NAMED])}{more}"
        )
    return firsts


def _sources(concept: Overlay | ConceptSet, data: TrainingData, different: Sequence[int]) -> list[_Source]:
    """For each fold of the training pictures, of which the rows of the different ones are given."""
    _check_count("different training pictures", len(different))
    sources = []
    for fold in range(FOLDS):
        part = concept if isinstance(concept, Overlay) else concept[fold::FOLDS]
        sources.append(_Source(part, data.select(different[fold::FOLDS])))
    return sources


@dataclass(frozen=True)
class _Examples:
    """Encoded examples of a fold."""

    latents: Tensor
    """Shape `(M, C, h, w)`, the last eighth to measure the labelled share on."""
    masks: Tensor
    """Where the concept is, in [0, 1], shape `(M, 1, h, w)`."""
    different: Tensor
    """Indices of some that show the concept in different pictures."""

    def recalls(self, marker: ConceptMarker, dilation: int) -> Tensor:
        """Of the different ones the share of the concept's places that are marked, shape `(n,)`."""
        there = self.masks[self.different] > 0.5
        marks = marker.mark(self.latents[self.different], dilation=dilation).to(there.device)
        return ((marks * there).sum((1, 2, 3)) / there.sum((1, 2, 3))).cpu()


def _encoded(
    source: _Source, encoder: PictureEncoder, side: int, count: int, batch_size: int, seed: int, bar: Any
) -> _Examples:
    latents: list[Tensor] = []
    masks: list[Tensor] = []
    different: list[int] = []
    row = 0
    for number, (part, size) in enumerate(source.parts(count)):
        examples = part.examples(size, side, 2 * seed + number)
        new = min(len(part), len(source) - len(different))
        while batch := list(islice(examples, batch_size)):
            pictures: list[Image.Image] = []
            shown: list[Image.Image] = []
            for picture, mask, other in batch:
                if new > 0:
                    different.append(row + len(pictures))
                    new -= 1
                pictures.append(picture)
                shown.append(mask)
                if other is not None:
                    # In turns, so that any part of them holds both.
                    pictures.append(other)
                    shown.append(Image.new("L", other.size))
            latents.append(encoder.latents(pictures, batch_size=batch_size))
            masks.append(_latent_masks(shown, latents[-1]))
            row += len(pictures)
            bar.update(len(batch))
    return _Examples(torch.cat(latents), torch.cat(masks), torch.tensor(different))


def _latent_masks(masks: Sequence[Image.Image], latents: Tensor) -> Tensor:
    weights = mask_weights(masks, latents)
    # A faint overlay is as much the concept as an opaque one.
    return (weights / weights.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)).to(latents.device)


# Marks


def _marked(
    picture: Image.Image, encoder: PictureEncoder, marker: ConceptMarker, side: int, dilation: int, batch_size: int
) -> np.ndarray:
    """Where the concept is in a picture, bool, shape `(h, w)` of its latents when it is scaled to a resolution."""
    step = encoder.resolution_step
    width, height = (max(side, round(length * side / min(picture.size) / step) * step) for length in picture.size)
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    corners = [(left, top) for top in _starts(height, side, step) for left in _starts(width, side, step)]
    squares = [scaled.crop((left, top, left + side, top + side)) for left, top in corners]
    marks = marker.mark(encoder.latents(squares, batch_size=batch_size), dilation=0).cpu()
    cells = marks.shape[-1]
    factor = side // cells
    whole = torch.zeros(1, 1, height // factor, width // factor)
    for (left, top), mark in zip(corners, marks, strict=True):
        rows, columns = (slice(start // factor, start // factor + cells) for start in (top, left))
        whole[0, :, rows, columns] = whole[0, :, rows, columns].maximum(mark)
    return dilated(whole, dilation)[0, 0].bool().numpy()


def _starts(length: int, side: int, step: int) -> list[int]:
    """Where squares begin that cover a length, and overlap by half or more."""
    room = length - side
    gaps = max(1, math.ceil(2 * room / side))
    return sorted({round(number * room / gaps / step) * step for number in range(gaps + 1)})
