"""One run: a method on a task, trained, sampled, measured, and written as one JSON file beside its weights."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_gradproj import ConceptBasis, ConceptProbes, GradProjConfig, LayerBasis
from peft_gradproj._version import installed_versions
from peft_gradproj.concepts import ConceptSet
from peft_gradproj.demo.finding import find_by_any, find_in_latents, find_missed_in_latents
from peft_gradproj.demo.measuring import Questions, mask_shares
from peft_gradproj.demo.pipeline import load_pipeline, with_unet
from peft_gradproj.demo.precision import autocast, autocast_dtype
from peft_gradproj.demo.sampling import sample
from peft_gradproj.demo.settings import DemoSettings
from peft_gradproj.demo.training import Penalty, TrainingSet, adapted, train
from peft_gradproj.diffusion_inputs import (
    LatentPairs,
    concept_probe_batches,
    contrast_batches,
    dilated,
    encode_concept_set,
    encode_images,
    encode_prompts,
    mask_weights,
    noise_schedule,
    noised_inputs,
    training_target,
)
from peft_gradproj.files import write_atomically
from peft_gradproj.fitting import fit_concept_basis
from peft_gradproj.masks import guarded, places
from peft_gradproj.online import detach_online_projection
from peft_gradproj.probes import collect_concept_probes
from peft_gradproj.projection import drift

from ..revision import processor, revision
from .corrections import CORRECTIONS
from .judges import judges_digest, load_judges, load_style_judge
from .methods import ALL_METHODS, METHODS, Knowledge, Method, online_options
from .once import make_once
from .tasks import ANYWHERE, Task, TaskKey, make_task

THREADS_PER_RUN = 1
LIBRARIES = ("torch", "peft", "diffusers", "transformers")
BASE = "base"
"""The row of the base model, without an adapter."""


@lru_cache(maxsize=1)
def base_pipeline() -> Any:
    """The demo's base model, once in a process."""
    return load_pipeline()


