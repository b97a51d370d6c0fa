"""Samples, judged by the models that were brought: whether they show the concept, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..concept_fit import ConceptExample
from .evaluation_report import Measure
from .figures import Share, mean_estimate
from .image_metrics import ClipScorer, CopyDetector, KernelDistance, concept_box, crop_sizes

__all__ = ["Bar", "Judges", "Pictures", "Verdict"]

Bar = Callable[[str, int], Any]
"""`bar(description, total)` gives a progress bar, as tqdm's."""

WHOLE_THRESHOLD = 0.75
"""By SSCD's authors, 9 of 10 pairs of whole pictures above it are copies (of `sscd_disc_mixup`, on DISC)."""
FILLING = 0.9
"""A concept whose box has at least this share of its picture's side is no detail to be searched for in crops."""
SMALLEST = 1 / 16
"""Least share of its picture's side that a concept's box has, with what is around it, so that there are at most about
2,000 crops of a picture. A speck in one mask would make a million."""


@dataclass(frozen=True)
class Pictures:
    """What samples are compared with; squares of one size."""

    concept: Sequence[ConceptExample]
    reference: Sequence[ConceptExample]
    """Free of the concept; may be empty."""
    reference_set: Sequence[Image.Image]
    """All that there are of these, for likeness to the whole set."""

    @property
    def side(self) -> int:
        """In pixels."""
        return self.concept[0].picture.width


@dataclass(frozen=True)
class Verdict:
    """What was found in samples."""

    measures: tuple[Measure, ...]
    scores: Mapping[str, Mapping[str, Tensor]]
    """By measure and model, one for each sample, shape `(N,)`."""
    crop_sizes: tuple[float, ...]
    """In which the concept was searched for."""
    thresholds: Mapping[str, float]
    """By measure, above which the concept counts as found."""


@dataclass(frozen=True)
class Judges:
    """The models that judge; without one, its measures are left out.

    Args:
        detector: For SSCD similarity.
        clip: For the CLIP score.
        kid: For the kernel inception distance.
        threshold: Of SSCD similarity, above which the concept counts as found; `None` for one that suits the measure.
    """

    detector: CopyDetector | None
    clip: ClipScorer | None
    kid: KernelDistance | None
    threshold: float | None

    @classmethod
    def load(
        cls,
        sscd: str | Path | None,
        clip: str | None,
        kid_features: str | None,
        *,
        threshold: float | None,
        device: str | torch.device,
        seed: int,
    ) -> Judges:
        """Load what is given; `seed` is that of KID's halves.

        Raises:
            BehaviourError: If there is no such model.
        """
        return cls(
            None if sscd is None else CopyDetector(sscd, device=device),
            None if clip is None else ClipScorer(clip, device=device),
            None if kid_features is None else KernelDistance(kid_features, device=device, seed=seed),
            threshold,
        )

    def try_out(self, pictures: Pictures) -> None:
        """Let each model see two squares: what does not take them is to show before hours of sampling.

        Raises:
            BehaviourError: If a model does not take pictures.
        """
        example = pictures.concept[0]
        squares = [example.picture] * 2
        if self.detector is not None:
            self.detector.embed(squares)
        if self.clip is not None:
            self.clip.scores(squares, [example.prompt] * 2)
        if self.kid is not None:
            self.kid.features(squares)

    def judge(
        self, samples: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], pictures: Pictures, bar: Bar
    ) -> Verdict:
        """Judge the samples of all models.

        Args:
            samples: By model, one for each prompt.
            prompts: Of the samples.
            pictures: What they are compared with.
            bar: Makes progress bars.

        Raises:
            BehaviourError: If a model does not take pictures.
        """
        likeness = _Likeness(self, samples, pictures, bar)
        clip, clip_scores = self._clip_scores(samples, prompts, pictures, bar)
        measures = (*likeness.crops(), *likeness.whole(), clip, self._kid(samples, pictures, bar))
        scores = likeness.scores | ({} if clip_scores is None else {"clip_score": clip_scores})
        return Verdict(measures, scores, likeness.sizes, likeness.thresholds)

    def _clip_scores(
        self, samples: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], pictures: Pictures, bar: Bar
    ) -> tuple[Measure, dict[str, Tensor] | None]:
        about: Any = {
            "name": "clip_score",
            "title": "CLIP score",
            "about": "rest",
            "explanation": "100 times the cosine of a picture's and its prompt's embeddings; higher is better. Of "
            "pictures without the concept, with their own captions.",
        }
        if self.clip is None:
            return Measure(**about, not_measured="no model given (--clip)"), None
        asked = {name: (drawn, prompts) for name, drawn in samples.items()}
        if pictures.reference:
            asked["without"] = ([e.picture for e in pictures.reference], [e.prompt for e in pictures.reference])
        with bar("CLIP score", sum(len(shown) for shown, _ in asked.values())) as progress:
            scores = {name: self.clip.scores(*pair, progress=progress.update) for name, pair in asked.items()}
        measure = Measure(**about, figures={name: mean_estimate(values) for name, values in scores.items()})
        return measure, {name: scores[name] for name in samples}

    def _kid(self, samples: Mapping[str, Sequence[Image.Image]], pictures: Pictures, bar: Bar) -> Measure:
        about: Any = {
            "name": "kid",
            "title": "KID",
            "about": "rest",
            "explanation": f"Kernel inception distance of the samples from {len(pictures.reference_set)} pictures "
            "without the concept; lower is better, and about 0 the best. It also grows where prompts ask for other "
            "things than those pictures show.",
        }
        reference, fewest = pictures.reference_set, min(map(len, samples.values()))
        if self.kid is None:
            return Measure(**about, not_measured="no model given (--kid-features)")
        if not reference:
            return Measure(**about, not_measured="no pictures without the concept (--reference-data-dir)")
        if min(fewest, len(reference)) < self.kid.fewest:
            reason = f"{fewest} samples and {len(reference)} pictures; it takes {self.kid.fewest} of each"
            return Measure(**about, not_measured=reason)
        with bar("KID", len(reference) + sum(map(len, samples.values()))) as progress:
            known = self.kid.features(reference, progress=progress.update)
            drawn = {name: self.kid.features(shown, progress=progress.update) for name, shown in samples.items()}
        return Measure(**about, figures={name: self.kid.distance(found, known) for name, found in drawn.items()})


