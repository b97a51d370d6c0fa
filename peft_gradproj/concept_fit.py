"""Concept basis and concept probes of a diffusion pipeline, from a concept and the user's own training data.

The concept comes in one of four forms, and decides what can be made of it:

| form | the basis contrasts | the probes are weighted |
|---|---|---|
| an overlay | the user's pictures with it pasted on, and without | where it lies |
| pairs | their halves | where the halves differ |
| pictures with masks | them and the training data, as two sets | where the masks are |
| words | the user's pictures under captions with them, and without | where they change the base model's answer |

Both halves of a pair have the same noise, the same timestep and the same crop.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .attention import complete_attention
from .base_models import identify
from .basis import ConceptBasis
from .clock import Clock
from .concepts import ConceptPair, ConceptSet, Overlay, nth_of_shuffles
from .contrast import ContrastBatches
from .diffusion_inputs import mask_weights
from .errors import ConceptDataError
from .files import check_can_hold
from .fitting import fit_concept_basis
from .observation import find_layers
from .pipelines import PipelineFamily, checked_resolution, load_pipeline
from .probes import ConceptProbes, adapters_as_before, adapters_disabled, collect_concept_probes, evaluation_mode
from .training_data import (
    UNREADABLE,
    Frame,
    TrainingData,
    draw_frame,
    load_table,
    one_caption,
    read_pictures,
    without_phrase,
)

__all__ = [
    "Concept",
    "ConceptExample",
    "FitReport",
    "concept_examples",
    "fit_concept",
    "iter_concept_examples",
    "load_concept",
    "read_phrases",
]

Concept = Overlay | ConceptSet | Sequence[str]
"""An overlay, a set of pairs or of pictures with masks, or phrases that name the concept."""


# Report


@dataclass(frozen=True)
class FitReport:
    """What was made, and what it cost."""

    concept: str
    family: str
    """`sd`, `sdxl` or `sd3`."""
    base_model: str | None
    revision: str | None
    resolution: int
    """Side of the pictures, in pixels."""
    target_modules: str | list[str]
    """As given: an adapter on these is covered, except for `uncovered`."""
    layers: int
    """How many layers have a basis."""
    derived: list[str]
    """Those of them that show no contrast and have the basis of a partner (see `attention`)."""
    uncovered: list[str]
    """Targeted layers without a basis: leave them out of the adapter, or let them through with `uncovered="warn"`."""
    pairs: int
    """Examples that the basis was fitted on."""
    probes: int
    seconds: dict[str, float]
    """Of each part: `load`, `basis`, `probes`; each with encoding pictures and prompts."""
    bytes: dict[str, int]
    """Of basis and probes, as they are in files."""
    step_seconds: float | None
    """One forward and backward of the denoiser on `step_pictures` examples, the larger part of a training step; `None`
    if the memory did not suffice for it: fitting itself keeps nothing for a backward."""
    step_pictures: int
    files: dict[str, str]
    """Where basis and probes were written, if they were."""

    @property
    def training_steps(self) -> float | None:
        """As many training steps take as long as fitting basis and probes did; both would load the pipeline."""
        if self.step_seconds is None:
            return None
        return (self.seconds["basis"] + self.seconds["probes"]) / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON values."""
        return {**asdict(self), "training_steps": self.training_steps}

    def __str__(self) -> str:
        layers = f"{self.layers} of {self.layers + len(self.uncovered)} targeted layers have a basis"
        if self.derived:
            layers += f", {len(self.derived)} of them that of a partner in their attention"
        of = f" of {self.base_model}" if self.base_model else ""
        lines = [f"{self.concept or 'the concept'} in the {self.family} pipeline{of}", layers]
        lines += [f"no basis: {name}" for name in self.uncovered]
        for name, size in self.bytes.items():
            lines.append(f"{name}: {_readable(size)}{f', {self.files[name]}' if name in self.files else ''}")
        took, steps = f"{self.seconds['basis'] + self.seconds['probes']:.1f} s", self.training_steps
        if steps is not None:
            took += f", as long as {steps:.0f} training steps of {self.step_pictures} pictures "
            took += f"({steps / 10:.1f} % of a run of 1,000)"
        return "\n".join([*lines, took])


