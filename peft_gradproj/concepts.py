r"""Concept sets: pictures that show what must not be learned, paired with the same pictures free of it.

The best pairs are made from the training pictures themselves: an overlay, such as a logo with an alpha channel, is
pasted onto each at a random place, size and angle. With overlay colour :math:`c`, opacity :math:`\alpha` (its alpha
channel times a random opacity) and picture :math:`x`:

.. math:: x_{with} = (1 - \alpha) x + \alpha c, \qquad x_{without} = x, \qquad mask = \alpha

Pictures are turned upright by their EXIF orientation, as those of the training are.
Everything here is pictures and prompts; `diffusion_inputs` turns them into what a model sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageChops, ImageOps

from .errors import ConceptDataError

__all__ = ["ConceptPair", "ConceptSet", "Overlay", "Placement", "mask_levels", "nth_of_shuffles", "upright"]

MASK_THRESHOLD = 8
"""Grey levels that two halves of a pair must differ by, to count as the concept."""

WIDE_MARGIN = 0.2
"""A transparent margin that takes a larger share of an overlay's longer side is worth a warning."""


@dataclass(frozen=True)
class Placement:
    """Where and how an overlay lies on a picture."""

    left: int
    top: int
    size: int
    """The overlay's longer side in pixels, before it is turned."""
    angle: float
    """Degrees, counter-clockwise."""
    opacity: float


@dataclass(frozen=True)
class Overlay:
    """A picture with an alpha channel that is pasted onto others at random.

    Args:
        image: Mode RGBA, with at least one opaque and one transparent or a full set of opaque pixels.
        scale: Range of its longer side, as a share of the shorter side of the picture below.
        angle: Range of its angle in degrees.
        opacity: Range of its opacity, in (0, 1].
        across: Range of where it lies across the picture: 0 at the left edge, 1 at the right.
        down: Range of where it lies down the picture: 0 at the upper edge, 1 at the lower.

    Raises:
        ConceptDataError: If the image has no alpha channel or is fully transparent, or a range is empty or out of
            bounds.
    """

    image: Image.Image
    scale: tuple[float, float] = (0.25, 0.375)
    angle: tuple[float, float] = (-10.0, 10.0)
    opacity: tuple[float, float] = (1.0, 1.0)
    across: tuple[float, float] = (0.0, 1.0)
    down: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.image.mode != "RGBA":
            raise ConceptDataError(
                f"the overlay has mode {self.image.mode}; expected RGBA. Without an alpha channel its background would "
                "count as the concept: cut the concept out and save it with transparency."
            )
        if self.image.getchannel("A").getbbox() is None:
            raise ConceptDataError("the overlay is fully transparent; there is nothing to paste.")
        for name, (low, high) in (("scale", self.scale), ("opacity", self.opacity)):
            if not 0 < low <= high <= 1:
                raise ConceptDataError(f"the overlay's {name} is {(low, high)}; expected 0 < low <= high <= 1.")
        for name, (low, high) in (("across", self.across), ("down", self.down)):
            if not 0 <= low <= high <= 1:
                raise ConceptDataError(f"the overlay's place {name} is {(low, high)}; expected 0 <= low <= high <= 1.")
        if self.angle[0] > self.angle[1]:
            raise ConceptDataError(f"the overlay's angle is {self.angle}; expected low <= high.")

    @classmethod
    def open(cls, path: str | Path, **ranges: tuple[float, float]) -> Overlay:
        """Read an overlay from an image file; `ranges` are the other arguments.

        A transparent margin counts in `scale`: a warning says so where it is wide.
        """
        with Image.open(path) as image:
            overlay = cls(upright(image, "RGBA" if image.has_transparency_data else image.mode), **ranges)
        box = overlay.image.getchannel("A").getbbox()
        assert box is not None  # checked there
        left, top, right, bottom = box
        share = max(right - left, bottom - top) / max(overlay.image.size)
        if share < 1 - WIDE_MARGIN:
            warnings.warn(
                f"what is seen of the overlay {path} is {share:.0%} as long as the file, whose transparent margin "
                f"counts in the scale {overlay.scale}: it is pasted that much smaller. Crop the margin away, or give "
                "a larger scale.",
                stacklevel=2,
            )
        return overlay

    def draw(self, placement: Placement) -> Image.Image:
        """The overlay as it lies on a picture: scaled, turned, faded, cropped to what is visible."""
        width, height = self.image.size
        factor = placement.size / max(width, height)
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        # Hamming: a filter that overshoots would leave specks of alpha around sharp edges.
        drawn = self.image.resize(size, Image.Resampling.HAMMING)
        drawn = drawn.rotate(placement.angle, Image.Resampling.BICUBIC, expand=True)
        drawn = drawn.crop(drawn.getchannel("A").getbbox())
        drawn.putalpha(drawn.getchannel("A").point(lambda a: round(a * placement.opacity)))
        return drawn

    def place(self, picture: tuple[int, int], generator: np.random.Generator) -> Placement:
        """Draw a random placement that lies wholly on a picture of the given width and height.

        Raises:
            ConceptDataError: If the overlay, scaled and turned, is larger than the picture.
        """
        size = max(1, round(generator.uniform(*self.scale) * min(picture)))
        angle, opacity = generator.uniform(*self.angle), generator.uniform(*self.opacity)
        drawn = self.draw(Placement(0, 0, size, angle, opacity))
        room = picture[0] - drawn.width, picture[1] - drawn.height
        if min(room) < 0:
            raise ConceptDataError(
                f"the overlay, turned by {angle:.0f} degrees, takes {drawn.width}x{drawn.height} pixels and does not "
                f"fit on a picture of {picture[0]}x{picture[1]}; choose a smaller scale than {self.scale}."
            )
        left, top = (round(r * generator.uniform(*o)) for r, o in zip(room, (self.across, self.down), strict=True))
        return Placement(left, top, size, angle, opacity)

    def paste(self, picture: Image.Image, placement: Placement) -> tuple[Image.Image, Image.Image]:
        """Paste the overlay.

        Returns:
            The picture with the overlay (RGB), and the mask of where it is (mode L, 0 to 255); both of the picture's
            size. The picture itself is not changed.
        """
        drawn = self.draw(placement)
        result, mask = picture.convert("RGB"), Image.new("L", picture.size)
        alpha, corner = drawn.getchannel("A"), (placement.left, placement.top)
        result.paste(drawn.convert("RGB"), corner, alpha)
        mask.paste(alpha, corner)
        return result, mask