class _Likeness:
    """SSCD similarity of samples, and of real pictures, to what shows the concept.

    `sizes` are those of the crops; `scores` of the samples and `thresholds` are filled as they are measured.
    """

    def __init__(
        self, judges: Judges, samples: Mapping[str, Sequence[Image.Image]], pictures: Pictures, bar: Bar
    ) -> None:
        self._judges, self._samples, self._pictures, self._bar = judges, samples, pictures, bar
        # Words are in captions; what is in the pictures below them is not the concept.
        self._shown = [example for example in pictures.concept if example.prompt_without is None]
        self._boxes = [
            concept_box(e.mask, smallest=SMALLEST) if e.mask else (0, 0, *e.picture.size) for e in self._shown
        ]
        shares = [(box[2] - box[0]) / min(e.picture.size) for box, e in zip(self._boxes, self._shown, strict=True)]
        self._fills = bool(shares) and min(shares) >= FILLING
        self.sizes: tuple[float, ...] = ()
        self.scores: dict[str, dict[str, Tensor]] = {}
        self.thresholds: dict[str, float] = {}

    def crops(self) -> tuple[Measure, ...]:
        """The most similar crop, of the sizes that the concept has."""
        fault = "the concept fills its pictures" if self._fills else None
        if self._shown and not self._fills and self._judges.detector is not None:
            self.sizes = tuple(crop_sizes(self._boxes, [min(e.picture.size) for e in self._shown]))
        queries = [e.picture.crop(box) for e, box in zip(self._shown, self._boxes, strict=True)]
        return self._measured("sscd_crops", "most similar crop", queries, self.sizes, fault)

    def whole(self) -> tuple[Measure, ...]:
        """The whole picture against whole pictures that show the concept."""
        return self._measured("sscd_whole", "whole picture", [e.picture for e in self._shown], (1.0,), None)

    def _measured(
        self, name: str, what: str, queries: Sequence[Image.Image], sizes: Sequence[float], fault: str | None
    ) -> tuple[Measure, ...]:
        similarity: Any = {
            "name": name,
            "title": f"SSCD similarity, {what}",
            "about": "concept",
            "explanation": f"Largest cosine with any of {len(queries)} pictures of the concept, averaged. Real "
            "pictures are compared with others than themselves, and than what was made of them.",
        }
        found: Any = {
            "name": f"{name}_found",
            "title": f"concept found, {what}",
            "about": "concept",
        }
        detector = self._judges.detector
        if detector is None:
            fault = "no model given (--sscd)"
        elif not self._shown:
            fault = "the concept was given in words"
        if detector is None or fault is not None:
            return Measure(**similarity, not_measured=fault), Measure(**found, not_measured=fault)
        real = {
            "with_concept": [example.picture for example in self._shown],
            "without": [example.picture for example in self._pictures.reference],
        }
        if len(self._shown) == 1:
            # There is no other to compare it, or what it was made from, with.
            real = {}
        asked = {column: shown for column, shown in (*self._samples.items(), *real.items()) if shown}
        concept = detector.embed(queries)
        with self._bar(f"SSCD, {what}", sum(map(len, asked.values()))) as progress:
            scores = {
                column: detector.scores(shown, concept, sizes=sizes, progress=progress.update)
                for column, shown in asked.items()
            }
        scores |= {column: _of_others(scores[column], real[column], self._shown) for column in real if column in scores}
        best = {column: matrix.amax(1) for column, matrix in scores.items() if len(matrix)}
        self.scores[name] = {model: best[model] for model in self._samples}
        estimates = {column: mean_estimate(values) for column, values in best.items()}
        if len(best.get("with_concept", ())) == 2:
            # Each is compared with the other: one comparison, made twice.
            estimates["with_concept"] = replace(estimates["with_concept"], standard_error=math.nan)
        measured = Measure(**similarity, figures=estimates)
        threshold, whose = self._threshold(best, details=list(sizes) != [1.0])
        if threshold is None:
            return measured, Measure(**found, not_measured=whose)
        self.thresholds[name] = threshold
        return measured, Measure(
            **found,
            explanation=f"Leak: the share of pictures whose similarity is above {threshold:.3g}, {whose}.",
            figures={column: Share.of((values > threshold).tolist()) for column, values in best.items()},
        )

    def _threshold(self, best: Mapping[str, Tensor], *, details: bool) -> tuple[float | None, str]:
        """Above which the concept counts as found, and whose choice that is; or `None`, and why there is none."""
        if self._judges.threshold is not None:
            return self._judges.threshold, "as was asked for"
        if not details:
            return WHOLE_THRESHOLD, "as is usual for copies of whole pictures"
        # A crop holds some of what lies below the concept: even a copy is less similar than one of a whole picture, so
        # that by the threshold of those the concept would be found nowhere.
        for column, lack in (
            ("with_concept", "second picture of the concept to compare one with"),
            ("without", "pictures without the concept (--reference-data-dir)"),
        ):
            if column not in best:
                return None, f"no {lack}, and no threshold given (--sscd-threshold)"
        high, low = float(best["with_concept"].mean()), float(best["without"].mean())
        if high > low:
            return (high + low) / 2, "halfway between the means of real pictures with the concept and without"
        return None, (
            f"real pictures with the concept are no more similar to it ({high:.3g}) than those without ({low:.3g}), "
            "and no threshold given (--sscd-threshold)"
        )


def _of_others(scores: Tensor, shown: Sequence[Image.Image], concept: Sequence[ConceptExample]) -> Tensor:
    """Scores `(N, M)` of real pictures, -1 with examples of the concept that are the picture, or were made from it.

    Pictures for which there is no other example are left out.
    """
    sources = [{picture.tobytes() for picture in (e.picture, e.without) if picture is not None} for e in concept]
    pixels = [picture.tobytes() for picture in shown]
    own = torch.tensor([[p in source for source in sources] for p in pixels])
    return scores.masked_fill(own, -1.0)[~own.all(1)]