def _readable(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


# Fit


def fit_concept(
    pipeline_or_id: Any,
    concept: Concept,
    data: TrainingData | None = None,
    *,
    name: str = "",
    resolution: int | None = None,
    center_crop: bool = False,
    num_pairs: int = 64,
    num_probes: int = 64,
    rank: int = 16,
    spaces: Sequence[str] = ("input", "output"),
    target_modules: str | Sequence[str] | None = None,
    unfit: Literal["refuse", "skip"] = "refuse",
    batch_size: int = 4,
    base_model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
    output_dir: str | Path | None = None,
    save_contrast: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> tuple[ConceptBasis, ConceptProbes, FitReport]:
    """Fit a concept basis and collect concept probes for a diffusion pipeline.

    Args:
        pipeline_or_id: A pipeline of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5, its folder, or its Hub id.
        concept: An overlay, a concept set, or phrases that name the concept.
        data: What will be trained on. Pairs need none.
        name: What the concept is called.
        resolution: Side of the pictures in pixels, best that of the training; what the pipeline makes by default.
        center_crop: Crop pictures in their middle, not at random.
        num_pairs: Examples that the basis is fitted on; every picture is used once before one is used twice.
        num_probes: Concept probes.
        rank: Most directions per layer and space.
        spaces: Some of `input` and `output`; the others need an adapter.
        target_modules: Layers that will be adapted, as in `LoraConfig`; those of diffusers' training scripts.
        unfit: What is done with a layer whose basis would block other learning, as in `fit_concept_basis`.
        batch_size: Examples that the denoiser sees at once.
        base_model: What the files call the base model; the id or folder of the pipeline.
        revision: Branch, tag or commit on the Hub, if the pipeline is loaded here.
        variant: Of its weights, such as `fp16`, likewise.
        dtype: In which it is loaded, likewise.
        device: Where to, likewise.
        output_dir: Folder to write `concept_basis.safetensors` and `concept_probes.safetensors` to.
        save_contrast: Write `contrast_batches.safetensors` as well, by which others can fit the basis anew. They are
            kept in memory for it.
        progress: Show progress bars.
        seed: Of everything that is random: crops, places of the overlay, noise and timesteps.

    Raises:
        ConceptDataError: If the pipeline is of no known family, the concept and the data do not give examples of it, or
            nothing can be written to the folder.
        ConceptBasisError: If no layer shows the concept, or the basis would block other learning.
    """
    if min(num_pairs, num_probes, batch_size) < 1:
        raise ConceptDataError(
            f"num_pairs={num_pairs}, num_probes={num_probes}, batch_size={batch_size}; expected at least 1 of each."
        )
    if not set(spaces) <= {"input", "output"}:
        raise ConceptDataError(f"spaces={list(spaces)}; expected 'input', 'output' or both: others need an adapter.")
    if save_contrast and output_dir is None:
        raise ConceptDataError("save_contrast needs output_dir, the folder to write the contrast batches to.")
    if output_dir is not None:
        check_can_hold(output_dir, ConceptDataError)
    clock = Clock()
    with clock("load"):
        if isinstance(pipeline_or_id, str | Path):
            options: Any = {"revision": revision, "variant": variant, "dtype": dtype, "device": device}
            pipeline_or_id = load_pipeline(str(pipeline_or_id), **options)
        family = PipelineFamily.of(pipeline_or_id)
    side = checked_resolution(family, resolution)
    targets = family.target_modules if target_modules is None else target_modules
    crop = _Crop(side, center_crop, seed)
    examples = _examples(concept, data, crop, family)
    named = _base_model_of(family, base_model)
    about: Any = {"concept": name, "base_model": named[0], "revision": named[1], "progress": progress}

    with clock("basis"):
        batches = _Batches(family, examples, num_pairs, batch_size, seed)
        reference = None
        if not examples.paired:
            reference = _Batches(family, _PlainExamples(_required(data), crop), num_pairs, batch_size, seed + 1)
        halves: tuple[Iterable[Any], Iterable[Any]] = _contrast(batches, reference)
        contrast = ContrastBatches(*halves) if save_contrast else None
        if contrast is not None:
            halves = (contrast.concept, contrast.reference)
        basis = fit_concept_basis(
            family.denoiser,
            *halves,
            target_modules=targets,
            spaces=spaces,
            rank=rank,
            contrast="pairs" if reference is None else "generalized",
            unfit=unfit,
            seed=seed,
            **about,
        )
        basis = complete_attention(family.denoiser, basis, targets)
    with clock("probes"):
        batches = _Batches(family, examples, num_probes, batch_size, seed + 2)
        probes = collect_concept_probes(family.denoiser, batches.probes(), **about)

    report = FitReport(
        concept=name,
        family=family.name,
        base_model=basis.base_model,
        revision=basis.revision,
        resolution=side,
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers=len(basis),
        derived=list((basis.fit or {})["derived"]),
        uncovered=[layer.name for layer in find_layers(family.denoiser, targets) if layer.name not in basis],
        pairs=num_pairs,
        probes=len(probes),
        seconds=clock.seconds,
        bytes={"basis": basis.nbytes, "probes": probes.nbytes},
        step_seconds=None,
        step_pictures=min(batch_size, num_probes),
        files={},
    )
    if output_dir is not None:
        report = _saved(Path(output_dir), basis, probes, contrast, report)
    return basis, probes, replace(report, step_seconds=_step_seconds(family, probes, report.step_pictures))


def _saved(
    folder: Path, basis: ConceptBasis, probes: ConceptProbes, contrast: ContrastBatches | None, report: FitReport
) -> FitReport:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"basis": basis.save(folder), "probes": probes.save(folder)}
    if contrast is not None:
        files["contrast"] = contrast.save(folder / "contrast_batches.safetensors")
    return replace(
        report,
        files={name: str(file) for name, file in files.items()},
        bytes={name: file.stat().st_size for name, file in files.items()},
    )


def _base_model_of(family: PipelineFamily, name: str | None) -> tuple[str | None, str | None]:
    """Name and commit: a pipeline knows its id, its parts know where in the Hub's cache they lie."""
    whole, part = identify(family.pipeline), identify(family.denoiser)
    return name or whole.name or part.name, whole.revision or part.revision


def _step_seconds(family: PipelineFamily, probes: ConceptProbes, count: int) -> float | None:
    """The shorter of two times that a forward and backward take, as of a LoRA whose own gradients cost little."""
    denoiser, seconds = family.denoiser, []
    try:
        with adapters_as_before(denoiser), torch.enable_grad(), evaluation_mode(denoiser), adapters_disabled(denoiser):
            # As the base of a LoRA is, so that less is kept for the backward pass.
            denoiser.requires_grad_(False)
            for _ in range(2):
                inputs = family.placed(probes.select(range(count)).inputs)
                sample = inputs[family.sample].requires_grad_()
                start = time.perf_counter()
                output = denoiser(**inputs, return_dict=False)[0]
                (gradient,) = torch.autograd.grad(output.float().square().mean(), sample)
                # What a GPU has not done yet is waited for.
                gradient.sum().item()
                seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        # Of a GPU `torch.OutOfMemoryError`; elsewhere it is told by the message alone.
        if "memory" in str(error):
            return None
        raise
    return min(seconds)


# Examples


@dataclass(frozen=True)
class ConceptExample:
    """A square picture that shows the concept, and what else is known of it."""

    picture: Image.Image
    prompt: str
    frame: Frame
    without: Image.Image | None = None
    """The same square without the concept; `None` where it is the same picture, or there is none."""
    prompt_without: str | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True)