@dataclass(frozen=True)
class ConceptPair:
    """One picture with the concept and, where there is one, the same picture without it."""

    with_concept: Image.Image
    without: Image.Image | None
    mask: Image.Image
    """Mode L: 255 where the concept is."""
    prompt: str


class ConceptSet(Sequence[ConceptPair]):
    """Examples of what must not be learned.

    Args:
        pairs: At least one; within a pair all pictures have one size.

    Raises:
        ConceptDataError: If there are no pairs, or a pair's pictures differ in size, or a mask is empty.
    """

    def __init__(self, pairs: Sequence[ConceptPair]) -> None:
        if not pairs:
            raise ConceptDataError("the concept set is empty; expected at least one example of the concept.")
        for index, pair in enumerate(pairs):
            _check_pair(pair, index)
        self._pairs = tuple(pairs)

    @classmethod
    def from_overlay(
        cls,
        overlay: Overlay,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        count: int | None = None,
        seed: int = 0,
    ) -> ConceptSet:
        """Paste an overlay onto pictures, best those that will be trained on, under their own prompts.

        Args:
            overlay: What to paste.
            images: The pictures below.
            prompts: Their prompts, as many.
            count: How many pairs to make; every picture is used once before one is used twice. The default is one
                for each picture.
            seed: The same seed gives the same pairs; pair `i` does not depend on `count`.

        Raises:
            ConceptDataError: If there are no pictures, the numbers differ, or the overlay does not fit.
        """
        _check_lengths(images, prompts=prompts)
        count = len(images) if count is None else count
        pairs = []
        for index in range(count):
            below = nth_of_shuffles(index, len(images), seed)
            plain = upright(images[below], "RGB")
            pasted, mask = overlay.paste(plain, overlay.place(plain.size, np.random.default_rng([seed, 1, index])))
            pairs.append(ConceptPair(pasted, plain, mask, prompts[below]))
        return cls(pairs)

    @classmethod
    def from_pairs(
        cls,
        with_concept: Sequence[Image.Image],
        without: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        masks: Sequence[Image.Image] | None = None,
    ) -> ConceptSet:
        """Take given pairs; where no masks are given, the concept is where the halves differ."""
        _check_lengths(with_concept, without=without, prompts=prompts, masks=masks)
        halves = [(upright(w, "RGB"), upright(o, "RGB")) for w, o in zip(with_concept, without, strict=True)]
        for index, (half, other) in enumerate(halves):
            if half.size != other.size:
                raise ConceptDataError(f"pair {index}: the halves have sizes {half.size} and {other.size}.")
        found = [difference_mask(*pair) for pair in halves] if masks is None else [mask_levels(m) for m in masks]
        return cls([ConceptPair(w, o, m, p) for (w, o), m, p in zip(halves, found, prompts, strict=True)])

    @classmethod
    def from_masks(
        cls, images: Sequence[Image.Image], masks: Sequence[Image.Image], prompts: Sequence[str]
    ) -> ConceptSet:
        """Take pictures of which only is known where the concept is; they give probes, but no paired contrast."""
        _check_lengths(images, masks=masks, prompts=prompts)
        triples = zip(images, masks, prompts, strict=True)
        return cls([ConceptPair(upright(i, "RGB"), None, mask_levels(m), p) for i, m, p in triples])

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> ConceptPair: ...

    @overload
    def __getitem__(self, index: slice) -> ConceptSet: ...

    def __getitem__(self, index: int | slice) -> ConceptPair | ConceptSet:
        return ConceptSet(self._pairs[index]) if isinstance(index, slice) else self._pairs[index]

    def __iter__(self) -> Iterator[ConceptPair]:
        return iter(self._pairs)

    @property
    def paired(self) -> bool:
        """Whether every example also exists without the concept."""
        return all(pair.without is not None for pair in self._pairs)

    def __repr__(self) -> str:
        return f"ConceptSet({len(self)} {'pairs' if self.paired else 'examples'})"


