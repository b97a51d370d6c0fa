"""What an adapter has learned, of the concept and of all else, beside its base model and an unprotected adapter.

One pipeline is loaded; the adapters take turns on it. Every model gets the same prompts and seeds, the same questions,
and is judged by the same models, which the user brings: what no model was given for is not measured, and the report
says so. Whether the concept is found in samples is never told alone: an adapter that has learned nothing, or that
spoils its samples, does not show it either.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .._version import installed_versions
from ..base_models import identify
from ..behaviour import BehaviourResult, load_probes, measure_drift
from ..clock import Clock
from ..concept_fit import Concept, ConceptExample, concept_examples, load_concept
from ..concepts import ConceptSet, nth_of_shuffles
from ..errors import BehaviourError, ConceptDataError
from ..files import check_can_hold
from ..pipelines import PipelineFamily, load_pipeline
from ..probes import ConceptProbes
from ..projection import dtype_name
from ..training_data import TrainingData, draw_frame, load_table
from .adapters import AdapterFile, adapter_on, locate_adapter
from .evaluation_page import found_beside_evaluation, write_evaluation
from .evaluation_report import EvaluationReport, LossCurves, Measure, Sample
from .figures import mean_estimate, share_of_drop
from .judging import Bar, Judges, Pictures, Verdict
from .sampling import draw_samples
from .timestep_losses import TimestepQuestions, estimates_by_timestep

__all__ = ["evaluate_adapter", "read_concept"]

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "torchmetrics", "onnxruntime")
_APART = 10_000
"""Between the seeds of an evaluation and those of a fit: the concept is pasted elsewhere than in the probes."""


# The concept


def read_concept(
    path_or_id: str,
    *,
    ranges: Mapping[str, tuple[float, float] | None] | None = None,
    data: TrainingData | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    cache_dir: str | None = None,
) -> Concept:
    """Read a concept in whatever form it has.

    A file is an overlay. A folder or data set with a column `without` is one of pairs, with a column `mask` one of
    pictures with masks, and with neither one of pictures that show the concept all over.

    Args:
        path_or_id: File, imagefolder, or id of a data set.
        ranges: Of an overlay, as :func:`~peft_gradproj.concept_fit.load_concept` takes them.
        data: Where captions are drawn from if the concept has none.
        image_column: Column of the pictures.
        caption_column: Column of their captions.
        cache_dir: Where `datasets` keeps what it has prepared.

    Raises:
        ConceptDataError: If there is no such concept, or ranges are given and it is no overlay.
    """
    if Path(path_or_id).is_file() or Path(path_or_id).suffix.lower() in (".png", ".webp", ".gif", ".tif", ".tiff"):
        return load_concept(overlay=path_or_id, ranges=ranges)
    columns = load_table(path_or_id, [image_column], cache_dir=cache_dir).column_names
    form = "pairs" if "without" in columns else "masks" if "mask" in columns else "pictures"
    options: Any = {form: path_or_id, "image_column": image_column, "caption_column": caption_column}
    return load_concept(**options, ranges=ranges, data=data, cache_dir=cache_dir)


# Evaluation


def evaluate_adapter(
    adapter: str | Path,
    base: Any,
    concept: Concept,
    prompts: Sequence[str],
    *,
    plain: str | Path | None = None,
    data: TrainingData | None = None,
    reference_data: TrainingData | None = None,
    probes: ConceptProbes | str | Path | None = None,
    reference: ConceptProbes | str | Path | None = None,
    sscd: str | Path | None = None,
    sscd_threshold: float | None = None,
    clip: str | None = None,
    kid_features: str | None = None,
    name: str = "",
    samples_per_prompt: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    batch_size: int = 4,
    num_pictures: int = 32,
    timestep_bins: int = 10,
    seed: int = 0,
    revision: str | None = None,
    base_revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
    output_dir: str | Path | None = None,
    command: Sequence[str] = (),
    progress: bool = True,
) -> EvaluationReport:
    """Compare an adapter with its base model, and with an adapter without protection if one is given.

    Args:
        adapter: The protected adapter: a file, a folder, or a Hub id.
        base: A pipeline of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5, its folder, or its Hub id.
        concept: What must not have been learned, as for :func:`~peft_gradproj.fit_concept`.
        prompts: To sample with.
        plain: An adapter to compare with, trained without protection.
        data: What the concept is pasted onto or named in; `reference_data` by default.
        reference_data: Pictures that are free of the concept, and show what was to be learned; of pairs, their halves
            without it by default.
        probes: Concept probes, or where they are.
        reference: Probes that are free of the concept, likewise.
        sscd: File of a copy-detection model, see :class:`~.image_metrics.CopyDetector`.
        sscd_threshold: Similarities above it count as found. By default halfway between real pictures with the concept
            and without for crops, of which nothing is found or not where these do not tell; .75 for whole pictures.
        clip: CLIP model for the CLIP score, a folder or Hub id.
        kid_features: What KID is computed on, see :class:`~.image_metrics.KernelDistance`.
        name: What the concept is called.
        samples_per_prompt: Samples of each model for each prompt.
        num_inference_steps: What the pipeline does by default if `None`.
        guidance_scale: Likewise.
        resolution: Side of samples and pictures in pixels; likewise.
        batch_size: Samples, and examples for the denoiser, at once.
        num_pictures: Most pictures of the concept, and of the reference, that are looked at, drawn by the seed. KID
            takes all of the reference.
        timestep_bins: Of the denoising losses.
        seed: Of everything that is random; samples have the seeds from here on.
        revision: Branch, tag or commit of the adapter on the Hub.
        base_revision: Of the pipeline.
        variant: Of the pipeline's weights, such as `fp16`.
        dtype: In which it is loaded.
        device: Where to run; a GPU of CUDA if there is one.
        output_dir: Folder for `evaluation.json`, `index.html` and the samples. An earlier evaluation there is replaced
            when all is done.
        command: The command line that asked for it, for the report.
        progress: Show progress bars.

    Raises:
        AdapterFolderError: If there is no such adapter.
        BehaviourError: If an adapter, the probes or a model to judge with does not fit.
        ConceptDataError: If the pipeline, the concept or the pictures do not give what is needed.
    """
    if min(samples_per_prompt, batch_size, num_pictures, timestep_bins) < 1 or not prompts:
        raise ConceptDataError(
            f"{len(prompts)} prompts, samples_per_prompt={samples_per_prompt}, batch_size={batch_size}, "
            f"num_pictures={num_pictures}, timestep_bins={timestep_bins}; expected at least 1 of each."
        )
    if seed < 0:
        raise ConceptDataError(f"seed={seed}; expected 0 or more.")
    if output_dir is not None:
        _check_output(Path(output_dir))
    clock, bar = Clock(), _bars(progress)
    with clock("load"):
        files = {"base": None, "protected": locate_adapter(adapter, revision=revision)}
        if plain is not None:
            files = {"base": None, "plain": locate_adapter(plain), "protected": files["protected"]}
        probe_sets = [None if given is None else load_probes(given) for given in (probes, reference)]
        if isinstance(base, str | Path):
            options: Any = {"revision": base_revision, "variant": variant, "dtype": dtype, "device": device}
            base = load_pipeline(str(base), **options)
        family = PipelineFamily.of(base)
        judges = Judges.load(
            sscd, clip, kid_features, threshold=sscd_threshold, device=family.denoiser.device, seed=seed
        )
    with clock("pictures"):
        pictures = _pictures(family, concept, data, reference_data, num_pictures, resolution, seed)
        if sscd is not None and clip is None and not pictures.reference:
            raise ConceptDataError(
                "whether the concept is found is not told without a figure of quality beside it: give a CLIP model "
                "(--clip) or pictures without the concept (--reference-data-dir) as well."
            )
        judges.try_out(pictures)
        questions = {
            kind: TimestepQuestions.draw(family, examples, bins=timestep_bins, seed=seed + number)
            for number, (kind, examples) in enumerate(_asked(pictures).items())
        }
    sampling = _Sampling.of(
        family, prompts, samples_per_prompt, num_inference_steps, guidance_scale, pictures.side, seed
    )
    answers = _Answers.of(family, files, probe_sets, questions, sampling, batch_size, clock, bar)
    with clock("judge"):
        verdict = judges.judge(answers.samples, sampling.prompts, pictures, bar)

    report = EvaluationReport(
        concept=name or "the concept",
        models=tuple(files),
        measures=(*verdict.measures, *_learned(answers.losses), *_drifts(answers.drift, probe_sets)),
        drift=answers.drift,
        curves={kind: _curves(questions[kind], losses) for kind, losses in answers.losses.items()},
        samples=tuple(_described(files, sampling, verdict)),
        settings={
            "base": dict(zip(("name", "revision"), identify(family.pipeline), strict=True)),
            **{model: file.to_dict() for model, file in files.items() if file is not None},
            "family": family.name,
            "scheduler": type(family.pipeline.scheduler).__name__,
            "prompts": list(prompts),
            "samples_per_prompt": samples_per_prompt,
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance,
            "resolution": pictures.side,
            "batch_size": batch_size,
            "pictures": {kind: len(examples) for kind, examples in _asked(pictures).items()},
            "reference_set": len(pictures.reference_set),
            "timestep_bins": timestep_bins,
            "sscd": sscd and str(sscd),
            "sscd_thresholds": dict(verdict.thresholds),
            "sscd_crop_sizes": list(verdict.crop_sizes),
            "clip": clip,
            "kid_features": kid_features,
            "seed": seed,
            "dtype": dtype_name(family.denoiser.dtype),
            "device": str(family.denoiser.device),
        },
        versions={
            **installed_versions(*_LIBRARIES),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        seconds=clock.seconds,
        command=tuple(command),
    )
    if output_dir is not None:
        drawn = [picture for model in files for picture in answers.samples[model]]
        write_evaluation(Path(output_dir), report, drawn, [example.picture for example in pictures.concept])
    return report


def _check_output(folder: Path) -> None:
    """Refuse to replace what no evaluation wrote, and what cannot be written, before hours of sampling."""
    if folder.exists() and not folder.is_dir():
        raise ConceptDataError(f"{folder} is a file; expected a folder to write to.")
    other = found_beside_evaluation(folder)
    if other is not None:
        raise ConceptDataError(
            f"{folder} holds other things than an evaluation, {other}, which would be lost when it is replaced; move "
            "them away, or give a new or an empty folder."
        )
    check_can_hold(folder, ConceptDataError)


# What is asked


def _pictures(
    family: PipelineFamily,
    concept: Concept,
    data: TrainingData | None,
    reference_data: TrainingData | None,
    most: int,
    resolution: int | None,
    seed: int,
) -> Pictures:
    below = data if data is not None else reference_data
    available = len(concept) if isinstance(concept, ConceptSet) else most if below is None else len(below)
    options: Any = {"resolution": resolution, "center_crop": True, "seed": seed + _APART}
    examples = concept_examples(family, concept, below, count=min(most, available), **options)
    side = examples[0].picture.width
    if reference_data is None:
        # The other halves of an overlay or of words are the data below, which may show the concept.
        if not isinstance(concept, ConceptSet):
            return Pictures(examples, [], [])
        halves = [ConceptExample(e.without, e.prompt, e.frame) for e in examples if e.without is not None]
        every = [(pair.without, pair.prompt) for pair in concept if pair.without is not None]
        return Pictures(examples, halves, _Squares(TrainingData(*zip(*every, strict=True)), side) if every else [])
    squares = _Squares(reference_data, side)
    for index in range(len(squares)):
        # What cannot be read is to show before hours of sampling.
        squares[index]
    # Not the first: folders are often sorted by kind.
    drawn = sorted(nth_of_shuffles(index, len(squares), seed) for index in range(min(most, len(squares))))
    return Pictures(examples, [squares.example(index) for index in drawn], squares)


class _Squares(Sequence[Image.Image]):
    """Squares of all pictures, each made when it is asked for: together they may be more than the memory."""

    def __init__(self, data: TrainingData, side: int) -> None:
        self._data, self._side = data, side

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.example(index).picture

    def example(self, index: int) -> ConceptExample:
        """The square with its caption."""
        picture, caption = self._data[index]
        frame = draw_frame(picture.size, self._side, center=True, generator=np.random.default_rng(0))
        return ConceptExample(frame.apply(picture), caption, frame)


def _asked(pictures: Pictures) -> dict[str, Sequence[ConceptExample]]:
    kinds = {"concept": pictures.concept, "reference": pictures.reference}
    return {kind: examples for kind, examples in kinds.items() if examples}


@dataclass(frozen=True)
class _Sampling:
    """The same for every model."""

    prompts: list[str]
    """One for each sample."""
    seeds: list[int]
    steps: int
    guidance: float
    side: int

    @classmethod
    def of(
        cls,
        family: PipelineFamily,
        prompts: Sequence[str],
        repeats: int,
        steps: int | None,
        guidance: float | None,
        side: int,
        seed: int,
    ) -> _Sampling:
        usual = inspect.signature(family.pipeline.__call__).parameters
        every = [prompt for prompt in prompts for _ in range(repeats)]
        return cls(
            every,
            [seed + number for number in range(len(every))],
            usual["num_inference_steps"].default if steps is None else steps,
            usual["guidance_scale"].default if guidance is None else guidance,
            side,
        )


@dataclass(frozen=True)
class _Answers:
    """What the models, taking turns on one pipeline, answered."""

    drift: dict[str, BehaviourResult]
    """By model; empty without probes."""
    losses: dict[str, dict[str, Tensor]]
    """By kind of pictures and model, shape `(N, bins)`."""
    samples: dict[str, list[Image.Image]]
    """By model."""

    @classmethod
    def of(
        cls,
        family: PipelineFamily,
        files: Mapping[str, AdapterFile | None],
        probe_sets: Sequence[ConceptProbes | None],
        questions: Mapping[str, TimestepQuestions],
        sampling: _Sampling,
        batch_size: int,
        clock: Clock,
        bar: Bar,
    ) -> _Answers:
        for file in files.values():
            # What does not fit is to show before hours of sampling.
            with _turn(family, file):
                pass
        answers = cls({}, {kind: {} for kind in questions}, {})
        for model, file in files.items():
            with clock(model), _turn(family, file):
                if probe_sets[0] is not None:
                    answers.drift[model] = _drift(family, probe_sets[0], probe_sets[1], batch_size)
                for kind, asked in questions.items():
                    with bar(f"{model}: losses, {kind}", len(asked)) as shown:
                        losses = asked.losses(family, batch_size=batch_size, progress=shown.update)
                    answers.losses[kind][model] = losses
                with bar(f"{model}: samples", len(sampling.seeds)) as shown:
                    answers.samples[model] = draw_samples(
                        family,
                        sampling.prompts,
                        sampling.seeds,
                        num_inference_steps=sampling.steps,
                        guidance_scale=sampling.guidance,
                        resolution=sampling.side,
                        batch_size=batch_size,
                        progress=shown.update,
                    )
        return answers


def _turn(family: PipelineFamily, file: AdapterFile | None) -> AbstractContextManager[None]:
    return nullcontext() if file is None else adapter_on(family, file)


def _drift(
    family: PipelineFamily, probes: ConceptProbes, reference: ConceptProbes | None, batch_size: int
) -> BehaviourResult:
    found = measure_drift(family.denoiser, probes, reference, batch_size=batch_size)
    if not found.same_base:
        raise BehaviourError(
            f"the concept probes were collected on another base model: it is off by {found.stored_mismatch:.2g} of the "
            "energy of their outputs. Collect them on this one, or leave them out."
        )
    return found


# What was found


def _learned(losses: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Measure]:
    titles: Any = {
        "concept": ("concept", "concept", "where the concept is, on pictures that show it"),
        "reference": ("rest", "pictures without", "on pictures without the concept"),
    }
    for kind, (about, what, where) in titles.items():
        loss: Any = {
            "name": f"{kind}_loss",
            "title": f"denoising loss, {what}",
            "about": about,
            "explanation": f"Mean square error {where}, over all timesteps.",
        }
        learned: Any = {
            "name": f"{kind}_learned",
            "title": f"drop of that loss, {what}",
            "about": about,
            "explanation": "How far it came down from the base model's on the same questions, as a share of it.",
        }
        if kind not in losses:
            reason = "no pictures without the concept (--reference-data-dir)"
            yield from (Measure(**given, not_measured=reason) for given in (loss, learned))
            continue
        means = {model: values.mean(1) for model, values in losses[kind].items()}
        yield Measure(**loss, figures={model: mean_estimate(values) for model, values in means.items()})
        zero = torch.zeros_like(means["base"])
        drops = {m: share_of_drop(means["base"], values, zero) for m, values in means.items() if m != "base"}
        yield Measure(**learned, figures=drops)
        if "plain" not in means:
            continue
        of_plain: Any = {
            "name": f"{kind}_learned_of_plain",
            "title": f"drop as a share of plain's, {what}",
            "about": about,
            "explanation": "0 as the base model, 1 as the plain LoRA.",
        }
        # Of a drop that may be none, a share is nothing.
        if not drops["plain"].value > 2 * drops["plain"].standard_error:
            reason = "the plain LoRA's loss is not below the base model's by more than two standard errors"
            yield Measure(**of_plain, not_measured=reason)
            continue
        share = share_of_drop(means["base"], means["protected"], means["plain"])
        yield Measure(**of_plain, figures={"protected": share})


def _drifts(drift: Mapping[str, BehaviourResult], probe_sets: Sequence[ConceptProbes | None]) -> Iterator[Measure]:
    on_concept: Any = {
        "name": "drift",
        "title": "drift on concept probes",
        "about": "concept",
        "explanation": "Mean square distance from the base model's outputs, where the probes' weights are. Of the "
        "denoiser alone: probes hold encoded prompts, so that an adapter's part on text encoders is not in it.",
    }
    on_reference: Any = {
        **on_concept,
        "name": "reference_drift",
        "title": "drift on reference probes",
        "about": "rest",
    }
    missing = [None if given is not None else "no probes given" for given in probe_sets]
    if missing[0]:
        yield Measure(**on_concept, not_measured=f"{missing[0]} (--probes)")
    else:
        yield Measure(**on_concept, figures={model: found.drift for model, found in drift.items()})
    if any(missing):
        yield Measure(**on_reference, not_measured="no probes given (--probes and --reference)")
    else:
        yield Measure(**on_reference, figures={model: found.reference_drift for model, found in drift.items()})


def _curves(questions: TimestepQuestions, losses: Mapping[str, Tensor]) -> LossCurves:
    return LossCurves(
        pictures=len(questions.examples),
        timesteps=questions.ranges,
        losses={model: estimates_by_timestep(values) for model, values in losses.items()},
        changes={
            model: estimates_by_timestep(values - losses["base"]) for model, values in losses.items() if model != "base"
        },
    )


def _described(models: Iterable[str], sampling: _Sampling, verdict: Verdict) -> Iterator[Sample]:
    for model in models:
        for index, (prompt, seed) in enumerate(zip(sampling.prompts, sampling.seeds, strict=True)):
            scores = {measure: float(values[model][index]) for measure, values in verdict.scores.items()}
            yield Sample(model, prompt, seed, f"samples/{model}/{index:04d}.png", scores)


def _bars(wanted: bool) -> Bar:
    return lambda description, total: tqdm(desc=description, total=total, disable=not wanted)
