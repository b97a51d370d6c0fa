"""What the demo measures of an adapter: what it shows, what it has learned, how good its samples are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..concepts import ConceptSet, Overlay
from ..diffusion_inputs import (
    LatentPairs,
    concept_probe_batches,
    decode_latents,
    encode_concept_set,
    encode_images,
    encode_prompts,
    mask_weights,
)
from ..evaluation.denoising import DenoisingQuestions, denoising_losses
from ..evaluation.detector import ConceptDetector
from ..evaluation.fidelity import PromptFidelity
from ..evaluation.figures import Estimate, Share, share_of_drop
from ..projection import drift
from .data import StampedData
from .precision import autocast
from .settings import DemoSettings

__all__ = [
    "Figures",
    "Judges",
    "Questions",
    "as_decoded",
    "compare",
    "mask_shares",
    "train_detector",
    "train_fidelity",
    "train_judges",
]

TRAINING_PICTURES = 128
"""So many of the training pictures are asked about."""


@dataclass(frozen=True)
class Judges:
    """The two networks that look at samples."""

    detector: ConceptDetector
    fidelity: PromptFidelity


def mask_shares(masks: Tensor, data: StampedData) -> dict[str, float | None]:
    """How well masks `(N, 1, h, w)` cover the stamps: the share of stamped latents that is masked, and of others.

    Neighbours of stamped latents are not counted among the others, since masks are widened on purpose. `None` where
    there are no such latents, as there are no others where the concept fills every picture.
    """
    stamped, near = (mask_weights(data.masks, masks, dilation=d) > 0.5 for d in (0, 2))
    asked = {"stamped": masks[stamped], "elsewhere": masks[~near]}
    return {kind: float(latents.mean()) if len(latents) else None for kind, latents in asked.items()}


def train_judges(
    pipeline: Any,
    logos: dict[str, Overlay],
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    settings: DemoSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> Judges:
    """Train and calibrate the judges on real pictures, as the pipeline's VAE shows them."""
    detector = train_detector(pipeline, logos, settings.logo, pictures, settings, progress)

    def further(done: int) -> None:
        progress(settings.detector_steps + done)

    return Judges(
        detector,
        train_fidelity(pipeline, logos.values(), pictures, captions, settings.fidelity_steps, settings, further),
    )