class Material:
    """A task as the model sees it, and what is made of the user's examples.

    Args:
        key: Which task.
        settings: Of the demo: sizes, steps, samples.
        folder: Where what takes long is kept from one process to the next, of all tasks.
    """

    def __init__(self, key: TaskKey, settings: DemoSettings, folder: Path) -> None:
        self.pipeline = base_pipeline()
        self.schedule = noise_schedule(self.pipeline)
        self.task: Task = make_task(key, settings)
        self.settings = self.task.settings
        self.folder = folder / str(key)
        # Captions play no part in what a network finds in pictures.
        self.marks_folder = folder / str(replace(key, named=False))
        # What was kept is asked about clean pictures: as the oracle saw them, without the concept's name.
        asked = replace(self.task.data, captions=self.task.clean_captions)
        self.questions = Questions(self.pipeline, asked, self.task.held_out_concepts, self.schedule, key.seed)

    @cached_property
    def latents(self) -> Tensor:
        """Of the training pictures, `(N, C, h, w)`."""
        return encode_images(self.pipeline, self.task.data.pictures)

    @cached_property
    def true_masks(self) -> Tensor:
        """Where the concept really is, `(N, 1, h, w)`: 1 where a latent's own pixels show any of it."""
        return (mask_weights(self.task.data.masks, self.latents) > 0).float()

    @cached_property
    def found(self) -> Tensor:
        """Where a network finds the concept, `(N, 1, h, w)`."""
        return self._marks("found", find_in_latents)

    @cached_property
    def found_by_any(self) -> Tensor:
        """Where any of the networks finds it, those that learned from the picture too, `(N, 1, h, w)`."""
        return self._marks("found-by-any", find_by_any)

    def _marks(self, name: str, find: Callable[..., Tensor]) -> Tensor:
        def examples(fold: list[int], count: int, seed: int) -> LatentPairs:
            return encode_concept_set(self.pipeline, self.task.examples(fold, count, seed))

        contrast = self.task.concept.contrast
        return self._once(name, lambda: find(self.latents, examples, self.settings, contrast=contrast))

    def _once(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        """What networks find, which are trained once for all methods."""
        path = self.marks_folder / f"{name}.safetensors"
        return load_file(make_once(path, lambda part: save_file({"found": find()}, part)))["found"]

    def examples(self, count: int, *, placed: bool = True) -> ConceptSet:
        """The user's examples on all training pictures, where the concept was found, or anywhere."""
        region = places(self.found) if placed and not self.task.concept.everywhere else ANYWHERE
        return self.task.examples(range(len(self.latents)), count, self.settings.seed, region)

    def basis(self, method: Method) -> ConceptBasis:
        """Of the input and output spaces."""
        name = f"basis-{method.basis_rank}-{method.basis_pairs}{'' if method.placed else '-anywhere'}.safetensors"
        return ConceptBasis.load(make_once(self.folder / name, lambda part: self._fit(method).save(part)))

    def _basis_pairs(self, method: Method) -> LatentPairs:
        count = min(method.basis_pairs, self.settings.basis_pairs)
        return encode_concept_set(self.pipeline, self.examples(count, placed=method.placed))

    def _fit(self, method: Method) -> ConceptBasis:
        settings = self.settings
        pairs = self._basis_pairs(method)
        concept, reference = contrast_batches(pairs, self.schedule, batch_size=16, seed=settings.seed)
        return fit_concept_basis(
            self.pipeline.unet,
            concept,
            reference,
            target_modules=settings.target_modules,
            rank=method.basis_rank,
            concept=self.task.concept.name,
            unfit="skip",
            progress=False,
            seed=settings.seed,
        )

    @property
    def targets(self) -> list[str]:
        """The adapted layers, the same for all methods: those that have a basis."""
        return sorted(self.basis(METHODS["ours"]))

    def adapter_basis(self, method: Method) -> ConceptBasis:
        """Of the rank or gradient space, which depends on the adapter's start."""
        (space,) = method.spaces
        settings = self.settings
        unet = adapted(self.pipeline.unet, lora_config(method, self.targets), settings.seed)
        pairs = self._basis_pairs(method)
        concept, reference = (list(self._with_targets(pairs, half)) for half in ("with_concept", "without"))
        return fit_concept_basis(
            unet,
            concept,
            reference,
            target_modules=self.targets,
            spaces=(space,),
            contrast="generalized" if space == "rank" else "pairs",
            rank=method.basis_rank,
            run_model=lambda model, batch: model(**batch["inputs"]),
            loss_fn=lambda output, batch: (output.sample.float() - batch["target"]).square().mean(),
            concept=self.task.concept.name,
            threshold=1.0,
            unfit="skip",
            progress=False,
            seed=settings.seed,
        )

    def _with_targets(self, pairs: LatentPairs, half: str) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        latents = getattr(pairs, half)
        for index in torch.arange(len(latents)).split(8):
            noise = torch.randn(latents[index].shape, generator=generator)
            timesteps = torch.randint(self.schedule.config.num_train_timesteps, (len(index),), generator=generator)
            yield {
                "inputs": noised_inputs(latents[index], pairs.embeddings[index], noise, timesteps, self.schedule),
                "target": training_target(self.schedule, latents[index], noise, timesteps),
            }

    def probes(self, method: Method) -> ConceptProbes:
        settings = self.settings
        count = min(method.probes, settings.probes)
        examples = self.examples(count, placed=method.placed)
        pairs = encode_concept_set(self.pipeline, examples, dilation=settings.probe_dilation)
        batches = concept_probe_batches(pairs, self.schedule, batch_size=64, seed=settings.seed + 1, loss_targets=True)
        return collect_concept_probes(self.pipeline.unet, batches, concept=self.task.concept.name, progress=False)

    def where(self, knowledge: Knowledge) -> Tensor:
        """Where a method takes the concept to be, `(N, 1, h, w)`."""
        if knowledge == "found":
            return self.found
        if knowledge == "found-by-any":
            return self.found_by_any
        missed = torch.rand(len(self.latents), generator=torch.Generator().manual_seed(self.settings.seed)) < 0.2
        if knowledge == "found-missing-20":
            # What is marked elsewhere by mistake stays.
            return self.found * (1 - missed[:, None, None, None] * dilated(self.true_masks, 1))
        masks = self.true_masks.clone()
        if knowledge == "missing-20":
            masks[missed] = 0
        return masks

    def masks(self, method: Method) -> Tensor:
        """Where the loss does not count for a method that masks, not widened, `(N, 1, h, w)`."""
        assert method.masked is not None
        masks = self._completed(method.masked) if method.second_look else self.where(method.masked)
        return guarded(masks) if method.guarded else masks

    def _completed(self, knowledge: Knowledge) -> Tensor:
        """What is known of where the concept is, after a second look."""
        name = f"missed-{knowledge}"
        return self._once(name, lambda: find_missed_in_latents(self.latents, self.where(knowledge), self.settings))

    def training_set(self, method: Method) -> TrainingSet:
        """What a method trains on."""
        data, task = self.task.data, self.task
        if method.clean:
            latents = encode_images(self.pipeline, data.clean)
            return TrainingSet(
                latents, encode_prompts(self.pipeline, task.clean_captions), torch.ones_like(latents[:, :1])
            )
        embeddings, weights = encode_prompts(self.pipeline, data.captions), torch.ones_like(self.latents[:, :1])
        if method.masked:
            weights = weights - dilated(self.masks(method), method.dilation)
        keep = torch.arange(len(self.latents))
        if method.filtered:
            marked = self.where(method.filtered).flatten(1).mean(1)
            keep = keep[marked < (0.5 if task.concept.everywhere else 0.05)]
        return TrainingSet(self.latents[keep], embeddings[keep], weights[keep])

    def config(self, method: Method, probes: ConceptProbes | None) -> Any:
        """The adapter's configuration."""
        if not method.protected:
            return lora_config(method, [*self.targets, TEXT_MAP] if method.text_penalty else self.targets)
        basis = None
        if method.spaces and method.spaces[0] in ("rank", "gradient"):
            basis = self.adapter_basis(method)
        elif method.spaces:
            whole = self.basis(method)
            chosen = {n: {s: getattr(layer, s) for s in method.spaces} for n, layer in whole.items()}
            basis = whole.with_layers(
                {n: LayerBasis(**spaces) for n, spaces in chosen.items() if any(s is not None for s in spaces.values())}
            )
        return GradProjConfig(
            r=method.rank,
            lora_alpha=method.rank,
            target_modules=self.targets,
            concept_basis=basis,
            concept_probes=probes if method.online and not method.correction else None,
            **online_options(method),
            probe_seed=self.settings.seed,
            uncovered="ignore",
        )

    def train(self, method: Method) -> tuple[Any, dict[str, Any]]:
        """The UNet with the trained adapter, and what was seen on the way."""
        probes = self.probes(method) if method.online or method.penalty else None
        config, data = self.config(method, probes), self.training_set(method)
        base, penalty = self.pipeline.unet, None
        if method.penalty:
            assert probes is not None
            penalty = drift_penalty(method, probes, self.settings.seed)
        if method.text_penalty:
            base = with_text_map(base)
            words = encode_prompts(self.pipeline, [self.task.concept.named("").strip()])
            penalty = text_penalty(method, data.embeddings, words, self.settings.seed)
        steps = max(1, round(method.steps_share * self.settings.steps))
        settings = replace(self.settings, weight_decay=method.weight_decay, steps=steps)
        start = time.process_time()
        weights, history = train(
            base,
            config,
            data,
            self.schedule,
            settings,
            self.questions.brief,
            lambda step: None,
            penalty,
            partial(correct_otherwise, method, probes, self.settings.seed) if method.correction else None,
        )
        seconds = time.process_time() - start
        unet = adapted(base, config, settings.seed)
        unet.load_state_dict(weights, strict=False)
        if method.protected:
            detach_online_projection(unet, "default")
        seen = {"train_cpu_seconds": seconds, "checkpoints": history.checkpoints, "pictures": len(data.latents)}
        return unet.eval(), seen


@lru_cache(maxsize=2)
def load_material(key: TaskKey, settings: DemoSettings, scratch: Path) -> Material:
    """The material of a task; kept, since several methods run on it one after the other."""
    return Material(key, settings, scratch / "material")


@dataclass(frozen=True)
class Folders:
    """Where a benchmark writes."""

    runs: Path
    """One small JSON file for each run; they are kept in the repository."""
    scratch: Path
    """Weights, judges, and what is made of a task once."""

    def result(self, key: TaskKey, method: str) -> Path:
        """What was found in a run."""
        return self.runs / str(key) / f"{_file_name(method)}.json"

    def attacks(self, key: TaskKey, method: str) -> Path:
        """What the attacks on its adapter came to."""
        return self.runs / str(key) / f"{_file_name(method)}.attacks.json"

    def weights(self, key: TaskKey, method: str) -> Path:
        """Its adapter."""
        return self.scratch / "adapters" / str(key) / f"{_file_name(method)}.safetensors"


def run(key: TaskKey, name: str, settings: DemoSettings, folders: Folders, *, with_weights: bool = False) -> None:
    """Run a method on a task and write what was found, unless it is there, and the adapter too if it is asked for."""
    result, adapter = folders.result(key, name), folders.weights(key, name)
    if result.exists() and (adapter.exists() or name == BASE or not with_weights):
        return
    material = load_material(key, settings, folders.scratch)
    # Before what takes long, in which somebody may commit.
    about = {"task": str(key), "method": name, **conditions()}
    unet, seen = material.pipeline.unet, {}
    if name != BASE:
        method = ALL_METHODS[name]
        unet, seen = material.train(method)
        adapter.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().contiguous() for n, p in unet.named_parameters() if ".lora_" in n}, adapter)
        seen["settings"] = asdict(method)
        knowledge = method.masked or method.filtered
        if knowledge in ("found", "found-by-any"):
            seen["masks"] = mask_shares(material.where(knowledge), material.task.data)
        elif method.second_look:
            seen["masks"] = mask_shares(material.masks(method), material.task.data)
    # One that is in the repository is not replaced by this machine's, only because the adapter is not in it.
    if not result.exists():
        write_json(result, {**about, **measure(unet, material, folders.scratch), **seen})


