"""Masks of a concept in training pictures that nobody has labelled, for any pipeline's pictures.

The pictures are divided into two folds. On the latents of each fold, onto which the concept is pasted, a small network
learns to find it (`masks`), and marks the pictures of the other fold. The same networks say how much of what was pasted
onto the other fold they find: an estimate of what they miss. Rows with equal pictures, as of data with several captions
a picture, are in one fold: a network that learned from a picture takes what it shows for not pasted.

A concept that pictures show can be found: an overlay, which is pasted; pairs, whose other halves are what it is not; or
pictures with masks, where the training pictures, unlabelled, take the place of the other halves.

What was missed is looked for once more, if that is asked for, in the pictures in which nothing was marked: by networks
that learned from the marked ones, and so what the concept is like in these very pictures (a *second look*, which is
self-training). Masks that the pictures have already, as a detector's, can be completed in the same way.

Pictures are scaled such that their shorter side has the resolution, and seen in squares, as the networks have learned
them: as many that overlap by half as the longer side takes.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .clock import Clock
from .concept_fit import Concept, NothingLeftError, iter_concept_examples
from .concept_markers import ConceptMarkers
from .concepts import ConceptSet, Overlay, mask_levels, nth_of_shuffles
from .diffusion_inputs import dilated, mask_weights, vae_answer
from .errors import ConceptDataError
from .masks import GUARDED_SHARE, ConceptMarker, fit_markers, guarded, places
from .pipelines import PictureEncoder, checked_resolution, load_encoder
from .telling_phrases import TellingPhrase, find_telling_phrases
from .training_data import TrainingData, draw_frame

__all__ = ["ConceptMasks", "MaskReport", "SecondLook", "find_concept", "find_missed"]

FOLDS = 2
CELLS_IN_A_STEP = 2**16
"""A training step of the networks sees about so many latents' places, whatever the resolution."""
GRID = 64
"""Rows and columns of the grid on which places in pictures of different sizes are compared."""
WHITE = 128
"""The least level of a given mask that is where the concept is."""
BLACK = 16
"""The highest level of one that marks nothing: JPEG files are not quite black."""
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

    def with_cells(self, cells: Sequence[np.ndarray]) -> ConceptMasks:
        """The same with other cells, as many."""
        return ConceptMasks(cells, self.sizes, self.markers)

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
        return self.with_cells(cells)

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


class _Completed(ConceptMasks):
    """Masks that were given, as they are, and found ones where they are empty.

    Args:
        cells: Where they are empty what was found, and elsewhere what they show on a grid.
        sizes: As in :class:`ConceptMasks`.
        markers: Likewise.
        given: The masks.
        shown: For each picture which of them is its own, `None` for what was found.
        given_areas: Of those the share that is white, which is not read again.
    """

    def __init__(
        self,
        cells: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        markers: ConceptMarkers | None,
        given: Sequence[Image.Image | None],
        shown: Sequence[int | None],
        given_areas: Mapping[int, float],
    ) -> None:
        super().__init__(cells, sizes, markers)
        self._given, self._shown, self._given_areas = given, tuple(shown), given_areas

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> ConceptMasks: ...

    def __getitem__(self, index: int | slice) -> Image.Image | ConceptMasks:
        row = None if isinstance(index, slice) else self._shown[index]
        given = None if row is None else self._given[row]
        return super().__getitem__(index) if given is None else mask_levels(given)

    def areas(self) -> list[float]:
        return [
            self._given_areas[row] if row is not None else float((np.asarray(self[number]) >= WHITE).mean())
            for number, row in enumerate(self._shown)
        ]

    def select(self, indices: Sequence[int]) -> ConceptMasks:
        some = super().select(indices)
        shown = [self._shown[i] for i in indices]
        return _Completed(some.cells, some.sizes, self.markers, self._given, shown, self._given_areas)

    def with_cells(self, cells: Sequence[np.ndarray]) -> ConceptMasks:
        return _Completed(cells, self.sizes, self.markers, self._given, self._shown, self._given_areas)