def train_detector(
    pipeline: Any,
    overlays: Mapping[str, Overlay],
    name: str,
    pictures: Sequence[Image.Image],
    settings: DemoSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> ConceptDetector:
    """Train a detector of one of the overlays, which tells it from the others, wherever a sample may show it."""
    return ConceptDetector.fit(
        _anywhere(overlays[name]),
        pictures,
        distractors=[_anywhere(overlay) for other, overlay in overlays.items() if other != name],
        distort=partial(as_decoded, pipeline),
        steps=settings.detector_steps,
        scenes=settings.detector_scenes,
        seed=settings.seed,
        progress=progress,
    )


def train_fidelity(
    pipeline: Any,
    overlays: Iterable[Overlay],
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    steps: int,
    settings: DemoSettings,
    progress: Callable[[int], None] = lambda done: None,
) -> PromptFidelity:
    """Train the judge of whether samples show what their prompts name, whatever overlay lies on them."""
    return PromptFidelity.fit(
        pictures,
        captions,
        overlays=[_anywhere(overlay) for overlay in overlays],
        distort=partial(as_decoded, pipeline),
        steps=steps,
        seed=settings.seed,
        progress=progress,
    )


def _anywhere(overlay: Overlay) -> Overlay:
    return replace(overlay, across=(0.0, 1.0), down=(0.0, 1.0))


def as_decoded(pipeline: Any, pixels: Tensor) -> Tensor:
    """Pictures `(N, 3, H, W)` in [-1, 1] as the pipeline's VAE shows them, which is all that samples can be like."""
    with autocast():
        return decode_latents(pipeline, encode_images(pipeline, pixels))


class Questions:
    """Fixed questions about what an adapter has learned.

    Args:
        pipeline: Encodes the pictures.
        data: The demo's pictures. What was learned of the style is asked on training pictures as they were before the
            stamp, and on held-out ones.
        concepts: Pictures that nothing was trained on and that show the concept: what was learned of it is asked there.
        schedule: From `noise_schedule`.
        seed: Of noise, timesteps and places.
    """

    def __init__(self, pipeline: Any, data: StampedData, concepts: ConceptSet, schedule: Any, seed: int) -> None:
        self.schedule = schedule
        embeddings = encode_prompts(pipeline, data.held_out_captions)
        seen = data.clean[:TRAINING_PICTURES]
        self.seen = DenoisingQuestions.draw(
            encode_images(pipeline, seen),
            encode_prompts(pipeline, data.captions[: len(seen)]),
            schedule,
            repeats=3,
            seed=seed + 99,
        )
        self.new = DenoisingQuestions.draw(
            encode_images(pipeline, data.held_out), embeddings, schedule, repeats=4, seed=seed + 100
        )
        # Its edges count as the concept: a latent depends on its neighbours' pixels.
        self.pairs: LatentPairs = encode_concept_set(pipeline, concepts, dilation=1)
        self.logo = DenoisingQuestions.draw(
            self.pairs.with_concept,
            self.pairs.embeddings,
            schedule,
            weights=self.pairs.weights,
            repeats=4,
            seed=seed + 102,
        )
        self.seed = seed + 103

    def losses(self, unet: Any) -> dict[str, Tensor]:
        """One loss for each question: of `seen` and `new` objects without the logo, and where the `logo` is."""
        asked = {"seen": self.seen, "new": self.new, "logo": self.logo}
        return {name: denoising_losses(unet, questions, self.schedule) for name, questions in asked.items()}

    def brief(self, unet: Any) -> dict[str, float]:
        """Means on a third of the questions, for curves."""
        asked = {"style": self.seen, "logo": self.logo}
        return {
            name: float(denoising_losses(unet, _first_third(questions), self.schedule).mean())
            for name, questions in asked.items()
        }

    @torch.no_grad()
    def drift(self, unet: Any, base: Any) -> float:
        """Drift on probes of held-out pictures, which the online projection has not seen."""
        values = []
        for inputs, weights, *_ in concept_probe_batches(
            self.pairs, self.schedule, repeats=2, batch_size=64, seed=self.seed
        ):
            values.append(drift(unet(**inputs).sample, base(**inputs).sample, weights))
        return float(torch.stack(values).mean())


def _first_third(questions: DenoisingQuestions) -> DenoisingQuestions:
    count = len(questions.latents) // 3
    return DenoisingQuestions(
        questions.latents[:count],
        questions.embeddings[:count],
        questions.noise[:count],
        questions.timesteps[:count],
        None if questions.weights is None else questions.weights[:count],
    )


@dataclass(frozen=True)
class Figures:
    """One row of the table."""

    leak: Share
    found: list[bool]
    """In which samples the logo was found."""
    top1: Share
    top5: Share
    kept: Estimate | None
    """On the training pictures as they were before the stamp."""
    kept_new: Estimate | None
    """On pictures of objects that were not trained on."""
    learned: Estimate | None
    drift: float


def compare(
    unets: dict[str, Any],
    samples: dict[str, Tensor],
    prompts: Sequence[str],
    questions: Questions,
    judges: Judges,
) -> dict[str, Figures]:
    """Figures of each model; `unets` has the keys `base`, `plain`, `oracle` and others, `samples` the same."""
    losses = {name: questions.losses(unet) for name, unet in unets.items()}

    def drop(name: str, kind: str, yardstick: str) -> Estimate | None:
        if name == "base":
            return None
        return share_of_drop(losses["base"][kind], losses[name][kind], losses[yardstick][kind])

    figures = {}
    for name, unet in unets.items():
        found = judges.detector.detect(samples[name]).tolist()
        ranks = judges.fidelity.ranks(samples[name], prompts)
        figures[name] = Figures(
            leak=Share.of(found),
            found=found,
            top1=judges.fidelity.top(1, ranks),
            top5=judges.fidelity.top(5, ranks),
            kept=drop(name, "seen", "oracle"),
            kept_new=drop(name, "new", "oracle"),
            learned=drop(name, "logo", "plain"),
            drift=questions.drift(unet, unets["base"]),
        )
    return figures