class _Crop:
    """How pictures become squares."""

    side: int
    center: bool
    seed: int

    def frame(self, picture: Image.Image, index: int) -> Frame:
        generator = np.random.default_rng([self.seed, 2, index])
        return draw_frame(picture.size, self.side, center=self.center, generator=generator)

    def place(self, mask: Image.Image, index: int) -> tuple[int, int, int, int]:
        """One of the pixels that a mask marks, as a box."""
        rows, columns = np.nonzero(np.asarray(mask))
        chosen = np.random.default_rng([self.seed, 4, index]).integers(len(rows))
        left, top = int(columns[chosen]), int(rows[chosen])
        return left, top, left + 1, top + 1


class _Examples(ABC):
    """Endless examples, each made when it is asked for; the same index always gives the same one."""

    paired = True
    """Whether each can be contrasted with itself without the concept."""

    @abstractmethod
    def example(self, index: int) -> ConceptExample:
        """Example `index`."""


def concept_examples(
    family: PipelineFamily,
    concept: Concept,
    data: TrainingData | None = None,
    *,
    count: int,
    resolution: int | None = None,
    center_crop: bool = False,
    seed: int = 0,
) -> list[ConceptExample]:
    """The first `count` examples of a concept as :func:`fit_concept` makes them with this seed; arguments as there.

    Raises:
        ConceptDataError: If the concept and the data do not give examples of it.
    """
    examples = _examples(concept, data, _Crop(checked_resolution(family, resolution), center_crop, seed), family)
    return [examples.example(index) for index in range(count)]


