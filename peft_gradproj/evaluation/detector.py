r"""Finding an overlay, such as a logo, in pictures.

A small convolutional network marks where the overlay is. It is trained on pictures with the overlay pasted at random,
against the same pictures as they are, with other overlays, and with flat blobs in the overlay's own colours, so that
neither a foreign patch nor the right colour is enough. The score of a picture is the largest mark, averaged over
3 x 3 neighbours.

The threshold is set on pictures that were not trained on, and the error rates are measured on yet others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..concepts import Overlay
from ..diffusion_inputs import pictures_to_tensor
from ..errors import ConceptDataError
from ..small_networks import batch_indices, blur, conv_block, fit_network, network_answers, shift_colours
from .figures import Share

__all__ = ["ConceptDetector", "DetectorErrors"]

STRIDE = 4
"""Pixels of a picture for each mark of the network."""


@dataclass(frozen=True)
class DetectorErrors:
    """How often the detector is wrong on pictures that it was neither trained nor calibrated on."""

    false_positives: Share
    """Pictures without the overlay in which it was found."""
    misses: Share
    """Pictures with the overlay in which it was not found."""


@dataclass
class _Scenes:
    pictures: Tensor
    marks: Tensor
    present: Tensor


class ConceptDetector:
    """Whether an overlay is seen in a picture.

    Args:
        network: From pictures `(N, 3, H, W)` in [-1, 1] to logits `(N, 1, H / 4, W / 4)`.
        threshold: Scores above it are hits.
        errors: As measured on held-out pictures.
    """

    def __init__(self, network: nn.Module, threshold: float, errors: DetectorErrors) -> None:
        self.network, self.threshold, self.errors = network, threshold, errors

    @classmethod
    def fit(
        cls,
        overlay: Overlay,
        pictures: Sequence[Image.Image],
        *,
        distractors: Sequence[Overlay] = (),
        distort: Callable[[Tensor], Tensor] = lambda pixels: pixels,
        steps: int = 500,
        scenes: int = 800,
        max_false_positive_rate: float = 0.01,
        seed: int = 0,
        progress: Callable[[int], None] = lambda step: None,
    ) -> ConceptDetector:
        """Train and calibrate.

        Args:
            overlay: What to find, with the ranges in which it is pasted.
            pictures: RGB, of one size, free of the overlay; half are trained on, a quarter set the threshold, and a
                quarter measure the errors.
            distractors: Overlays that are not to be found.
            distort: What samples have been through, such as a VAE's encoder and decoder.
            steps: Training steps of 32 pictures.
            scenes: Pictures composed for training; half as many for calibration, and as many again for the errors.
            max_false_positive_rate: The share of calibration pictures without the overlay that may score above the
                threshold.
            seed: Of everything random.
            progress: Called with the number of each finished step.

        Raises:
            ConceptDataError: If there are fewer than 8 pictures.
        """
        if len(pictures) < 8:
            raise ConceptDataError(f"{len(pictures)} pictures were given; a detector needs at least 8.")
        order = np.random.default_rng(seed).permutation(len(pictures))
        parts = [[pictures[i] for i in part] for part in np.split(order, [len(order) // 2, 3 * len(order) // 4])]
        sets = [
            _compose(overlay, part, distractors, distort, count, seed=seed * 3 + i)
            for i, (part, count) in enumerate(zip(parts, (scenes, scenes // 2, scenes // 2), strict=True))
        ]
        network = _train(sets[0], steps, seed, progress)
        threshold = _threshold(_scores(network, sets[1].pictures), sets[1].present, max_false_positive_rate)
        hits = _scores(network, sets[2].pictures) > threshold
        errors = DetectorErrors(Share.of(hits[~sets[2].present].tolist()), Share.of((~hits[sets[2].present]).tolist()))
        return cls(network, threshold, errors)

    def scores(self, pictures: Tensor) -> Tensor:
        """Score pictures `(N, 3, H, W)` in [-1, 1]; shape `(N,)`.

        Raises:
            BehaviourError: If they are not finite.
        """
        return _scores(self.network, pictures)

    def detect(self, pictures: Tensor) -> Tensor:
        """Which pictures show the overlay, shape `(N,)`, bool; raises as :meth:`scores`."""
        return self.scores(pictures) > self.threshold


def _network() -> nn.Module:
    return nn.Sequential(
        conv_block(3, 24, stride=2),
        conv_block(24, 48, stride=2),
        conv_block(48, 64),
        conv_block(64, 64),
        conv_block(64, 64),
        nn.Conv2d(64, 1, 1),
    )


def _scores(network: nn.Module, pictures: Tensor) -> Tensor:
    return F.avg_pool2d(network_answers(network, pictures), 3, stride=1).amax(dim=(1, 2, 3))


def _threshold(scores: Tensor, present: Tensor, rate: float) -> float:
    """The lowest threshold at which at most `rate` of the absent score above, or midway to the present if better."""
    absent = scores[~present].sort(descending=True).values
    lowest = float(absent[int(rate * len(absent))])
    # Where the two do not overlap, the middle of the gap is the better guess for pictures not seen yet.
    middle = (lowest + float(scores[present].quantile(0.02))) / 2
    return max(lowest, middle)


def _train(scenes: _Scenes, steps: int, seed: int, progress: Callable[[int], None]) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _network()
    batches = batch_indices(len(scenes.pictures), 32, generator)

    def loss() -> Tensor:
        index = next(batches)
        pixels = blur(shift_colours(scenes.pictures[index], generator), generator)
        return F.binary_cross_entropy_with_logits(network(pixels), scenes.marks[index])

    fit_network(network, loss, steps=steps, learning_rate=3e-3, progress=progress)
    return network


def _compose(
    overlay: Overlay,
    pictures: Sequence[Image.Image],
    distractors: Sequence[Overlay],
    distort: Callable[[Tensor], Tensor],
    count: int,
    *,
    seed: int,
) -> _Scenes:
    """Half of the scenes show the overlay; of all, most show distractors, which may lie beneath it."""
    generator = np.random.default_rng(seed)
    composed, masks, opacities = [], [], torch.ones(count, 1, 1, 1)
    for index in range(count):
        scene = pictures[int(generator.integers(len(pictures)))].convert("RGB")
        scene = _distract(scene, overlay, distractors, generator)
        mask = Image.new("L", scene.size)
        if index % 2 == 0:
            place = overlay.place(scene.size, generator)
            scene, mask = overlay.paste(scene, place)
            opacities[index] = place.opacity * _opacity(overlay)
        composed.append(scene)
        masks.append(mask)
    marks = F.avg_pool2d((pictures_to_tensor(masks) + 1) / 2, STRIDE)
    # A faint overlay is as much there as an opaque one.
    marks = (marks > 0.5 * opacities).float()
    return _Scenes(distort(pictures_to_tensor(composed)), marks, torch.arange(count) % 2 == 0)


def _opacity(overlay: Overlay) -> float:
    """Of its most opaque pixels, in (0, 1]."""
    return float(np.asarray(overlay.image)[..., 3].max()) / 255


def _distract(
    scene: Image.Image, overlay: Overlay, distractors: Sequence[Overlay], generator: np.random.Generator
) -> Image.Image:
    kind = generator.random()
    if kind < 0.3 and distractors:
        other = distractors[int(generator.integers(len(distractors)))]
        return other.paste(scene, other.place(scene.size, generator))[0]
    return _paste_blob(scene, overlay, generator) if kind < 0.65 else scene


def _paste_blob(scene: Image.Image, overlay: Overlay, generator: np.random.Generator) -> Image.Image:
    """A flat shape in one of the overlay's colours, as large as the overlay."""
    colours = np.asarray(overlay.image)[np.asarray(overlay.image)[..., 3] > 128 * _opacity(overlay)][:, :3]
    colour = tuple(int(level) for level in colours[int(generator.integers(len(colours)))])
    size = max(2, round(generator.uniform(*overlay.scale) * min(scene.size)))
    left, top = (int(generator.integers(0, side - size + 1)) for side in scene.size)
    scene = scene.copy()
    draw = ImageDraw.Draw(scene)
    shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
    shape((left, top, left + size, top + round(size * generator.uniform(0.6, 1.0))), fill=colour)
    return scene
