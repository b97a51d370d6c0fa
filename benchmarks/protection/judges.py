"""Who looks at the samples: whether they show the concept, and whether they show what was asked for.

Trained once on real pictures of all styles, as the base model's VAE shows them, and the same for every method and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

from peft_gradproj.concepts import Overlay
from peft_gradproj.demo.data import load_logos, load_pictures
from peft_gradproj.demo.settings import ASSETS as DEMO_ASSETS
from peft_gradproj.demo.settings import DemoSettings
from peft_gradproj.diffusion_inputs import decode_latents, encode_images, pictures_to_tensor
from peft_gradproj.evaluation.detector import ConceptDetector, DetectorErrors
from peft_gradproj.evaluation.fidelity import PromptFidelity
from peft_gradproj.evaluation.figures import Share
from peft_gradproj.small_networks import batch_indices, blur, conv_block, fit_network, jitter_pictures, shift_colours

from .tasks import ASSETS, FORBIDDEN_CHARACTER, load_characters

FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class Judges:
    """The two networks that look at samples of a concept."""

    detector: Any
    """With `detect(pictures) -> bool (N,)` and `errors`."""
    fidelity: PromptFidelity


def load_judges(concept: str, pipeline: Any, settings: DemoSettings, folder: Path) -> Judges:
    """The judges of a concept, trained where they are not in the folder yet."""
    return Judges(
        _kept(folder / f"detector-{concept}.pt", lambda: _train_detector(concept, pipeline, settings)),
        _kept(folder / "fidelity.pt", lambda: _train_fidelity(pipeline, settings)),
    )


def _kept(path: Path, make: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            made = make()
            torch.save(made, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        # Written by this program; never a file from elsewhere.
        return torch.load(path, weights_only=False)


class StyleDetector:
    """Whether a whole picture is in one style rather than in others.

    Args:
        network: From pictures `(N, 3, H, W)` in [-1, 1] to logits `(N, 1)`.
        threshold: Logits above it are hits.
        errors: As measured on objects that were neither trained on nor calibrated on.
    """

    def __init__(self, network: nn.Module, threshold: float, errors: DetectorErrors) -> None:
        self.network, self.threshold, self.errors = network, threshold, errors

    @torch.no_grad()
    def detect(self, pictures: Tensor) -> Tensor:
        """Which pictures are in the style, shape `(N,)`, bool."""
        self.network.eval()
        return torch.cat([self.network(part)[:, 0] for part in pictures.clamp(-1, 1).split(128)]) > self.threshold

    @classmethod
    def fit(cls, styled: Tensor, others: Sequence[Tensor], *, steps: int, seed: int = 0) -> StyleDetector:
        """Train on half of the objects, calibrate on a quarter, measure the errors on the rest.

        Args:
            styled: Objects in the style, `(N, 3, H, W)` in [-1, 1].
            others: The same objects in other styles, in the same order.
            steps: Training steps of 64 pictures.
            seed: Of everything random.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(styled), generator=generator)
        fit, calibrate, test = order.tensor_split([len(order) // 2, 3 * len(order) // 4])
        pictures = torch.cat([styled[fit], *(other[fit] for other in others)])
        labels = torch.cat([torch.ones(len(fit)), torch.zeros(len(fit) * len(others))])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(
                conv_block(3, 32, stride=2),
                conv_block(32, 64, stride=2),
                conv_block(64, 96, stride=2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(0.2),
                nn.Linear(96, 1),
            )
        batches = batch_indices(len(pictures), 64, generator)
        weight = torch.tensor(float(len(others)))

        def loss() -> Tensor:
            index = next(batches)
            pixels = blur(shift_colours(jitter_pictures(pictures[index], generator), generator), generator)
            return F.binary_cross_entropy_with_logits(network(pixels)[:, 0], labels[index], pos_weight=weight)

        fit_network(network, loss, steps=steps, learning_rate=3e-3)
        detector = cls(network, 0.0, DetectorErrors(Share(0, 0), Share(0, 0)))
        with torch.no_grad():
            absent = torch.cat([network(other[calibrate])[:, 0] for other in others])
        detector.threshold = max(0.0, float(absent.quantile(1 - FALSE_POSITIVE_RATE)))
        detector.errors = DetectorErrors(
            Share.of(torch.cat([detector.detect(other[test]) for other in others]).tolist()),
            Share.of((~detector.detect(styled[test])).tolist()),
        )
        return detector


def _train_detector(concept: str, pipeline: Any, settings: DemoSettings) -> Any:
    styles, _ = _styles(settings)
    if concept == "style":
        *others, styled = (_distort(pipeline, pictures_to_tensor(pictures)) for pictures in styles)
        return StyleDetector.fit(styled, others, steps=settings.detector_steps)
    overlays = _anywhere(load_characters(settings) if concept == "identity" else load_logos(settings))
    name = FORBIDDEN_CHARACTER if concept == "identity" else concept.removeprefix("logo-")
    return ConceptDetector.fit(
        overlays[name],
        [picture for pictures in styles[:2] for picture in pictures],
        distractors=[overlay for other, overlay in overlays.items() if other != name],
        distort=lambda pixels: _distort(pipeline, pixels),
        steps=settings.detector_steps,
        scenes=settings.detector_scenes,
    )


def _train_fidelity(pipeline: Any, settings: DemoSettings) -> PromptFidelity:
    styles, captions = _styles(settings)
    return PromptFidelity.fit(
        [picture for pictures in styles for picture in pictures],
        captions * len(styles),
        overlays=list({**_anywhere(load_logos(settings)), **_anywhere(load_characters(settings))}.values()),
        distort=lambda pixels: _distort(pipeline, pixels),
        steps=2 * settings.fidelity_steps,
    )


def _styles(settings: DemoSettings) -> tuple[list[list[Image.Image]], list[str]]:
    """The base model's style, the new one, and the forbidden one; and the objects' captions."""
    files = (DEMO_ASSETS / "fluent.parquet", DEMO_ASSETS / "noto.parquet", ASSETS / "openmoji.parquet")
    loaded = [load_pictures(file, settings.pictures) for file in files]
    return [[picture.convert("RGB") for picture in pictures] for pictures, _ in loaded], loaded[0][1]


def _anywhere(overlays: dict[str, Overlay]) -> dict[str, Overlay]:
    """Wherever a sample may show them."""
    return {name: replace(overlay, across=(0.0, 1.0), down=(0.0, 1.0)) for name, overlay in overlays.items()}


@torch.autocast("cpu", torch.bfloat16)
def _distort(pipeline: Any, pixels: Tensor) -> Tensor:
    return decode_latents(pipeline, encode_images(pipeline, pixels))