def iter_concept_examples(
    concept: Overlay | ConceptSet, data: TrainingData | None = None, *, count: int, resolution: int, seed: int = 0
) -> Iterator[ConceptExample]:
    """The same of a concept that pictures show, made one by one, randomly cropped; no pipeline is needed.

    Every picture is used once before one is used twice.

    Raises:
        ConceptDataError: If the concept and the data do not give examples of it.
    """
    examples = _examples(concept, data, _Crop(resolution, False, seed))
    return map(examples.example, range(count))


def _examples(
    concept: Concept, data: TrainingData | None, crop: _Crop, family: PipelineFamily | None = None
) -> _Examples:
    if isinstance(concept, Overlay):
        return _OverlayExamples(concept, _required(data), crop)
    if isinstance(concept, ConceptSet):
        return _SetExamples(concept, crop)
    if family is None:
        raise ConceptDataError("words show nothing: give an overlay, pairs, or pictures with masks.")
    return _WordExamples([concept] if isinstance(concept, str) else list(concept), _required(data), crop, family)


def _required(data: TrainingData | None) -> TrainingData:
    if data is None:
        raise ConceptDataError("this form of the concept needs the training data; only pairs can do without.")
    return data


class _PlainExamples(_Examples):
    """The training data as it is."""

    def __init__(self, data: TrainingData, crop: _Crop) -> None:
        self._data, self._crop = data, crop

    def example(self, index: int) -> ConceptExample:
        picture, caption = self._data[nth_of_shuffles(index, len(self._data), self._crop.seed)]
        frame = self._crop.frame(picture, index)
        return ConceptExample(frame.apply(picture), caption, frame)


class _OverlayExamples(_PlainExamples):
    """The training data with an overlay pasted on, after cropping, so that it is seen whole."""

    def __init__(self, overlay: Overlay, data: TrainingData, crop: _Crop) -> None:
        super().__init__(data, crop)
        self._overlay = overlay

    def example(self, index: int) -> ConceptExample:
        plain = super().example(index)
        generator = np.random.default_rng([self._crop.seed, 1, index])
        pasted, mask = self._overlay.paste(plain.picture, self._overlay.place(plain.picture.size, generator))
        return replace(plain, picture=pasted, without=plain.picture, mask=mask)