def conditions() -> dict[str, Any]:
    """What a run was made with: the precision, the processor, the commit, and the versions of libraries."""
    versions = {**installed_versions(*LIBRARIES), "python": platform.python_version()}
    return {
        "autocast": str(autocast_dtype()),
        "processor": processor(),
        "revision": revision(),
        "versions": versions,
    }


def measure(unet: Any, material: Material, scratch: Path) -> dict[str, Any]:
    """Samples' leak, fidelity and style, and the denoising losses.

    The leak is that of prompts that name the concept if the captions do, and the other one is told as well. Fidelity
    and style are always those of samples whose prompts do not name it: nor did the oracle's captions.
    """
    task, folder = material.task, scratch / "judges"
    arguments = (material.pipeline, material.settings, folder)
    judges, style = load_judges(task.key.concept, *arguments), load_style_judge(*arguments)
    pipeline = with_unet(material.pipeline, unet)
    samples = sample(pipeline, task.objects, material.settings)
    prompted = sample(pipeline, [task.concept.named(caption) for caption in task.objects], material.settings)
    leaks = {
        "leaks_unprompted": int(judges.detector.detect(samples).sum()),
        "leaks_prompted": int(judges.detector.detect(prompted).sum()),
    }
    ranks = judges.fidelity.ranks(samples, task.objects)
    losses = {kind: float(values.mean()) for kind, values in material.questions.losses(unet).items()}
    return {
        "samples": len(samples),
        "leaks": leaks["leaks_prompted" if task.key.named else "leaks_unprompted"],
        **leaks,
        "top1": int((ranks < 1).sum()),
        "top5": int((ranks < 5).sum()),
        "in_style": int(style.in_style(samples, task.objects).sum()),
        "losses": losses,
        "drift": material.questions.drift(unet, material.pipeline.unet),
        "judges": judges_digest(task.key.concept, folder),
        "detector": {
            "false_positives": asdict(judges.detector.errors.false_positives),
            "misses": asdict(judges.detector.errors.misses),
        },
    }


