"""The demo's story: fine-tune on stamped pictures with the stamp forbidden, save a plain LoRA, verify it, compare.

Of the three adapters, *plain* is stock LoRA on the stamped pictures, *ours* the same with a concept basis and concept
probes made from the logo file alone, and *oracle* stock LoRA on the pictures as they were before they were stamped:
what could be learned if nobody had stamped them. All start from the same weights and see the same pictures, noise and
timesteps in the same order.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..basis import ConceptBasis
from ..concepts import ConceptSet, Overlay
from ..config import GradProjConfig
from ..diffusion_inputs import (
    concept_probe_batches,
    contrast_batches,
    decode_latents,
    encode_concept_set,
    encode_images,
    encode_prompts,
    noise_schedule,
)
from ..evaluation.detector import ConceptDetector
from ..evaluation.fidelity import PromptFidelity
from ..fitting import fit_concept_basis
from ..probes import ConceptProbes, collect_concept_probes
from ..saving import save_sidecars
from ..verification import VerificationReport, verify_adapter
from .data import StampedData, load_logos, load_pictures, stamp
from .measuring import Figures, Judges, Questions, compare
from .page import write_page
from .progress import Stages
from .report import DemoReport
from .sampling import sample
from .settings import ASSETS, DEFAULT_LOGO, DemoSettings
from .timing import step_times
from .training import TrainingRun, TrainingSet, adapted, train

__all__ = ["run_demo"]

BASE_MODEL_NAME = "peft_gradproj/demo/assets/base_model"
"""What the published files call the base model: it is part of this package."""


def run_demo(
    output: str | Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    logo: str = DEFAULT_LOGO,
    quick: bool = False,
    base_model: str | Path | None = None,
    settings: DemoSettings | None = None,
) -> DemoReport:
    """Run the demo and write `index.html`, `report.json`, the overlay and the adapter into a folder.

    Args:
        output: The folder; made if it is not there.
        seed: Of everything random.
        steps: Training steps of each adapter.
        logo: Which logo is stamped; one of `logos.parquet`.
        quick: A tiny run of the same code, for tests.
        base_model: A StableDiffusionPipeline folder; the one that comes with the package by default.
        settings: Everything else; the other arguments go before it.

    Returns:
        All figures that were measured.
    """
    settings = replace(settings or DemoSettings(), seed=seed, logo=logo)
    settings = settings.quick() if quick else settings
    settings = replace(settings, steps=steps or settings.steps)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    return _Demo(settings, output, Path(base_model or ASSETS / "base_model")).run()


@dataclass(frozen=True)
class _Protection:
    """What is made from the logo file: both are needed before training only."""

    basis: ConceptBasis
    probes: ConceptProbes


class _Demo:
    def __init__(self, settings: DemoSettings, output: Path, base_model: Path) -> None:
        self.settings, self.output = settings, output
        self.pipeline = _load(base_model)
        self.schedule = noise_schedule(self.pipeline)
        self.stages = Stages()

    def run(self) -> DemoReport:
        logos = load_logos(self.settings)
        logo = logos[self.settings.logo]
        pictures, captions = load_pictures(ASSETS / "noto.parquet", self.settings.pictures)
        data = stamp(pictures, captions, logo, self.settings)
        logo.image.save(self.output / "logo.png")
        questions = Questions(self.pipeline, data, logo, self.schedule, self.settings.seed)

        protection = self.protect(data, logo)
        runs = self.train_all(data, protection, questions)
        folder = self.save(runs["ours"])
        report = verify_adapter(folder)
        prompts = self.prompts(data)
        samples = self.sample_all(runs, folder, prompts)
        judges = self.judges(logos, pictures, captions)
        with self.stages.stage("measure"):
            unets = {"base": self.pipeline.unet, **{name: run.unet for name, run in runs.items()}}
            figures = compare(unets, samples, prompts, questions, judges)
        seconds = self.step_times(data, protection)
        return self.report(data, logo, runs, report, prompts, samples, judges, figures, seconds)

    def protect(self, data: StampedData, logo: Overlay) -> _Protection:
        """Make basis and probes as a user would: from the logo file and the training pictures, stamped as they are."""
        settings, unet = self.settings, self.pipeline.unet
        with self.stages.stage("paste the logo, fit basis, collect probes", 2) as progress:
            overlay = replace(logo, image=Overlay.open(self.output / "logo.png").image)
            concepts = ConceptSet.from_overlay(
                overlay,
                data.pictures,
                data.captions,
                count=max(settings.basis_pairs, settings.probes),
                seed=settings.seed,
            )
            pairs = encode_concept_set(self.pipeline, concepts[: settings.basis_pairs])
            concept, reference = contrast_batches(pairs, self.schedule, batch_size=16, seed=settings.seed)
            basis = fit_concept_basis(
                unet,
                concept,
                reference,
                target_modules=settings.target_modules,
                rank=settings.basis_rank,
                concept=f"the {settings.logo} logo",
                base_model=BASE_MODEL_NAME,
                progress=False,
                seed=settings.seed,
            )
            progress(1)
            pairs = encode_concept_set(self.pipeline, concepts[: settings.probes])
            batches = concept_probe_batches(pairs, self.schedule, batch_size=64, seed=settings.seed + 1)
            probes = collect_concept_probes(unet, batches, concept=f"the {settings.logo} logo", progress=False)
        return _Protection(basis, probes)

    def lora_options(self, basis: ConceptBasis) -> dict[str, Any]:
        """The same adapted layers for all: those that have a basis."""
        rank = self.settings.rank
        return {"r": rank, "lora_alpha": rank, "target_modules": sorted(basis)}

    def config(self, name: str, protection: _Protection) -> Any:
        from peft import LoraConfig

        settings, options = self.settings, self.lora_options(protection.basis)
        if name in ("plain", "oracle"):
            return LoraConfig(**options)
        return GradProjConfig(
            **options,
            concept_basis=protection.basis if name in ("ours", "subspace alone") else None,
            concept_probes=protection.probes if name in ("ours", "online alone") else None,
            probe_every=settings.probe_every,
            probe_batch_size=settings.probe_batch_size,
            probe_history=settings.probe_history,
            restore=settings.restore,
            probe_seed=settings.seed,
        )

    def train_all(self, data: StampedData, protection: _Protection, questions: Questions) -> dict[str, TrainingRun]:
        embeddings = encode_prompts(self.pipeline, data.captions)
        stamped = TrainingSet(encode_images(self.pipeline, data.pictures), embeddings)
        clean = TrainingSet(encode_images(self.pipeline, data.clean), embeddings)
        runs = {}
        for name, title in (("plain", "plain LoRA"), ("ours", "ours"), ("oracle", "oracle: never stamped")):
            unet = adapted(self.pipeline.unet, self.config(name, protection), self.settings.seed)
            with self.stages.stage(f"train {title}", self.settings.steps) as progress:
                runs[name] = train(
                    unet,
                    clean if name == "oracle" else stamped,
                    self.schedule,
                    self.settings,
                    measure=questions.brief,
                    progress=progress,
                )
        return runs

    def save(self, run: TrainingRun) -> Path:
        """Save as diffusers' training scripts do, then the sidecars."""
        from diffusers import StableDiffusionPipeline
        from diffusers.training_utils import _collate_lora_metadata
        from peft import get_peft_model_state_dict

        folder = self.output / "adapter"
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(run.unet),
            **_collate_lora_metadata({"unet": run.unet}),
        )
        save_sidecars(run.unet, folder)
        return folder

    def prompts(self, data: StampedData) -> list[str]:
        """A quarter of what is sampled was never trained on, if there are enough held-out captions."""
        generator = np.random.default_rng([self.settings.seed, 20])
        new = min(self.settings.samples // 4, len(data.held_out_captions))
        seen = self.settings.samples - new
        chosen = [data.captions[i] for i in generator.permutation(len(data.captions))[:seen]]
        return chosen + [data.held_out_captions[i] for i in generator.permutation(len(data.held_out_captions))[:new]]

    def sample_all(self, runs: dict[str, TrainingRun], folder: Path, prompts: list[str]) -> dict[str, Tensor]:
        """Sample base and adapters; ours as a stranger would: from the saved files, by diffusers alone."""
        samples = {}
        for name in ("base", *runs):
            with self.stages.stage(f"sample {name}", len(prompts)) as progress:
                pipeline = copy.copy(self.pipeline)
                if name == "ours":
                    pipeline = _reloaded(self.pipeline, folder)
                elif name != "base":
                    pipeline = _with_unet(self.pipeline, runs[name].unet)
                samples[name] = sample(pipeline, prompts, self.settings, progress)
        return samples

    def judges(self, logos: dict[str, Overlay], noto: list[Any], captions: list[str]) -> Judges:
        """Train the detector and the classifier on both families of pictures, as the VAE shows them."""
        settings = self.settings
        fluent, fluent_captions = load_pictures(ASSETS / "fluent.parquet", settings.pictures)
        pictures = [picture.convert("RGB") for picture in fluent + noto]

        @torch.autocast("cpu", torch.bfloat16)
        def distort(pixels: Tensor) -> Tensor:
            return decode_latents(self.pipeline, encode_images(self.pipeline, pixels))

        # Wherever a sample may show it.
        logos = {name: replace(logo, across=(0.0, 1.0), down=(0.0, 1.0)) for name, logo in logos.items()}
        others = [logo for name, logo in logos.items() if name != settings.logo]
        with self.stages.stage("train and calibrate the logo detector", settings.detector_steps) as progress:
            detector = ConceptDetector.fit(
                logos[settings.logo],
                pictures,
                distractors=others,
                distort=distort,
                steps=settings.detector_steps,
                scenes=settings.detector_scenes,
                seed=settings.seed,
                progress=progress,
            )
        with self.stages.stage("train the prompt classifier", settings.fidelity_steps) as progress:
            fidelity = PromptFidelity.fit(
                pictures,
                fluent_captions + captions,
                overlays=list(logos.values()),
                distort=distort,
                steps=settings.fidelity_steps,
                seed=settings.seed,
                progress=progress,
            )
        return Judges(detector, fidelity)

    def step_times(self, data: StampedData, protection: _Protection) -> dict[str, float]:
        names = ("plain", "subspace alone", "online alone", "ours")
        unets = {n: adapted(self.pipeline.unet, self.config(n, protection), self.settings.seed) for n in names}
        subset = data.pictures[:64]
        training = TrainingSet(
            encode_images(self.pipeline, subset), encode_prompts(self.pipeline, data.captions[: len(subset)])
        )
        with self.stages.stage("time the steps side by side", self.settings.timing_rounds + 1) as progress:
            return step_times(unets, training, self.schedule, self.settings, progress)

    def report(
        self,
        data: StampedData,
        logo: Overlay,
        runs: dict[str, TrainingRun],
        verification: VerificationReport,
        prompts: list[str],
        samples: dict[str, Tensor],
        judges: Judges,
        figures: dict[str, Figures],
        seconds: dict[str, float],
    ) -> DemoReport:
        report = DemoReport.gather(
            settings=self.settings,
            figures=figures,
            judges=judges,
            verification=verification,
            runs=runs,
            step_seconds=seconds,
            stage_seconds=self.stages.seconds,
        )
        (self.output / "report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
        write_page(self.output / "index.html", report, data, logo.image, prompts, samples)
        return report


def _load(base_model: Path) -> Any:
    """The base model in float32, without the chatter of loading, which would hide the progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Only now: importing diffusers already warns of what this pipeline does not need.
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(base_model).to(torch.float32)
    pipeline.unet.requires_grad_(False).eval()
    return pipeline


def _with_unet(pipeline: Any, unet: Any) -> Any:
    """The same pipeline around another UNet."""
    return type(pipeline)(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)


def _reloaded(pipeline: Any, folder: Path) -> Any:
    """A fresh pipeline with the saved adapter, loaded by stock diffusers."""
    fresh = _with_unet(pipeline, copy.deepcopy(pipeline.unet))
    fresh.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    return fresh