class NothingLeftError(ConceptDataError):
    """A mask is too small to be seen at a resolution."""


class _SetExamples(_Examples):
    """The examples of a concept set."""

    def __init__(self, concepts: ConceptSet, crop: _Crop) -> None:
        self._concepts, self._crop = concepts, crop
        self.paired = concepts.paired

    def example(self, index: int) -> ConceptExample:
        number = nth_of_shuffles(index, len(self._concepts), self._crop.seed)
        pair = self._concepts[number]
        for frame in self._frames(pair, index):
            mask = frame.apply(pair.mask, mask=True)
            if mask.getbbox() is not None:
                break
        else:
            raise NothingLeftError(
                f"example {number}: nothing is left of the mask at a resolution of {self._crop.side}; it is too small."
            )
        without = None if pair.without is None else frame.apply(pair.without)
        return ConceptExample(frame.apply(pair.with_concept), pair.prompt, frame, without, mask=mask)

    def _frames(self, pair: ConceptPair, index: int) -> Iterator[Frame]:
        yield self._crop.frame(pair.with_concept, index)
        # That crop has lost the concept; one around the middle of the mask has not, if it is in one place.
        yield _around(pair.mask, pair.mask.getbbox(), self._crop.side)
        yield _around(pair.mask, self._crop.place(pair.mask, index), self._crop.side)


def _around(mask: Image.Image, box: Any, side: int) -> Frame:
    """The square whose middle is that of a box (left, upper, right, lower), as far as the picture goes."""
    scale = side / min(mask.size)

    def corner(low: int, high: int, length: int) -> int:
        return int(min(max(0, (low + high) / 2 * scale - side / 2), round(length * scale) - side))

    left, top = (corner(box[i], box[i + 2], mask.size[i]) for i in (0, 1))
    return Frame((mask.height, mask.width), top, left, side)


class _WordExamples(_PlainExamples):
    """The training pictures, each under its caption with a phrase that names the concept, and without it."""

    def __init__(self, phrases: Sequence[str], data: TrainingData, crop: _Crop, family: PipelineFamily) -> None:
        super().__init__(data, crop)
        self._family = family
        self._phrases = [phrase.strip() for phrase in phrases if isinstance(phrase, str) and phrase.strip()]
        if not self._phrases:
            raise ConceptDataError("no phrase names the concept; expected at least one, such as 'in the style of X'.")

    def example(self, index: int) -> ConceptExample:
        plain = super().example(index)
        caption, phrase = plain.prompt, self._phrases[index % len(self._phrases)]
        with_words, without = _with_and_without(caption, phrase)
        while caption and not self._family.reads(with_words):
            # What the text encoder would not read are the words that matter.
            caption = caption.rpartition(" ")[0].rstrip(" ,;")
            with_words, without = _with_and_without(caption, phrase)
        return replace(plain, prompt=with_words, prompt_without=without)


def _with_and_without(caption: str, phrase: str) -> tuple[str, str]:
    """A caption that has the phrase, and the same without it."""
    without, found = without_phrase(caption, phrase)
    if found:
        return caption, without
    # Behind: text encoders are causal, so that the caption's own embeddings stay the same.
    return (f"{caption}, {phrase}" if caption else phrase), caption


# Batches


@dataclass(frozen=True)
class _Batch:
    """Examples as the denoiser sees them."""

    inputs: dict[str, Tensor]
    without: dict[str, Tensor]
    """Without the concept; the same as `inputs` where that is not known."""
    masks: Tensor | None
    """At the latents' resolution, shape `(n, 1, h, w)`."""
    loss_targets: Tensor


