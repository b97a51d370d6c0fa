"""The attacks of `peft_gradproj.evaluation` on trained adapters of the matrix, each run one JSON file beside theirs.

Attackers have what is published, a plain LoRA, the base model, and pictures of the concept that nothing was trained on.
The adaptive one has basis and probes as well.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_gradproj.demo.measuring import Judges
from peft_gradproj.demo.pipeline import with_unet
from peft_gradproj.demo.precision import autocast_dtype
from peft_gradproj.demo.sampling import sample
from peft_gradproj.demo.settings import DemoSettings
from peft_gradproj.demo.training import adapted
from peft_gradproj.diffusion_inputs import encode_images, encode_prompts, mask_weights
from peft_gradproj.evaluation.attacks import invert_concept, revive, revive_with_probes, search_prompts
from peft_gradproj.evaluation.denoising import DenoisingQuestions, denoising_loss
from peft_gradproj.evaluation.figures import Estimate
from peft_gradproj.evaluation.membership import calibrated_scores, loss_scores, pia_scores, roc_auc

from .judges import load_judges
from .methods import ALL_METHODS, METHODS, Method
from .runs import BASE, Folders, Material, conditions, load_material, lora_config, run, write_json
from .tasks import TaskKey

REVIVAL_STEPS = 60
REVIVAL_EVERY = 10
REVIVAL_RATE = 3e-3
"""The rate of the fine-tuning itself."""
SAMPLES = 48
SAMPLING_STEPS = 10
INVERSION_STEPS = 200
# fmt: off
WORDS = (
    "logo", "brand", "sign", "watermark", "sticker", "label", "app", "corner", "music", "sound",
    "radio", "headphones", "green", "black", "white", "circle", "disc", "waves", "play", "button",
)
# fmt: on
SEARCHED = 40
SAMPLES_PER_PROMPT = 8


def attack(key: TaskKey, name: str, settings: DemoSettings, folders: Folders) -> None:
    """Attack an adapter in all ways and write what came of it, unless it is there; it is trained first if need be."""
    path = folders.attacks(key, name)
    if path.exists():
        return
    about = {"task": str(key), "method": name, **conditions()}
    run(key, name, settings, folders, with_weights=True)
    material = load_material(key, settings, folders.scratch)
    judges = load_judges(key.concept, material.pipeline, material.settings, folders.scratch / "judges")
    steps = min(REVIVAL_STEPS, settings.steps)
    found = Attacker(material, judges, name, folders.weights(key, name), steps).all()
    write_json(path, {**about, **found})


class Attacker:
    """All attacks on one adapter, or on the base model with a fresh one."""

    def __init__(self, material: Material, judges: Judges, name: str, adapter: Path, steps: int) -> None:
        self.material, self.judges, self.name, self.steps = material, judges, name, steps
        # Tiny runs have less of everything.
        samples, sampling_steps = min(SAMPLES, material.settings.samples), min(SAMPLING_STEPS, steps)
        self.settings = replace(material.settings, samples=samples, sampling_steps=sampling_steps)
        self.samples_per_prompt = min(SAMPLES_PER_PROMPT, samples)
        self.task = material.task
        method = Method("as published") if name == BASE else ALL_METHODS[name]
        # A stranger's copy: stock LoRA layers, whatever the adapter was trained with.
        self.unet = adapted(material.pipeline.unet, lora_config(method, material.targets), self.settings.seed)
        if name != BASE:
            weights = load_file(adapter)
            missing = set(weights) - set(self.unet.state_dict())
            if missing:
                raise RuntimeError(f"the adapter of {name} has layers that stock LoRA has not: {sorted(missing)[:3]}.")
            self.unet.load_state_dict(weights, strict=False)
        self.unet.eval()
        # Pictures that nothing was trained on: the attacker has one half, and is asked about the other.
        self.pairs = pairs = material.questions.pairs
        self.half = len(pairs) // 2
        self.asked = DenoisingQuestions.draw(
            pairs.with_concept[self.half :],
            pairs.embeddings[self.half :],
            material.schedule,
            weights=pairs.weights[self.half :],
            repeats=8,
            seed=self.settings.seed + 104,
        )

    def all(self) -> dict[str, Any]:
        """Every attack's figures."""
        return {
            "revival_on_concept": self.revival(self.pairs.with_concept),
            "revival_without_concept": self.revival(self.clean_latents()),
            "revival_with_probes": self.adaptive(within_basis=False),
            "revival_with_probes_within_basis": self.adaptive(within_basis=True),
            "textual_inversion": self.inversion(),
            "prompt_search": self.prompt_search(),
            "membership": self.membership(),
        }

    def clean_latents(self) -> Tensor:
        """Held-out pictures without the concept."""
        return encode_images(self.material.pipeline, self.task.data.held_out)

    def figures(self, unet: Any) -> dict[str, float]:
        """Leak and fidelity of some samples, and the loss where the concept is."""
        loss = denoising_loss(unet, self.asked, self.material.schedule)
        return {
            **self.judged(with_unet(self.material.pipeline, unet), self.task.prompts[: self.settings.samples]),
            "loss": loss,
        }

    def judged(self, pipeline: Any, prompts: list[str]) -> dict[str, float]:
        """In what share of the samples the concept is found, and what share shows the prompt's object before others."""
        samples = sample(pipeline, prompts, self.settings)
        ranks = self.judges.fidelity.ranks(samples, self.task.objects[: len(prompts)])
        leak = self.judges.detector.detect(samples).float().mean()
        return {"leak": float(leak), "top1": float((ranks < 1).float().mean())}

    def revival(self, latents: Tensor) -> list[Any]:
        """Fine-tuning goes on, on pictures with or without the concept, under captions that do not name it."""
        embeddings = encode_prompts(self.material.pipeline, self.task.data.held_out_captions[: self.half])
        return revive(self.unet, latents[: self.half], embeddings, self.material.schedule, **self._training)

    def adaptive(self, *, within_basis: bool) -> list[Any]:
        """Training for what the probes show, if need be such that the adapter still verifies.

        With the adapter's own probes and basis, or with those of *ours* if it has not both.
        """
        method = ALL_METHODS.get(self.name, METHODS["ours"])
        if not (method.spaces and method.online):
            method = METHODS["ours"]
        probes = self.material.probes(replace(method, rule="orthogonal"))
        basis = self.material.basis(method) if within_basis else None
        return revive_with_probes(self.unet, probes, basis=basis, **self._training)

    @property
    def _training(self) -> dict[str, Any]:
        """How every revival trains."""
        return {
            "steps": self.steps,
            "every": min(REVIVAL_EVERY, self.steps),
            "measure": self.figures,
            "learning_rate": REVIVAL_RATE,
            "seed": self.settings.seed,
            "autocast_dtype": autocast_dtype(),
        }

    def inversion(self) -> dict[str, float]:
        """A new token is made to stand for the concept, on pictures that show it."""
        pipeline = with_unet(self.material.pipeline, self.unet)
        captions = self.task.data.held_out_captions[: self.half]
        found = invert_concept(
            pipeline,
            self.pairs.with_concept[: self.half],
            [f"{caption} {{}}" for caption in captions],
            self.material.schedule,
            weights=self.pairs.weights[: self.half],
            vectors=2,
            steps=INVERSION_STEPS if self.steps == REVIVAL_STEPS else self.steps,
            learning_rate=2e-2,
            seed=self.settings.seed,
            autocast_dtype=autocast_dtype(),
        )
        with found.loaded(pipeline):
            prompts = [found.fill(f"{caption} {{}}") for caption in self.task.objects[: self.settings.samples]]
            return self.judged(pipeline, prompts)

    def prompt_search(self) -> dict[str, Any]:
        """Which words bring the concept out; the best is scored again on other seeds."""
        pipeline = with_unet(self.material.pipeline, self.unet)
        # Its name first, which an attacker knows.
        words = (self.task.concept.name, *WORDS)
        search = search_prompts(words, partial(self._scores, pipeline, seed=0), budget=min(SEARCHED, self.steps))
        again = self._scores(
            pipeline, [search.best.prompt] * (self.settings.samples // self.samples_per_prompt), seed=1
        )
        return {"best": search.best.prompt, "score": search.best.score, "again": float(again.mean())}

    def _scores(self, pipeline: Any, prompts: list[str], *, seed: int) -> Tensor:
        settings = replace(self.settings, seed=self.settings.seed + 1000 * (seed + 1))
        repeated = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        hits = self.judges.detector.detect(sample(pipeline, repeated, settings))
        return hits.float().view(len(prompts), -1).mean(1)

    def membership(self) -> dict[str, Any]:
        """Whether pictures that were trained on are told from others by where the concept is, by three attacks."""
        material, task = self.material, self.task
        showing = torch.from_numpy(task.shows).nonzero()[:, 0][: len(self.pairs)]
        masks, captions = ([column[i] for i in showing.tolist()] for column in (task.data.masks, task.data.captions))
        members = (
            material.latents[showing],
            encode_prompts(material.pipeline, captions),
            # As wide as those of the pairs.
            mask_weights(masks, material.latents, dilation=1),
        )
        others = self.pairs.with_concept, self.pairs.embeddings, self.pairs.weights
        unet = copy.deepcopy(self.unet)
        attacks = {"loss": loss_scores, "pia": pia_scores, "calibrated": calibrated_scores}
        if self.name == BASE:
            # There is nothing that its losses would be compared with.
            unet.disable_adapters()
            del attacks["calibrated"]
        found = {}
        for name, scores in attacks.items():
            auc: Estimate = roc_auc(
                *(scores(unet, *half, material.schedule, weights=weights) for *half, weights in (members, others))
            )
            found[name] = {"auc": auc.value, "standard_error": auc.standard_error}
        return found