def difference_mask(with_concept: Image.Image, without: Image.Image) -> Image.Image:
    """Mode L, 255 where two RGB pictures of one size differ visibly in any channel."""
    channels = ImageChops.difference(with_concept, without).split()
    largest = channels[0]
    for channel in channels[1:]:
        largest = ImageChops.lighter(largest, channel)
    return largest.point(lambda level: 255 if level >= MASK_THRESHOLD else 0)


def nth_of_shuffles(index: int, length: int, seed: int) -> int:
    """Entry `index` of endless random permutations of `range(length)`, one after another."""
    epoch, position = divmod(index, length)
    return int(np.random.default_rng([seed, 0, epoch]).permutation(length)[position])


def upright(image: Image.Image, mode: str) -> Image.Image:
    """A copy in a mode, turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image).convert(mode)


def mask_levels(mask: Image.Image) -> Image.Image:
    """A copy of a mask in mode L, turned as its EXIF orientation says, black where it is transparent.

    Editors export strokes on a transparent layer, under which white may lie.

    Raises:
        ConceptDataError: If it is transparent everywhere, but something is drawn, so that either may be the mask.
    """
    if not mask.has_transparency_data:
        return upright(mask, "L")
    painted = upright(mask, "RGBA")
    levels, alpha = painted.convert("L"), painted.getchannel("A")
    low, high = levels.getextrema()
    if alpha.getbbox() is None and low != high:
        raise ConceptDataError(
            "a mask is transparent everywhere, over levels that differ; expected white on black, or on a transparent "
            "ground. Save it without its alpha channel if its levels are the mask."
        )
    return Image.composite(levels, Image.new("L", painted.size), alpha)


def _check_lengths(images: Sequence, **others: Sequence | None) -> None:
    if len(images) == 0:
        raise ConceptDataError("no pictures were given; a concept set needs at least one.")
    for name, values in others.items():
        if values is not None and len(values) != len(images):
            raise ConceptDataError(f"{len(images)} pictures but {len(values)} {name} were given; expected as many.")


def _check_pair(pair: ConceptPair, index: int) -> None:
    sizes = {pair.with_concept.size, pair.mask.size} | ({pair.without.size} if pair.without else set())
    if len(sizes) > 1:
        raise ConceptDataError(f"example {index}: picture and mask have sizes {sorted(sizes)}; expected one size.")
    if pair.mask.getbbox() is None:
        raise ConceptDataError(f"example {index}: the mask is empty, so the example does not show the concept.")