def _file_name(method: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in method)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write beside and rename into place."""
    write_atomically(path, json.dumps(content, indent=indent).encode())


def lora_config(method: Method, targets: list[str]) -> LoraConfig:
    """Stock LoRA of a method's rank."""
    return LoraConfig(r=method.rank, lora_alpha=method.rank, target_modules=targets)


def correct_otherwise(method: Method, probes: ConceptProbes, seed: int, unet: Any) -> None:
    """Correct the steps of the adapter in `unet` from now on, in a way that the product does not have."""
    assert method.correction is not None
    kind = CORRECTIONS[method.correction]
    projection = kind(unet, "default", probes, seed=seed, **online_options(method))
    # Steps are observed for as long as somebody holds the observer.
    unet.corrected_by = projection.attach()


def drift_penalty(method: Method, probes: ConceptProbes, seed: int) -> Penalty:
    """The drift on some probes, times a fixed weight."""
    targets, weights = probes.targets, probes.weights
    assert targets is not None
    assert weights is not None
    generator = torch.Generator().manual_seed(seed)

    def penalty(unet: Any) -> Tensor:
        index = torch.randint(len(probes), (method.probe_batch_size,), generator=generator)
        with autocast():
            answer = unet(**probes.batch(index).inputs).sample
        return method.penalty * drift(answer.float(), targets[index], weights[index])

    return penalty