def _resampled(marked: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """Marks of shape `(h, w)` at another size, widened rather than lost; bool, shape `(1, 1, *size)`."""
    return F.adaptive_max_pool2d(torch.from_numpy(marked).float()[None, None], size).bool()


@dataclass(frozen=True)
class SecondLook:
    """What networks found that learned from the marked pictures, in those in which nothing was marked."""

    pictures: int
    """In so many nothing had been marked."""
    found: int
    """In so many of them it was found now."""
    recall: float
    """Share of the marked area of marked pictures that is found again, mean over pictures that the network had not
    learned from. An estimate for what was missed at random, not for what was missed because it looks different."""
    recall_error: float
    """Its standard error over the pictures."""
    recall_pictures: int
    """How many it was estimated on."""

    def __str__(self) -> str:
        return (
            f"second look: found in {self.found} of {self.pictures} pictures in which nothing had been marked; recall: "
            f"{self.recall:.1%} (standard error {self.recall_error:.1%}) of what is marked in {self.recall_pictures} "
            "others that the network had not seen; what was missed because it looks different may still be missed"
        )


@dataclass(frozen=True)
class MaskReport:
    """What was found, and how far it can be trusted."""

    pictures: int
    found: int
    """In so many of them the concept was found, at first or then, or was given."""
    guarded: int
    """In so many it was not found where others show it, and that is masked as well."""
    across: tuple[float, float] | None
    """Where it was found across the middle eight in ten of them, as of an `Overlay`; `None` if in no picture."""
    down: tuple[float, float] | None
    """The same down the pictures."""
    area: float
    """Share of the pictures' area that is masked, mean over all pictures."""
    recall: float | None
    """Share of a pasted concept's area that is masked, mean over pictures that the network had not learned from. An
    estimate for what was pasted, or given with the concept, not for what is in the pictures. `None` where the pictures'
    own masks were completed: `second_look` has one of these."""
    recall_error: float | None
    """Its standard error over the pictures, for these two networks; 0, which proves nothing, where all was found."""
    recall_pictures: int
    """How many it was estimated on."""
    labelled_share: list[float]
    """Of each network, see `ConceptMarker`: near 1 where only what was pasted shows the concept."""
    resolution: int
    """The shorter side of the pictures in which it was looked for, in pixels."""
    pairs: int
    """Examples that either network learned from."""
    seconds: dict[str, float]
    """Of each part: `pictures`, `load`, `examples`, `networks`, `marks`."""
    telling_phrases: list[TellingPhrase]
    """Phrases that captions of pictures in which it was found have, and others have not, or less often: they may name
    the concept, and are better taken out."""
    second_look: SecondLook | None = None
    """What was found then; `None` if there was none, or nothing to look at."""
    given: int = 0
    """In so many it was marked already."""
    left_out: int = 0
    """So many pictures are not in that copy, since too much of them is masked."""
    leave_out_above: float = 1.0
    """The share of a picture, in [0, 1], above which that is too much."""
    captions_changed: int = 0
    """From so many of the captions in the copy a phrase was taken out."""
    telling_phrases_removed: bool = False
    """Whether `telling_phrases` were among them."""
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
            f"found in {self.found} of {self.pictures} pictures{self._of_which()}, guarded against in {self.guarded}; "
            f"{self.area:.1%} of their area is masked\n"
            f"{self._where()}{self._named()}"
            f"{self._recall()}{self._second_look()}"
            f"{sum(self.seconds.values()):.1f} s, at a resolution of {self.resolution}{written}"
        )

    def _of_which(self) -> str:
        return f", in {self.given} of which it was given" if self.given else ""

    def _where(self) -> str:
        if self.across is None or self.down is None:
            return ""
        across, down = (f"{low:.2f} {high:.2f}" for low, high in (self.across, self.down))
        return f"eight in ten lie within --across {across}, as many within --down {down}, 0 to 1 over the picture\n"

    def _recall(self) -> str:
        if self.recall is None:
            return ""
        return (
            f"recall: {self.recall:.1%} of the concept's area (standard error {self.recall_error:.1%}) in "
            f"{self.recall_pictures} examples that the network had not seen; these were pasted or given, and what is "
            "in the pictures may be harder to find\n"
        )

    def _second_look(self) -> str:
        return "" if self.second_look is None else f"{self.second_look}\n"

    def _named(self) -> str:
        if not self.telling_phrases:
            return ""
        phrases = ", ".join(
            f"{told.phrase!r} is in {told.shown} of their captions and {told.others} others"
            for told in self.telling_phrases
        )
        if self.telling_phrases_removed:
            return f"captions may have named it: {phrases}; these phrases are not in the copy's captions\n"
        return (
            f"captions may name it: {phrases}. What these pictures teach beside it is tied to its name then; take what "
            "names it out of the captions, with --remove-phrase, or --remove-telling-phrases for all of these\n"
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
    second_look: bool = False,
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
        second_look: Look once more, in the pictures in which nothing was found, with networks that learned from the
            others; see :func:`find_missed`. Where too little was found to learn from, there is none, and a warning.
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
    search = _Search(num_pairs, steps, dilation, batch_size, progress, seed)
    findable = _findable(concept, data)
    firsts, sizes = search.read(data)
    different = sorted({*firsts})
    sources = _sources(findable, data, different)
    search.load(pipeline_or_id, resolution, revision=revision, variant=variant, device=device)
    markers, recalls = search.learn(sources, seed)
    marks = search.mark(data, different, markers)

    looked = None
    marked = [row for row in different if marks[row].any()]
    if second_look and len(marked) < len(different):
        drawn = ConceptMasks([marks[row] for row in marked], [sizes[row] for row in marked])
        try:
            partly = _PartlyMarked.of(
                data, different, _OfRows(drawn, {row: number for number, row in enumerate(marked)})
            )
        except ConceptDataError as error:
            warnings.warn(f"no second look: {error}", stacklevel=2)
        else:
            more_markers, more_marks, looked = search.second_look(partly)
            markers += more_markers
            marks |= more_marks
    cells = [search.widened(marks[first]) for first in firsts]
    found = ConceptMasks(cells, [sizes[first] for first in firsts], search.kept(markers, name))
    return _finished(search, found, data, markers, recalls, looked, guard=guard)


def find_missed(
    pipeline_or_id: Any,
    masks: Sequence[Image.Image | None],
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
    """Complete masks that training pictures have already, as of a detector that misses some.

    For each half of the pictures a network learns from the marked ones of the other what the concept is like, and marks
    it where nothing is marked; the rest may hold it as well (:mod:`peft_gradproj.masks`). So it finds what was missed
    by accident, wherever it lies. What was missed because it looks different from all that was marked, it may miss too.

    Args:
        pipeline_or_id: As in :func:`find_concept`.
        masks: One for each picture and of its size, turned upright: white, a level of 128 or more, where the concept
            is, all black or `None` where it is not, or was missed. Other levels stay as they are, and mark nothing.
        data: The training pictures; in at least four different ones something has to be marked.
        name: As in :func:`find_concept`, and all others likewise.
        resolution: See there.
        num_pairs: Marked pictures that each network learns from, at least 16, and as many parts of others.
        steps: See there.
        dilation: By how many latents to widen what is found; given masks are not widened.
        guard: See there.
        batch_size: See there.
        revision: See there.
        variant: See there.
        device: See there.
        progress: See there.
        seed: See there.

    Returns:
        The masks as they were given where they mark something, and what was found elsewhere; with the networks as their
        `markers`; and the report. A picture without a mark that is equal, pixel for pixel, to one with a mark has that
        one's.

    Raises:
        ConceptDataError: As in :func:`find_concept`; or if masks cannot be read, have another size than their pictures
            or are grey, or too few pictures have one.
    """
    search = _Search(num_pairs, steps, dilation, batch_size, progress, seed)
    _check_count("training pictures", len(data))
    if len(masks) != len(data):
        raise ConceptDataError(f"{len(data)} pictures but {len(masks)} masks; expected as many.")
    firsts, sizes = search.read(data)
    given, given_areas = _given(masks, sizes)
    # Of equal pictures one may have been missed.
    own: dict[int, int] = {}
    for row in given:
        own.setdefault(firsts[row], row)
    different = sorted({*firsts})
    _check_count("different training pictures", len(different))
    partly = _PartlyMarked.of(data, different, _OfRows(masks, own))
    search.load(pipeline_or_id, resolution, revision=revision, variant=variant, device=device)
    markers, marks, looked = search.second_look(partly)

    shown = [row if row in given else own.get(first) for row, first in enumerate(firsts)]
    cells = [
        search.widened(marks[first]) if row is None else given[row] for row, first in zip(shown, firsts, strict=True)
    ]
    found = _Completed(cells, sizes, search.kept(markers, name), masks, shown, given_areas)
    marked = sum(row is not None for row in shown)
    return _finished(search, found, data, markers, None, looked, guard=guard, given=marked)


def _given(
    masks: Sequence[Image.Image | None], sizes: Sequence[tuple[int, int]]
) -> tuple[dict[int, np.ndarray], dict[int, float]]:
    """By row what masks show on a grid, and which share of them is white, but for empty ones; read one by one.

    Raises:
        ConceptDataError: If some cannot be used, which names them all.
    """
    grids, areas = {}, {}
    failed: list[str] = []
    highest = 0
    for number, size in enumerate(sizes):
        try:
            mask = masks[number]
        except ConceptDataError as error:
            failed.append(str(error))
            continue
        try:
            levels = np.asarray(Image.new("L", size) if mask is None else mask_levels(mask))
        except ConceptDataError as error:
            failed.append(f"mask {number}: {error}")
            continue
        level = int(levels.max())
        if levels.shape[::-1] != size:
            failed.append(f"mask {number} is {levels.shape[1]}x{levels.shape[0]}, its picture {size[0]}x{size[1]}")
        elif BLACK < level < WHITE:
            failed.append(f"mask {number} is grey: its highest level is {level}, of 255")
        elif level >= WHITE:
            white = levels >= WHITE
            grids[number] = _resampled(white, (GRID, GRID))[0, 0].numpy()
            areas[number] = float(white.mean())
        highest = max(highest, level)
    _refuse(failed, len(sizes), "masks")
    if 0 < highest < WHITE:
        raise ConceptDataError(
            f"no mask has a level above {highest}, of 255; expected white where the concept is. Masks of 0 and 1 have "
            "to be multiplied by 255."
        )
    return grids, areas


@dataclass(frozen=True)
class _OfRows(Mapping[int, Image.Image]):
    """Masks by the rows that they are of, read when they are asked for."""

    masks: Sequence[Image.Image | None]
    numbers: Mapping[int, int]
    """Of each row's mask among them."""

    def __getitem__(self, row: int) -> Image.Image:
        mask = self.masks[self.numbers[row]]
        assert mask is not None
        return mask

    def __contains__(self, row: object) -> bool:
        return row in self.numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class _PartlyMarked:
    """What a second look learns from, and looks at: pictures of which some are marked, in folds."""

    data: TrainingData
    order: list[int]
    """The different pictures' rows, marked ones first: the folds are every other one, so that each has its share."""
    masks: _OfRows
    sources: list[_MarkedSource]

    @classmethod
    def of(cls, data: TrainingData, different: Sequence[int], masks: _OfRows) -> _PartlyMarked:
        """Divide pictures, some of which have masks, into folds.

        Raises:
            ConceptDataError: If a fold has not at least two with a mask.
        """
        order = sorted(different, key=lambda row: row not in masks)
        if len(masks) < 2 * FOLDS:
            raise ConceptDataError(
                f"the concept is marked in {len(masks)} of {len(different)} different pictures; expected at least "
                f"{2 * FOLDS} to learn from what it is like there."
            )
        sources = []
        for fold in range(FOLDS):
            rows = order[fold::FOLDS]
            shown = tuple(row for row in rows if row in masks)
            sources.append(_MarkedSource(data, shown, tuple(row for row in rows if row not in masks) or shown, masks))
        return cls(data, order, masks, sources)


@dataclass
class _Search:
    """A search in one set of training pictures: what its parts have in common."""

    num_pairs: int
    steps: int
    dilation: int
    batch_size: int
    progress: bool
    seed: int
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        if min(self.num_pairs - 15, self.steps, self.batch_size, self.dilation + 1) < 1:
            raise ConceptDataError(
                f"num_pairs={self.num_pairs}, steps={self.steps}, batch_size={self.batch_size}, "
                f"dilation={self.dilation}; expected at least 16, 1, 1 and 0."
            )

    def read(self, data: TrainingData) -> tuple[list[int], list[tuple[int, int]]]:
        """For each row the first whose picture looks the same, and its picture's size."""
        with self.clock("pictures"), self._bar("pictures", len(data)) as bar:
            return _first_rows(data, bar)

    def load(self, pipeline_or_id: Any, resolution: int | None, **options: Any) -> None:
        """The encoder, and the side of the squares that it sees."""
        with self.clock("load"):
            if isinstance(pipeline_or_id, str | Path):
                self.encoder = load_encoder(str(pipeline_or_id), **options)
            else:
                self.encoder = PictureEncoder.of(pipeline_or_id)
        self.side = checked_resolution(self.encoder, resolution)

    def learn(self, sources: Sequence[_Source], seed: int) -> tuple[list[ConceptMarker], Tensor]:
        """A network for each fold, and what it finds of its examples, which it has not learned from."""
        with self.clock("examples"), self._bar("examples", FOLDS * self.num_pairs) as bar:
            examples = [
                _encoded(source, self.encoder, self.side, self.num_pairs, self.batch_size, FOLDS * seed + number, bar)
                for number, source in enumerate(sources)
            ]
        with self.clock("networks"), self._bar("networks", FOLDS * self.steps) as bar:
            markers = fit_markers(
                [(fold.latents, fold.masks) for fold in examples],
                steps=self.steps,
                batch_size=max(8, min(64, CELLS_IN_A_STEP // examples[0].masks[0].numel())),
                crop=CROP,
                seed=seed,
                progress=lambda done: bar.update(done - bar.n),
            )
        recalls = [fold.recalls(marker, self.dilation) for fold, marker in zip(examples, markers, strict=True)]
        return markers, torch.cat(recalls)

    def mark(
        self,
        data: TrainingData,
        different: Sequence[int],
        markers: Sequence[ConceptMarker],
        *,
        but: Container[int] = (),
    ) -> dict[int, np.ndarray]:
        """What each different row's network finds, not widened; but for some rows."""
        marks = {}
        of = {row: marker for row, marker in zip(different, cycle(markers), strict=False) if row not in but}
        with self.clock("marks"), self._bar("masks", len(of)) as bar:
            for row, marker in of.items():
                marks[row] = _marked(data[row][0], self.encoder, marker, self.side, self.batch_size)
                bar.update()
        return marks

    def second_look(self, partly: _PartlyMarked) -> tuple[list[ConceptMarker], dict[int, np.ndarray], SecondLook]:
        """Learn from the rows that have masks, and mark the other ones: the networks, the marks, and how it went."""
        # Not the start and the order of the first networks, which miss what they missed.
        markers, recalls = self.learn(partly.sources, self.seed + 1000)
        marks = self.mark(partly.data, partly.order, markers, but=partly.masks)
        found = sum(bool(cells.any()) for cells in marks.values())
        return markers, marks, SecondLook(len(marks), found, *_recall(recalls))

    def widened(self, cells: np.ndarray) -> np.ndarray:
        return _widened(cells, self.dilation)

    def kept(self, markers: list[ConceptMarker], name: str) -> ConceptMarkers:
        about: Any = {"concept": name, "vae_answer": vae_answer(self.encoder.vae)}
        return ConceptMarkers(markers, resolution=self.side, dilation=self.dilation, **about)

    def _bar(self, name: str, total: int) -> Any:
        return tqdm(total=total, desc=name, disable=not self.progress)


def _finished(
    search: _Search,
    found: ConceptMasks,
    data: TrainingData,
    markers: Sequence[ConceptMarker],
    recalls: Tensor | None,
    looked: SecondLook | None,
    *,
    guard: bool,
    given: int = 0,
) -> tuple[ConceptMasks, MaskReport]:
    """The masks, guarded if they are to be, and what is said of them."""
    masks = found.guarded() if guard else found
    recall, recall_error, recall_pictures = (None, None, 0) if recalls is None else _recall(recalls)
    across, down = found.places() if found.marked else (None, None)
    return masks, MaskReport(
        pictures=len(data),
        found=found.marked,
        guarded=sum(not np.array_equal(*pair) for pair in zip(found.cells, masks.cells, strict=True)),
        across=across,
        down=down,
        area=float(np.mean(masks.areas())),
        recall=recall,
        recall_error=recall_error,
        recall_pictures=recall_pictures,
        labelled_share=[marker.labelled_share for marker in markers],
        resolution=search.side,
        pairs=search.num_pairs,
        seconds=search.clock.seconds,
        telling_phrases=find_telling_phrases(
            [data.caption(row) for row in range(len(data))], [bool(marked.any()) for marked in found.cells]
        ),
        second_look=looked,
        given=given,
    )


def _recall(recalls: Tensor) -> tuple[float, float, int]:
    """Of shares of shape `(n,)` the mean, its standard error, and n."""
    return float(recalls.mean()), float(recalls.std() / math.sqrt(len(recalls))), len(recalls)


# Examples


class _Source(ABC):
    """What examples of the concept are made of."""

    @abstractmethod
    def __len__(self) -> int:
        """How many examples have different pictures."""

    @abstractmethod
    def selected(self, indices: Sequence[int]) -> _Source:
        """Some of them."""

    @abstractmethod
    def examples(
        self, count: int, side: int, seed: int
    ) -> Iterator[tuple[Image.Image, Image.Image, Image.Image | None]]:
        """Squares with the concept, masks of it, and squares without it, or unlabelled, where they say more."""

    def parts(self, count: int) -> list[tuple[_Source, int]]:
        """What to learn from and what the labelled share is measured on, an eighth, each with a number of examples.

        They share pictures only where there are few.
        """
        held_out = count // 8
        if len(self) < 16:
            return [(self, count - held_out), (self, held_out)]
        chosen = [[i for i in range(len(self)) if (i % 8 == 7) == last] for last in (False, True)]
        return [(self.selected(chosen[0]), count - held_out), (self.selected(chosen[1]), held_out)]


@dataclass(frozen=True)
class _ConceptSource(_Source):
    """A concept, and the training pictures."""

    concept: Overlay | ConceptSet
    data: TrainingData

    def __len__(self) -> int:
        return len(self.data) if isinstance(self.concept, Overlay) else len(self.concept)

    def selected(self, indices: Sequence[int]) -> _Source:
        if isinstance(self.concept, Overlay):
            return replace(self, data=self.data.select(indices))
        return replace(self, concept=ConceptSet([self.concept[i] for i in indices]))

    def examples(
        self, count: int, side: int, seed: int
    ) -> Iterator[tuple[Image.Image, Image.Image, Image.Image | None]]:
        examples = iter_concept_examples(self.concept, self.data, count=count, resolution=side, seed=seed)
        for number, example in enumerate(examples):
            assert example.mask is not None
            other = example.without
            if isinstance(self.concept, Overlay):
                other = None
            elif other is None:
                other = _part(self.data, number, side, seed)
            yield example.picture, example.mask, other


@dataclass(frozen=True)
class _MarkedSource(_Source):
    """Training pictures in which the concept is marked, and others, in which it may have been missed."""

    data: TrainingData
    marked: tuple[int, ...]
    others: tuple[int, ...]
    masks: Mapping[int, Image.Image]
    """By row, of the marked ones."""

    def __len__(self) -> int:
        return len(self.marked)

    def selected(self, indices: Sequence[int]) -> _Source:
        return replace(self, marked=tuple(self.marked[i] for i in indices))

    def examples(
        self, count: int, side: int, seed: int
    ) -> Iterator[tuple[Image.Image, Image.Image, Image.Image | None]]:
        others = self.data.select(self.others)
        drawn = made = lost = 0
        while made < count:
            row = self.marked[nth_of_shuffles(drawn, len(self.marked), seed)]
            # Grey would count as the concept in a crop that has nothing white.
            white = mask_levels(self.masks[row]).point(lambda level: 255 if level >= WHITE else 0)
            shown = ConceptSet.from_masks([self.data[row][0]], [white], [""])
            # One after the other, so that one is in memory; each is cropped by its own seed.
            own = int(np.random.default_rng([seed, 4, drawn]).integers(2**31))
            drawn += 1
            try:
                (example,) = iter_concept_examples(shown, count=1, resolution=side, seed=own)
            except NothingLeftError:
                # A speck, from which nothing can be learned.
                lost += 1
                if lost == len(self.marked):
                    raise ConceptDataError(
                        f"nothing is left of {lost} masks at a resolution of {side}; give a higher one."
                    ) from None
                continue
            assert example.mask is not None
            yield example.picture, example.mask, _part(others, made, side, seed)
            made, lost = made + 1, 0


def _part(data: TrainingData, number: int, side: int, seed: int) -> Image.Image:
    """A square of one of the pictures, as they are."""
    picture, _ = data[nth_of_shuffles(number, len(data), seed)]
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


def _first_rows(data: TrainingData, bar: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """For each row the first one whose picture looks the same, pixel for pixel: itself, where there is no other.

    And their sizes.

    Raises:
        ConceptDataError: If pictures cannot be read, which names them all.
    """
    known: dict[bytes, int] = {}
    firsts: list[int] = []
    sizes: list[tuple[int, int]] = []
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
            sizes.append(shown.size)
        bar.update()
    _refuse(failed, len(data), "pictures")
    return firsts, sizes


def _refuse(failed: Sequence[str], count: int, what: str) -> None:
    if failed:
        more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        raise ConceptDataError(
            f"{len(failed)} of the {count} {what} cannot be used; mend them or leave them out: "
            f"{'; '.join(failed[:NAMED])}{more}"
        )


def _sources(concept: Overlay | ConceptSet, data: TrainingData, different: Sequence[int]) -> list[_ConceptSource]:
    """For each fold of the training pictures, of which the rows of the different ones are given."""
    _check_count("different training pictures", len(different))
    sources = []
    for fold in range(FOLDS):
        part = concept if isinstance(concept, Overlay) else concept[fold::FOLDS]
        sources.append(_ConceptSource(part, data.select(different[fold::FOLDS])))
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
    picture: Image.Image, encoder: PictureEncoder, marker: ConceptMarker, side: int, batch_size: int
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
    return whole[0, 0].bool().numpy()


def _widened(cells: np.ndarray, dilation: int) -> np.ndarray:
    return dilated(torch.from_numpy(cells).float()[None, None], dilation)[0, 0].bool().numpy()


def _starts(length: int, side: int, step: int) -> list[int]:
    """Where squares begin that cover a length, and overlap by half or more."""
    room = length - side
    gaps = max(1, math.ceil(2 * room / side))
    return sorted({round(number * room / gaps / step) * step for number in range(gaps + 1)})
