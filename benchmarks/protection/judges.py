"""Who looks at the samples: whether they show the concept, what was asked for, and the style that may be learned.

Trained once on real pictures of all styles, as the base model's VAE shows them, and the same for every method and seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_gradproj.demo.data import load_logos, load_pictures
from peft_gradproj.demo.measuring import Judges, as_decoded, train_detector, train_fidelity
from peft_gradproj.demo.settings import ASSETS as DEMO_ASSETS
from peft_gradproj.demo.settings import DemoSettings
from peft_gradproj.diffusion_inputs import pictures_to_tensor
from peft_gradproj.evaluation.detector import DetectorErrors
from peft_gradproj.evaluation.fidelity import PromptFidelity
from peft_gradproj.evaluation.figures import Share
from peft_gradproj.small_networks import (
    batch_indices,
    blur,
    conv_block,
    fit_network,
    jitter_pictures,
    network_answers,
    shift_colours,
)

from .once import make_once
from .tasks import ASSETS, FORBIDDEN_CHARACTER, load_characters

FALSE_POSITIVE_RATE = 0.01
NEW_STYLE = "noto"
"""The style of all tasks' training pictures; it may be learned."""


def load_judges(concept: str, pipeline: Any, settings: DemoSettings, folder: Path) -> Judges:
    """The judges of a concept, trained where they are not in the folder yet."""
    # The same for every seed of a task.
    settings = replace(settings, seed=0)
    detector = make_once(
        folder / f"detector-{concept}.pt",
        lambda part: torch.save(_train_detector(concept, pipeline, settings), part),
    )
    fidelity = make_once(folder / "fidelity.pt", lambda part: torch.save(_train_fidelity(pipeline, settings), part))
    # Written by this program; never files from elsewhere.
    return Judges(*(torch.load(path, weights_only=False) for path in (detector, fidelity)))


def judges_digest(concept: str, folder: Path) -> str:
    """Tells the judges of a concept, once they are trained, from others: rows that others looked at do not compare."""
    digest = hashlib.sha256()
    for name in (f"detector-{concept}.pt", "fidelity.pt", "styles.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


class StyleJudge:
    """In which style a sample shows its object: the one whose picture of it is the nearest.

    Many objects look much alike in two styles, so that a style can be told only beside the same object in the others.

    Args:
        styles: For each style the pictures of all objects, `(N, 3, H, W)` in [-1, 1].
        objects: As many names.
    """

    def __init__(self, styles: Mapping[str, Tensor], objects: Sequence[str]) -> None:
        self.styles, self._place = styles, {name: place for place, name in enumerate(objects)}

    def in_style(self, samples: Tensor, objects: Sequence[str], style: str = NEW_STYLE) -> Tensor:
        """Which samples `(N, 3, H, W)` of the named objects are nearest, in mean square, to `style`; bool, `(N,)`."""
        place = torch.tensor([self._place[name] for name in objects])
        distances = {
            name: (samples - pictures[place]).square().mean((1, 2, 3)) for name, pictures in self.styles.items()
        }
        return distances[style] <= torch.stack(list(distances.values())).amin(0)


def load_style_judge(pipeline: Any, settings: DemoSettings, folder: Path) -> StyleJudge:
    """The judge of style, the same for all tasks; its pictures are as the base model's VAE shows them."""
    styles, objects = _styles(settings.pictures)

    def write(part: Path) -> None:
        decoded = {name: as_decoded(pipeline, pictures_to_tensor(pictures)) for name, pictures in styles.items()}
        save_file({name: pictures.contiguous() for name, pictures in decoded.items()}, part)

    return StyleJudge(load_file(make_once(folder / "styles.safetensors", write)), objects)


class StyleDetector:
    """Whether a whole picture is in one style rather than in others.

    Args:
        network: From pictures `(N, 3, H, W)` in [-1, 1] to logits `(N, 1)`.
        threshold: Logits above it are hits.
        errors: As measured on objects that were neither trained on nor calibrated on.
    """

    def __init__(self, network: nn.Module, threshold: float, errors: DetectorErrors) -> None:
        self.network, self.threshold, self.errors = network, threshold, errors

    def detect(self, pictures: Tensor) -> Tensor:
        """Which pictures are in the style, shape `(N,)`, bool."""
        return network_answers(self.network, pictures)[:, 0] > self.threshold

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
    styles, _ = _styles(settings.pictures)
    if concept == "style":
        *others, styled = (as_decoded(pipeline, pictures_to_tensor(pictures)) for pictures in styles.values())
        return StyleDetector.fit(styled, others, steps=settings.detector_steps)
    overlays = load_characters(settings) if concept == "identity" else load_logos(settings)
    name = FORBIDDEN_CHARACTER if concept == "identity" else concept.removeprefix("logo-")
    pictures = [picture for style in ("fluent", NEW_STYLE) for picture in styles[style]]
    return train_detector(pipeline, overlays, name, pictures, settings)


def _train_fidelity(pipeline: Any, settings: DemoSettings) -> PromptFidelity:
    styles, captions = _styles(settings.pictures)
    pictures = [picture for style in styles.values() for picture in style]
    overlays = {**load_logos(settings), **load_characters(settings)}
    steps = 2 * settings.fidelity_steps
    return train_fidelity(pipeline, overlays.values(), pictures, captions * len(styles), steps, settings)


@lru_cache(maxsize=1)
def _styles(count: int) -> tuple[dict[str, list[Image.Image]], list[str]]:
    """Pictures in the base model's style, the new one, and one that some tasks forbid; and the objects' captions."""
    files = {
        "fluent": DEMO_ASSETS / "fluent.parquet",
        NEW_STYLE: DEMO_ASSETS / "noto.parquet",
        "openmoji": ASSETS / "openmoji.parquet",
    }
    loaded = {name: load_pictures(file, count) for name, file in files.items()}
    captions = loaded["fluent"][1]
    return {name: [p.convert("RGB") for p in pictures] for name, (pictures, _) in loaded.items()}, captions