TEXT_MAP = "text_map"


def with_text_map(unet: Any) -> Any:
    """A copy of a UNet that sees its text through a linear map, the identity, which an adapter can target.

    It stands for an adapter on the text encoder: whatever goes through the UNet, questions and samples, sees the
    adapted text.
    """

    def adapt_text(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "encoder_hidden_states": module.text_map(kwargs["encoder_hidden_states"])}

    unet = copy.deepcopy(unet)
    unet.text_map = torch.nn.Linear(unet.config.cross_attention_dim, unet.config.cross_attention_dim, bias=False)
    torch.nn.init.eye_(unet.text_map.weight).requires_grad_(False)
    unet.register_forward_pre_hook(adapt_text, with_kwargs=True)
    return unet


def text_penalty(method: Method, embeddings: Tensor, words: Tensor, seed: int) -> Penalty:
    """By how much the cosine of prompts with the words for the concept changes, times a fixed weight.

    |cos(v, m) - cos(v', m)|, mean over some prompts (arXiv 2511.14113): v of a prompt, v' the same adapted, m of the
    words, each the mean over tokens.

    Args:
        method: Of `text_penalty` and `probe_batch_size`.
        embeddings: Of the prompts, `(N, tokens, width)`.
        words: `(1, tokens, width)`.
        seed: Of the prompts that are drawn.
    """
    generator = torch.Generator().manual_seed(seed)

    def cosines(text: Tensor) -> Tensor:
        return torch.cosine_similarity(text.mean(1), words.mean(1))

    def penalty(unet: Any) -> Tensor:
        text = embeddings[torch.randint(len(embeddings), (method.probe_batch_size,), generator=generator)]
        return method.text_penalty * (cosines(unet.text_map(text)) - cosines(text)).abs().mean()

    return penalty