class _Batches(Iterable[_Batch]):
    """The first `count` examples in batches, encoded and noised."""

    def __init__(self, family: PipelineFamily, examples: _Examples, count: int, batch_size: int, seed: int) -> None:
        self._family, self._examples, self._seed = family, examples, seed
        self._indices = [list(range(count))[i : i + batch_size] for i in range(0, count, batch_size)]

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[_Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        for indices in self._indices:
            yield self._batch([self._examples.example(index) for index in indices], generator)

    def _batch(self, examples: Sequence[ConceptExample], generator: torch.Generator) -> _Batch:
        family = self._family
        latents = family.latents([example.picture for example in examples])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = family.draw_timesteps(len(examples), generator)
        frames = [example.frame for example in examples]
        conditions = family.conditions([example.prompt for example in examples], frames)
        inputs = family.inputs(latents, noise, timesteps, conditions)

        others = [example.without for example in examples if example.without is not None]
        other_prompts = [example.prompt_without for example in examples if example.prompt_without is not None]
        # In a set of which some have no other half, none is contrasted with its own.
        latents_without = family.latents(others) if len(others) == len(examples) else latents
        conditions_without = family.conditions(other_prompts, frames) if other_prompts else conditions
        without = family.inputs(latents_without, noise, timesteps, conditions_without)

        masks = [example.mask for example in examples if example.mask is not None]
        weights = None
        if masks:
            weights = mask_weights(masks, latents)
        return _Batch(inputs, without, weights, family.loss_target(latents, noise, timesteps))

    def probes(self) -> _Sized:
        """What `collect_concept_probes` takes."""

        def probe(batch: _Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            weights = batch.masks if batch.masks is not None else _weights_of_words(self._family, batch)
            return batch.inputs, weights, batch.loss_targets

        return _Sized(map(probe, self), len(self))


class _Sized(Iterable[Any]):
    """An iterator of known length, for progress bars."""

    def __init__(self, iterator: Iterator[Any], length: int) -> None:
        self._iterator, self._length = iterator, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return self._iterator


def _contrast(batches: _Batches, reference: _Batches | None) -> tuple[_Sized, _Sized]:
    """Batches with the concept and without it, made as they are asked for."""

    def inputs(batch: _Batch) -> Mapping[str, Tensor]:
        return batch.inputs

    def without(batch: _Batch) -> Mapping[str, Tensor]:
        return batch.without

    if reference is not None:
        return _Sized(map(inputs, batches), len(batches)), _Sized(map(inputs, reference), len(reference))
    # Taken in step by whoever fits pairs, so that one batch at a time is kept.
    first, second = tee(batches)
    return _Sized(map(inputs, first), len(batches)), _Sized(map(without, second), len(batches))


def _weights_of_words(family: PipelineFamily, batch: _Batch) -> Tensor:
    """Where words change the base model's answer, at most 1, shape `(n, 1, h, w)`; after DiffEdit (arXiv 2210.11427).

    Raises:
        ConceptDataError: If they change nothing.
    """
    denoiser = family.denoiser
    with torch.no_grad(), evaluation_mode(denoiser), adapters_disabled(denoiser):
        change = (family.run(denoiser, batch.inputs) - family.run(denoiser, batch.without)).float().cpu()
    energy = change.square().mean(1, keepdim=True)
    peak = energy.amax((1, 2, 3), keepdim=True)
    if not (peak > 0).all():
        raise ConceptDataError(
            "the words that name the concept change nothing in the base model's answer; are they more than the text "
            "encoder reads?"
        )
    return energy / peak


# Concepts from files

_TEXT_SUFFIXES = (".txt", ".csv", ".jsonl")


def load_concept(
    *,
    overlay: str | Path | None = None,
    pairs: str | Path | None = None,
    masks: str | Path | None = None,
    pictures: str | Path | None = None,
    prompts: Sequence[str] = (),
    ranges: Mapping[str, tuple[float, float] | None] | None = None,
    data: TrainingData | None = None,
    image_column: str = "image",
    caption_column: str | None = "text",
    cache_dir: str | None = None,
) -> Concept:
    """Read a concept in the one form that is given.

    Args:
        overlay: A picture with an alpha channel.
        pairs: An imagefolder or data set with the columns `image`, which shows the concept, and `without`.
        masks: One with the columns `image` and `mask`, white where the concept is.
        pictures: One with the column `image`, whose pictures show the concept all over, such as a style.
        prompts: Phrases that name the concept, or files with one a line.
        ranges: Ranges of the overlay; `None` for what it has by default.
        data: Where pictures have no captions, theirs are drawn from here.
        image_column: Column of the pictures, but for an overlay.
        caption_column: Column of their captions; `None` to leave them aside, and to take those of `data`.
        cache_dir: Where `datasets` keeps what it has prepared.

    Raises:
        ConceptDataError: If none or several forms are given, there is no such concept, or ranges are given for another
            form than an overlay.
    """
    forms = {"overlay": overlay, "pairs": pairs, "masks": masks, "pictures": pictures, "prompts": prompts}
    given = [form for form, value in forms.items() if value]
    if len(given) != 1:
        raise ConceptDataError(
            f"the concept is given as {' and '.join(given) or 'nothing'}; expected one of {', '.join(forms)}."
        )
    chosen = {name: values for name, values in (ranges or {}).items() if values is not None}
    if overlay is not None:
        return _opened(overlay, chosen)
    if chosen:
        raise ConceptDataError(
            f"{', '.join(chosen)}: an overlay has these, and the concept is given as {given[0]}; leave them out."
        )
    if prompts:
        return [phrase for prompt in prompts for phrase in read_phrases(prompt)]
    source = str(pairs or masks or pictures)
    other = "without" if pairs else "mask" if masks else None
    table = load_table(source, [image_column] if other is None else [image_column, other], cache_dir=cache_dir)
    captions = _captions(table, caption_column, data, source)
    # Not a list: a concept set keeps them in RGB, and both would be in memory at once.
    images = read_pictures(table, image_column)
    if other is None:
        return ConceptSet.from_masks(images, [Image.new("L", image.size, 255) for image in images], captions)
    make: Callable[..., ConceptSet] = ConceptSet.from_pairs if pairs else ConceptSet.from_masks
    return make(images, read_pictures(table, other), captions)


def _opened(path: str | Path, ranges: Mapping[str, tuple[float, float]]) -> Overlay:
    try:
        return Overlay.open(path, **ranges)
    except ConceptDataError:
        raise
    except UNREADABLE as error:
        raise ConceptDataError(f"the overlay {path} cannot be read: {error}") from error


def read_phrases(prompt: str) -> list[str]:
    """The lines of a file, if `prompt` is one, else `prompt` itself; blank ones are left out.

    Raises:
        ConceptDataError: If nothing is left, or the file cannot be read, or is not there: one word that ends as a file
            of text does is no phrase.
    """
    lines = [prompt]
    if os.path.isfile(prompt):
        try:
            # Some editors begin a file with a byte order mark, which no caption has. Not by `splitlines`, which also
            # ends lines at characters that captions may have.
            lines = Path(prompt).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConceptDataError(f"the file of prompts {prompt} cannot be read: {error}") from error
    elif len(prompt.split()) == 1 and prompt.lower().endswith(_TEXT_SUFFIXES):
        raise ConceptDataError(f"there is no file {prompt}; expected phrases, or a file with one a line.")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConceptDataError(f"{prompt or 'a prompt'} names nothing; expected phrases, one a line.")
    return found


def _captions(table: Any, column: str | None, data: TrainingData | None, where: str) -> list[str]:
    if column is not None and column in table.column_names:
        captions = table.select_columns([column])[:][column]
        return [one_caption(caption, f"row {row} of {where}") for row, caption in enumerate(captions)]
    if data is None:
        raise ConceptDataError(
            f"{where} has no column '{column}' with captions, and no training data to draw them from is given."
        )
    return [data.caption(nth_of_shuffles(index, len(data), 0)) for index in range(len(table))]
