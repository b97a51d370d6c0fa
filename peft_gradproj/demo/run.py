"""The demo's story: fine-tune on stamped pictures with the stamp forbidden, save a plain LoRA, verify it, compare.

Of the three adapters, *plain* is stock LoRA on the stamped pictures, *ours* the same with a concept basis, concept
probes and masks made from the logo file alone, and *oracle* stock LoRA on the pictures as they were before they were
stamped: what could be learned if nobody had stamped them. All start from the same weights and see the same pictures,
noise and timesteps in the same order.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..basis import ConceptBasis
from ..concepts import ConceptSet, Overlay
from ..config import GradProjConfig
from ..diffusion_inputs import (
    LatentPairs,
    concept_probe_batches,
    contrast_batches,
    encode_concept_set,
    encode_images,
    encode_prompts,
    noise_schedule,
)
from ..fitting import fit_concept_basis
from ..masks import places
from ..online import detach_online_projection
from ..probes import ConceptProbes, collect_concept_probes
from ..saving import save_sidecars
from ..verification import VerificationReport, verify_adapter
from .data import StampedData, load_logos, load_pictures, stamp
from .finding import find_in_latents
from .jobs import Job, run_jobs
from .measuring import Figures, Judges, Questions, compare, mask_shares, train_judges
from .page import write_page
from .pipeline import BASE_MODEL, load_pipeline, with_unet
from .progress import Stages
from .report import DemoReport
from .sampling import sample
from .settings import ASSETS, DEFAULT_LOGO, DemoSettings
from .timing import step_times
from .training import TrainingRun, TrainingSet, adapted, train

__all__ = ["run_demo"]

BASE_MODEL_NAME = "peft_gradproj/demo/assets/base_model"
"""What the published files call the base model: it is part of this package."""

TITLES = {"ours": "ours", "plain": "plain LoRA", "oracle": "oracle: never stamped"}


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
    return _Demo(settings, output, Path(base_model or BASE_MODEL)).run()


@dataclass(frozen=True)
class _Protection:
    """What is made from the logo file and the training pictures, before training."""

    basis: ConceptBasis
    probes: ConceptProbes
    masks: Tensor
    """Where the logo was found in the training pictures, `(N, 1, h, w)`: 1 there, 0 elsewhere."""


class _Demo:
    def __init__(self, settings: DemoSettings, output: Path, base_model: Path) -> None:
        self.settings, self.output = settings, output
        self.pipeline = load_pipeline(base_model)
        self.schedule = noise_schedule(self.pipeline)
        self.stages = Stages()

    def run(self) -> DemoReport:
        logos = load_logos(self.settings)
        logo = logos[self.settings.logo]
        pictures, captions = load_pictures(ASSETS / "noto.parquet", self.settings.pictures)
        data = stamp(pictures, captions, logo, self.settings)
        logo.image.save(self.output / "logo.png")
        seed = self.settings.seed
        concepts = ConceptSet.from_overlay(logo, data.held_out, data.held_out_captions, seed=seed + 101)
        questions = Questions(self.pipeline, data, concepts, self.schedule, seed)

        protection = self.protect(data)
        runs, judges = self.train_all(data, protection, questions, self.judging(logos, pictures, captions))
        folder = self.save(runs["ours"])
        report = verify_adapter(folder)
        prompts = self.prompts(data)
        samples = self.sample_all(runs, folder, prompts)
        with self.stages.stage("measure"):
            unets = {"base": self.pipeline.unet, **{name: run.unet for name, run in runs.items()}}
            figures = compare(unets, samples, prompts, questions, judges)
        seconds = self.step_times(data, protection)
        masks = mask_shares(protection.masks, data)
        return self.report(data, logo, runs, masks, report, prompts, samples, judges, figures, seconds)

    def protect(self, data: StampedData) -> _Protection:
        """Make masks, basis and probes as a user would: from the logo file and the training pictures as they are."""
        settings, unet = self.settings, self.pipeline.unet
        logo = Overlay.open(self.output / "logo.png", scale=settings.logo_scale, angle=settings.logo_angle)
        with self.stages.stage("find the logo in the training pictures", 2 * settings.mask_steps) as progress:

            def examples(fold: list[int], count: int, seed: int) -> LatentPairs:
                pictures = [data.pictures[i] for i in fold]
                captions = [data.captions[i] for i in fold]
                concepts = ConceptSet.from_overlay(logo, pictures, captions, count=count, seed=seed)
                return encode_concept_set(self.pipeline, concepts, dilation=0)

            latents = encode_images(self.pipeline, data.pictures)
            found = find_in_latents(latents, examples, settings, progress=progress)
        across, down = places(found)
        logo = replace(logo, across=across, down=down)
        with self.stages.stage("paste the logo, fit basis, collect probes", 2) as progress:
            concepts = ConceptSet.from_overlay(
                logo,
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
                # Some directions of a few layers carry nearly all that these layers do.
                unfit="skip",
                progress=False,
                seed=settings.seed,
            )
            progress(1)
            pairs = encode_concept_set(self.pipeline, concepts[: settings.probes], dilation=settings.probe_dilation)
            batches = concept_probe_batches(pairs, self.schedule, batch_size=64, seed=settings.seed + 1)
            probes = collect_concept_probes(unet, batches, concept=f"the {settings.logo} logo", progress=False)
        return _Protection(basis, probes, found)

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

    def train_all(
        self, data: StampedData, protection: _Protection, questions: Questions, judging: Job
    ) -> tuple[dict[str, TrainingRun], Judges]:
        """The three adapters, and the judges beside them."""
        settings, unet = self.settings, self.pipeline.unet
        embeddings = encode_prompts(self.pipeline, data.captions)
        stamped, clean = (encode_images(self.pipeline, pictures) for pictures in (data.pictures, data.clean))
        everywhere = torch.ones_like(protection.masks)
        training = {
            "ours": TrainingSet(stamped, embeddings, everywhere - protection.masks),
            "plain": TrainingSet(stamped, embeddings, everywhere),
            "oracle": TrainingSet(clean, embeddings, everywhere),
        }
        configs = {name: self.config(name, protection) for name in training}
        jobs = []
        for name, config in configs.items():
            run = partial(train, unet, config, training[name], self.schedule, settings, questions.brief)
            jobs.append(Job(f"train {TITLES[name]}", settings.steps, run))
        *trained, judges = run_jobs([*jobs, judging], self.stages, "train and judge, side by side")
        runs = {}
        for (name, config), (weights, history) in zip(configs.items(), trained, strict=True):
            adapter = adapted(unet, config, settings.seed)
            adapter.load_state_dict(weights, strict=False)
            # It is not trained here, where others are.
            detach_online_projection(adapter, "default")
            runs[name] = TrainingRun(adapter.eval(), history)
        return runs, judges

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
                    pipeline = with_unet(self.pipeline, runs[name].unet)
                samples[name] = sample(pipeline, prompts, self.settings, progress)
        return samples

    def judging(self, logos: dict[str, Overlay], noto: list[Any], captions: list[str]) -> Job:
        """The detector and the classifier learn from both families of pictures."""
        settings = self.settings
        fluent, fluent_captions = load_pictures(ASSETS / "fluent.parquet", settings.pictures)
        pictures = [picture.convert("RGB") for picture in fluent + noto]
        train = partial(train_judges, self.pipeline, logos, pictures, fluent_captions + captions, settings)
        return Job("train and calibrate the judges", settings.detector_steps + settings.fidelity_steps, train)

    def step_times(self, data: StampedData, protection: _Protection) -> dict[str, float]:
        names = ("plain", "subspace alone", "online alone", "ours")
        unets = {n: adapted(self.pipeline.unet, self.config(n, protection), self.settings.seed) for n in names}
        latents = encode_images(self.pipeline, data.pictures[:64])
        embeddings = encode_prompts(self.pipeline, data.captions[: len(latents)])
        training = TrainingSet(latents, embeddings, torch.ones_like(latents[:, :1]))
        with self.stages.stage("time the steps side by side", self.settings.timing_rounds + 1) as progress:
            return step_times(unets, training, self.schedule, self.settings, progress)

    def report(
        self,
        data: StampedData,
        logo: Overlay,
        runs: dict[str, TrainingRun],
        masks: dict[str, float | None],
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
            masks=masks,
            verification=verification,
            runs=runs,
            step_seconds=seconds,
            stage_seconds=self.stages.seconds,
        )
        (self.output / "report.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
        write_page(self.output / "index.html", report, data, logo.image, prompts, samples)
        return report


def _reloaded(pipeline: Any, folder: Path) -> Any:
    """A fresh pipeline with the saved adapter, loaded by stock diffusers."""
    fresh = with_unet(pipeline, copy.deepcopy(pipeline.unet))
    fresh.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    return fresh
