"""`gradproj evaluate`: what it measures, that it measures nothing without a model for it, and what it writes."""

from __future__ import annotations

import gc
import hashlib
import html
import json
import math
import re
import shlex
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_pipelines import PIPELINES, SIDE, TOKENS, image_folder, logo, picture, tokenizer
from torch import nn
from tqdm import tqdm
from typer.testing import CliRunner

from peft_gradproj import ConceptSet, TrainingData, collect_concept_probes
from peft_gradproj.cli import app, main
from peft_gradproj.concept_fit import ConceptExample, concept_examples
from peft_gradproj.concepts import Overlay
from peft_gradproj.errors import AdapterFolderError, BehaviourError, ConceptDataError
from peft_gradproj.evaluation.adapter_evaluation import _learned, _pictures, evaluate_adapter, read_concept
from peft_gradproj.evaluation.adapters import adapter_on, locate_adapter
from peft_gradproj.evaluation.evaluation_report import figure_text
from peft_gradproj.evaluation.figures import Estimate, Share
from peft_gradproj.evaluation.image_metrics import (
    ClipScorer,
    CopyDetector,
    KernelDistance,
    concept_box,
    crop_sizes,
    square_crops,
)
from peft_gradproj.evaluation.judging import Judges, Pictures, _Likeness
from peft_gradproj.evaluation.sampling import draw_samples
from peft_gradproj.evaluation.timestep_losses import TimestepQuestions
from peft_gradproj.pipelines import PipelineFamily
from peft_gradproj.training_data import Frame

pytest_plugins = ("hub_server",)

CAPTIONS = ["a house", "a tree", "a cat", "a dog", "a pot"]
OVERLAY = {"scale": (0.6, 0.6), "angle": (0.0, 0.0)}
FAST: dict[str, Any] = {
    "samples_per_prompt": 2,
    "num_inference_steps": 2,
    "num_pictures": 3,
    "timestep_bins": 2,
    "progress": False,
}


# Tiny models


class Layout(nn.Module):
    """An embedder that knows pictures by where they are light and dark: cosines are correlations of 8 x 8 cells."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        cells = nn.functional.adaptive_avg_pool2d(pixels, 8)
        return (cells - cells.mean(dim=(2, 3), keepdim=True)).flatten(1)


class Cells(nn.Module):
    """Features of KID, from bytes."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 4).flatten(1)


def tiny_clip(folder: Path) -> str:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokens = tokenizer()
    small = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {
        "vocab_size": len(tokens),
        "max_position_embeddings": tokens.model_max_length,
        "eos_token_id": tokens.eos_token_id,
    }
    config = CLIPConfig(
        text_config={**small, **words}, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**square), tokens).save_pretrained(folder)
    return str(folder)


def pooling_onnx(path: Path, *, of_bytes: bool, batch: int | str = "n") -> Path:
    """8 x 8 means of each channel, of bytes `(n, h, w, 3)` or of floats `(n, 3, 96, 96)`."""
    nodes, name = [], "image"
    if of_bytes:
        nodes += [
            helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["floats"], ["channels"], perm=[0, 3, 1, 2]),
        ]
        name = "channels"
    side = 288 if of_bytes else 96
    window = [side // 8, side // 8]
    nodes += [
        helper.make_node("AveragePool", [name], ["cells"], kernel_shape=window, strides=window),
        helper.make_node("Flatten", ["cells"], ["embedding"]),
    ]
    shape = [batch, "h", "w", 3] if of_bytes else [batch, 3, side, side]
    kind = TensorProto.UINT8 if of_bytes else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "pooling",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, 192])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def adapted(pipeline: Any, size: float, seed: int = 0) -> Any:
    """A LoRA with random factors on a pipeline's denoiser."""
    family = PipelineFamily.of(pipeline)
    family.denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(family.target_modules)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in family.denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    PIPELINES["sd"]().save_pretrained(folder / "base")
    for name, size in (("protected", 0.1), ("plain", 0.4)):
        adapted(PIPELINES["sd"](), size).unet.save_lora_adapter(folder / name)
    image_folder(folder / "reference", CAPTIONS)
    logo().save(folder / "logo.png")
    torch.jit.trace(Layout(), torch.zeros(1, 3, 288, 288)).save(str(folder / "sscd.pt"))
    torch.jit.trace(Cells(), torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)).save(str(folder / "cells.pt"))
    tiny_clip(folder / "clip")
    (folder / "prompts.txt").write_text("a house\n\na tree\n")
    return folder


def reference() -> TrainingData:
    return TrainingData([picture(index) for index in range(len(CAPTIONS))], CAPTIONS)


# Copy detection


def test_a_picture_is_most_similar_to_itself(workshop):
    detector = CopyDetector(workshop / "sscd.pt")
    pictures = [picture(seed, (40 + seed, 40)) for seed in range(3)]
    scores = detector.scores(pictures, detector.embed(pictures))
    torch.testing.assert_close(scores.diagonal(), torch.ones(3))
    assert scores[~torch.eye(3, dtype=torch.bool)].max() < 0.9


@pytest.mark.parametrize("place", [(0, 0), (48, 24), (72, 72)])
def test_crops_find_a_copy_that_the_whole_picture_does_not_show(workshop, place):
    detector = CopyDetector(workshop / "sscd.pt")
    stamp, below = picture(1, (24, 24)), picture(2, (96, 96))
    stamped = below.copy()
    stamped.paste(stamp, place)
    concept = detector.embed([stamp])
    found = detector.scores([stamped, below], concept, sizes=[0.25]).flatten()
    assert found[0] > 0.99
    assert found[1] < 0.8
    assert detector.scores([stamped], concept) < 0.8


@given(st.integers(8, 70), st.integers(8, 70), st.floats(0.05, 1), st.floats(0.1, 1))
def test_crops_cover_the_picture_without_gaps(width, height, size, stride):
    numbered = Image.fromarray(np.arange(width * height, dtype=np.int32).reshape(height, width))
    crops = [np.asarray(crop) for crop in square_crops(numbered, [size], stride=stride)]
    side = max(1, round(size * min(width, height)))
    assert all(crop.shape == (side, side) for crop in crops)
    assert len(np.unique(np.concatenate([crop.ravel() for crop in crops]))) == width * height
    for places in (
        sorted({int(crop[0, 0]) % width for crop in crops}),
        sorted({crop[0, 0] // width for crop in crops}),
    ):
        assert all(after - before <= max(1, stride * side) + 1 for before, after in pairwise(places))


@given(st.data())
def test_the_box_of_a_concept_is_a_square_in_the_picture_around_it(data):
    width, height = data.draw(st.integers(4, 50)), data.draw(st.integers(4, 50))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    smallest = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = Image.new("L", (width, height))
    mask.paste(255, (left, top, right, bottom))
    box = concept_box(mask, smallest=smallest)
    least = math.ceil(smallest * min(width, height))
    assert box[2] - box[0] == box[3] - box[1] == min(max(right - left, bottom - top, least), width, height)
    assert min(box) >= 0
    assert box[2] <= width
    assert box[3] <= height
    if max(right - left, bottom - top) <= min(width, height):
        assert box[0] <= left
        assert box[1] <= top
        assert box[2] >= right
        assert box[3] >= bottom


def test_crops_have_the_sizes_of_the_concept():
    boxes = [(0, 0, side, side) for side in (16, 20, 32)]
    assert crop_sizes(boxes[:1], [64]) == [0.25]
    sizes = crop_sizes(boxes, [64] * 3)
    assert (sizes[0], sizes[-1]) == pytest.approx((0.25, 0.5))
    assert all(after / before <= 1.4 + 1e-9 for before, after in pairwise(sizes))


@pytest.mark.parametrize("side", [32, 512, 1024])
def test_a_speck_in_one_mask_does_not_make_a_crop_of_every_pixel(side):
    class Blind:
        def embed(self, queries: list[Image.Image]) -> torch.Tensor:
            return torch.zeros(len(queries), 1)

        def scores(self, pictures: list[Image.Image], concept: torch.Tensor, **options: Any) -> torch.Tensor:
            return torch.zeros(len(pictures), len(concept))

    shown, masks = picture(0, (side, side)), [Image.new("L", (side, side)) for _ in range(2)]
    masks[0].putpixel((side - 1, 0), 255)
    masks[1].paste(255, (0, 0, 3 * side // 4, 3 * side // 4))
    frame = Frame((side, side), 0, 0, side)
    pictures = Pictures([ConceptExample(shown, "a house", frame, mask=mask) for mask in masks], [], [])
    judges: Any = Judges(Blind(), None, None, None)
    likeness = _Likeness(judges, {"base": [shown]}, pictures, lambda *_: nullcontext(tqdm(disable=True)))
    likeness.crops()
    assert likeness.sizes[-1] == 0.75
    assert 961 < len(square_crops(shown, likeness.sizes)) < 2200


def test_onnx_models_of_bytes_and_of_floats_see_what_torchscript_sees(tmp_path):
    class Means(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)

    torch.jit.trace(Means(), torch.zeros(1, 3, 288, 288)).save(str(tmp_path / "means.pt"))
    pictures = [picture(seed, (96, 96)) for seed in range(3)]
    script = CopyDetector(tmp_path / "means.pt").embed(pictures)
    floats = CopyDetector(pooling_onnx(tmp_path / "floats.onnx", of_bytes=False)).embed(pictures)
    assert script.shape == floats.shape == (3, 192)
    # Scaled to 288 and to 96 pixels.
    torch.testing.assert_close(floats, script, atol=2e-2, rtol=0)
    of_bytes = CopyDetector(pooling_onnx(tmp_path / "bytes.onnx", of_bytes=True)).embed(pictures)
    cells = torch.stack([torch.tensor(np.asarray(p.resize((8, 8), Image.Resampling.BOX))) for p in pictures])
    expected = nn.functional.normalize(cells.permute(0, 3, 1, 2).flatten(1).float(), dim=1)
    torch.testing.assert_close(of_bytes, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("of_bytes", [True, False])
def test_an_onnx_model_of_a_fixed_batch_takes_any_number_of_pictures(of_bytes, tmp_path):
    pictures = [picture(seed, (96, 96)) for seed in range(6)]
    free = CopyDetector(pooling_onnx(tmp_path / "free.onnx", of_bytes=of_bytes))
    fixed = CopyDetector(pooling_onnx(tmp_path / "fixed.onnx", of_bytes=of_bytes, batch=4))
    for count in (1, 4, 6):
        torch.testing.assert_close(fixed.embed(pictures[:count]), free.embed(pictures[:count]))


def test_what_onnxruntime_does_not_run_is_an_error_of_ours(tmp_path):
    detector = CopyDetector(pooling_onnx(tmp_path / "floats.onnx", of_bytes=False))
    detector._side = 100
    with pytest.raises(BehaviourError, match="does not take pictures"):
        detector.embed([picture(0)])


def test_what_is_no_copy_detection_model_is_refused(workshop, tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "text.pt").write_text("no model")
    for name, message in (("absent.pt", "there is no"), ("text.onnx", "ONNX"), ("text.pt", "TorchScript")):
        with pytest.raises(BehaviourError, match=message):
            CopyDetector(tmp_path / name)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1])],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "x.onnx")
    with pytest.raises(BehaviourError, match="expected one input"):
        CopyDetector(tmp_path / "x.onnx")
    torch.jit.trace(nn.Identity(), torch.zeros(1, 3, 288, 288)).save(str(tmp_path / "identity.pt"))
    with pytest.raises(BehaviourError, match="one vector each"):
        CopyDetector(tmp_path / "identity.pt").embed([picture(0)])


@pytest.mark.parametrize("kind", [CopyDetector, KernelDistance])
def test_vectors_that_are_not_finite_are_an_error_and_not_a_concept_that_is_not_found(kind, tmp_path):
    class Overflowing(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1)[:, :4] * float("nan")

    path = tmp_path / "overflowing.pt"
    torch.jit.trace(Overflowing(), torch.zeros(1, 3, SIDE, SIDE)).save(str(path))
    model = kind(str(path))
    with pytest.raises(BehaviourError, match=r"overflowing.pt gives vectors that are not finite"):
        (model.embed if kind is CopyDetector else model.features)([picture(0)])


# CLIP score and KID


def test_the_clip_score_is_the_cosine_of_picture_and_prompt(workshop):
    from transformers import CLIPModel, CLIPProcessor

    pictures, prompts = [picture(seed) for seed in range(4)], CAPTIONS[:4]
    scores = ClipScorer(str(workshop / "clip")).scores(pictures, prompts)
    model, processor = (kind.from_pretrained(workshop / "clip") for kind in (CLIPModel, CLIPProcessor))
    with torch.no_grad():
        output = model(**processor(text=prompts, images=pictures, return_tensors="pt", padding=True))
    cosines = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(scores, (100 * cosines).clamp_min(0), atol=1e-3, rtol=1e-4)
    assert scores.max() > 0


def test_the_clip_score_of_a_long_prompt_is_that_of_what_the_model_reads_of_it(workshop):
    from transformers import CLIPModel, CLIPProcessor

    prompts = [f"{letter} picture of a house " + "on a hill " * TOKENS for letter in "ab"]
    scores = ClipScorer(str(workshop / "clip")).scores([picture(1)] * 2, prompts)
    model, processor = (kind.from_pretrained(workshop / "clip") for kind in (CLIPModel, CLIPProcessor))
    inputs = processor(text=prompts, images=[picture(1)] * 2, return_tensors="pt", truncation=True, max_length=TOKENS)
    with torch.no_grad():
        output = model(**inputs)
    cosines = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(scores, (100 * cosines).clamp_min(0), atol=1e-3, rtol=1e-4)
    assert scores[0] != scores[1]


def test_a_clip_score_that_is_not_finite_is_an_error_and_no_crash_when_all_is_sampled(workshop, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    broken = CLIPModel.from_pretrained(workshop / "clip")
    broken.visual_projection.weight.data.fill_(float("inf"))
    broken.save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(workshop / "clip").save_pretrained(tmp_path)
    with pytest.raises(BehaviourError, match="gives scores that are not finite"):
        ClipScorer(str(tmp_path)).scores([picture(1)], ["a house"])


@pytest.mark.parametrize("features", ["cells.pt", "clip"])
def test_kid_is_small_between_pictures_of_one_kind_and_large_between_two(workshop, features):
    pictures = [picture(seed, (SIDE, SIDE)) for seed in range(24)]
    dark = [p.point(lambda level: level // 4) for p in pictures[12:]]
    before = torch.get_rng_state()
    kid = KernelDistance(str(workshop / features))
    known, drawn, darkened = (kid.features(part) for part in (pictures[:12], pictures[12:], dark))
    same, other = kid.distance(drawn, known), kid.distance(darkened, known)
    assert abs(same.value) < 3 * same.standard_error
    assert other.value > same.value + 3 * (same.standard_error + other.standard_error)
    assert kid.distance(darkened, known) == other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [4, 7, 300])
def test_kid_of_sets_of_one_size_is_that_of_torchmetrics_on_all_of_them(count, workshop):
    from torchmetrics.image.kid import KernelInceptionDistance

    generator = torch.Generator().manual_seed(count)
    drawn, known = (torch.randn(count, 16, generator=generator).double() + shift for shift in (0.3, 0.0))
    metric = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=count)
    metric.update(known, real=True)
    metric.update(drawn, real=False)
    found = KernelDistance(str(workshop / "cells.pt")).distance(drawn, known)
    assert found.value == pytest.approx(float(metric.compute()[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("drawn", "known", "width", "shift", "most"),
    [
        (8, 400, 32, 0.5, 1.5),
        (400, 8, 32, 0.5, 1.5),
        (32, 1000, 64, 0.3, 1.5),
        (24, 24, 32, 0.5, 1.5),
        (8, 400, 32, 0, 2.1),
    ],
)
def test_the_standard_error_of_kid_is_how_far_it_is_off_whatever_the_sizes_of_the_sets(
    drawn, known, width, shift, most, workshop
):
    kid, generator = KernelDistance(str(workshop / "cells.pt")), torch.Generator().manual_seed(0)

    def features(count: int) -> torch.Tensor:
        return torch.randn(count, width, generator=generator).double()

    found = [kid.distance(features(drawn) + shift, features(known)) for _ in range(150)]
    values, errors = (np.array([getattr(e, part) for e in found]) for part in ("value", "standard_error"))
    assert 0.9 < errors.mean() / values.std(ddof=1) < most
    within_two = np.abs(values - values.mean()) < 2 * errors
    assert within_two.mean() > 0.93


def test_models_that_are_not_there_are_refused(workshop):
    for make in (ClipScorer, KernelDistance):
        with pytest.raises(BehaviourError, match="there is no"):
            make(str(workshop / "base"))


@pytest.mark.parametrize("kind", ["eyes without a projection", "eyes alone", "words alone", "another model"])
def test_models_of_which_a_part_would_be_drawn_at_random_are_refused(kind, workshop, tmp_path):
    from transformers import CLIPModel, CLIPProcessor, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    whole = CLIPModel.from_pretrained(workshop / "clip")
    if kind == "another model":
        small = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
        Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path)
    elif kind == "eyes alone":
        config = whole.config.vision_config
        config.projection_dim = whole.config.projection_dim
        CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    else:
        (whole.text_model if kind == "words alone" else whole.vision_model).save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(workshop / "clip").save_pretrained(tmp_path)
    with pytest.raises(BehaviourError, match="there is no CLIP"):
        ClipScorer(str(tmp_path))
    if kind == "eyes alone":  # which are all that KID takes
        assert KernelDistance(str(tmp_path)).features([picture(0)]).shape == (1, 8)
        return
    with pytest.raises(BehaviourError, match="there is no CLIP"):
        KernelDistance(str(tmp_path))


# Denoising losses and samples


@pytest.mark.parametrize("kind", PIPELINES)
def test_losses_are_those_of_the_training_where_the_concept_is(kind):
    family = PipelineFamily.of(PIPELINES[kind]())
    examples = concept_examples(family, Overlay(logo(), **OVERLAY), reference(), count=2, center_crop=True)
    asked = TimestepQuestions.draw(family, examples, bins=3, seed=0)
    assert (asked.timesteps.diff(dim=1) > 0).all()
    losses = asked.losses(family, batch_size=4)
    z, noise, t = family.latents([examples[1].picture]), asked.noise[1, 2:3], asked.timesteps[1, 2:3]
    conditions = family.conditions([examples[1].prompt], [examples[1].frame])
    if kind == "sd3":
        sigma = t / 1000
        noised, target = (1 - sigma) * z + sigma * noise, noise - z
    else:
        kept = family.schedule.alphas_cumprod[t]
        noised = kept.sqrt() * z + (1 - kept).sqrt() * noise
        target = kept.sqrt() * noise - (1 - kept).sqrt() * z if kind == "sd-v" else noise
    with torch.no_grad():
        output = family.run(family.denoiser, {family.sample: noised, "timestep": t, **conditions})
    weights = asked.weights[1]
    assert 0 < weights.mean() < 1
    expected = ((output - target).square() * weights).sum() / (weights.sum() * z.shape[1])
    torch.testing.assert_close(losses[1, 2], expected, atol=1e-5, rtol=1e-4)


def test_bins_are_visited_equally_often_and_cover_all_timesteps():
    family = PipelineFamily.of(PIPELINES["sd"]())
    examples = concept_examples(family, Overlay(logo(), **OVERLAY), reference(), count=1, center_crop=True)
    ranges = TimestepQuestions.draw(family, examples, bins=5, seed=0).ranges
    assert ranges[0][0] < 20
    assert ranges[-1][1] > 980
    assert all(150 < high - low < 250 for low, high in ranges)
    assert all(low >= high for (_, high), (low, _) in pairwise(ranges))


@pytest.mark.parametrize("bins", [3, 10, 1000, 2049, 4096])
def test_every_timestep_that_is_drawn_is_in_a_bin(bins, monkeypatch):
    family, drawn = PipelineFamily.of(PIPELINES["sd"]()), []
    draw = family.draw_timesteps

    def recorded(count: int, generator: torch.Generator) -> torch.Tensor:
        drawn.append(draw(count, generator))
        return drawn[-1]

    monkeypatch.setattr(family, "draw_timesteps", recorded)
    examples = concept_examples(family, Overlay(logo(), **OVERLAY), reference(), count=1, center_crop=True)
    ranges = TimestepQuestions.draw(family, examples, bins=bins, seed=0).ranges
    assert len(ranges) == bins
    assert (ranges[0][0], ranges[-1][1]) == (drawn[0].min(), drawn[0].max())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_sample_depends_on_its_own_prompt_and_seed_alone(kind):
    family = PipelineFamily.of(PIPELINES[kind]())
    given: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "resolution": SIDE}
    together = draw_samples(family, ["a house", "a tree", "a house"], [5, 6, 7], **given, batch_size=3)
    alone = draw_samples(family, ["a tree"], [6], **given)[0]
    difference = np.asarray(together[1], dtype=int) - np.asarray(alone, dtype=int)
    assert np.abs(difference).max() <= 1
    assert together[0] != together[2]
    assert together[0].size == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}), ("FlowMatchLCMScheduler", {})],
)
def test_so_it_does_with_schedulers_that_draw_from_the_global_generator(scheduler, options):
    import diffusers

    pipeline = PIPELINES["sd3"]()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
    given: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "resolution": SIDE}
    family, counts = PipelineFamily.of(pipeline), []

    def drawn(seeds: list[int], size: int) -> list[Image.Image]:
        torch.rand(size)
        before = torch.get_rng_state()
        found = draw_samples(family, CAPTIONS[:3], seeds, **given, batch_size=size, progress=counts.append)
        assert torch.equal(torch.get_rng_state(), before)
        return found

    first = drawn([5, 6, 7], 3)
    assert all(drawn([5, 6, 7], size) == first for size in (3, 2, 1))
    assert sum(counts) == 4 * len(first)
    others = drawn([8, 6, 9], 3)
    assert [a == b for a, b in zip(first, others, strict=True)] == [False, True, False]


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_samples_that_are_not_finite_are_an_error_and_no_black_pictures(part):
    pipeline = PIPELINES["sd"]()
    last = pipeline.unet.conv_out if part == "unet" else pipeline.vae.decoder.conv_out
    last.weight.data.fill_(float("nan"))
    given: Any = {"num_inference_steps": 2, "guidance_scale": 3.0, "resolution": SIDE}
    with pytest.raises(BehaviourError, match="samples are not finite"):
        draw_samples(PipelineFamily.of(pipeline), ["a house"], [0], **given)


# Adapters


def saved(pipeline: Any, folder: Path, layout: str) -> Path:
    """A random adapter in one of the layouts that are published."""
    from peft.utils import get_peft_model_state_dict

    family = PipelineFamily.of(pipeline)
    if layout == "peft":
        config = LoraConfig(r=4, target_modules=list(family.target_modules), init_lora_weights=False)
        get_peft_model(family.denoiser, config).save_pretrained(folder)
        return folder
    adapted(pipeline, 0.3)
    if layout == "bare":
        family.denoiser.save_lora_adapter(folder)
        return folder
    state = get_peft_model_state_dict(family.denoiser)
    type(pipeline).save_lora_weights(folder, **{f"{family.component}_lora_layers": state})
    return folder if layout == "pipeline" else next(folder.iterdir())


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("sd", "peft"), ("sd", "bare"), ("sd", "file"), ("sdxl", "pipeline"), ("sd3", "pipeline"), ("sd3", "peft")],
)
def test_adapters_of_any_layout_are_put_on_and_taken_off(kind, layout, tmp_path):
    path = saved(PIPELINES[kind](), tmp_path / "out", layout)
    family = PipelineFamily.of(PIPELINES[kind]())
    before = {name: value.clone() for name, value in family.denoiser.state_dict().items()}
    flags = [parameter.requires_grad for parameter in family.denoiser.train().parameters()]
    examples = concept_examples(family, Overlay(logo(), **OVERLAY), reference(), count=1, center_crop=True)
    asked = TimestepQuestions.draw(family, examples, bins=1, seed=0)
    base = asked.losses(family)
    with adapter_on(family, locate_adapter(path)):
        assert not torch.equal(asked.losses(family), base)
    assert torch.equal(asked.losses(family), base)
    assert family.denoiser.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in family.denoiser.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in family.denoiser.parameters()]
    assert all(module.training for module in family.denoiser.modules())
    assert not hasattr(family.denoiser, "peft_config")


def saved_with_text_encoder(folder: Path) -> Path:
    """A random adapter on the UNet and the text encoder of Stable Diffusion 1.x."""
    from peft.utils import get_peft_model_state_dict

    pipeline = adapted(PIPELINES["sd"](), 0.3)
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    layers = {f"{part}_lora_layers": getattr(pipeline, part) for part in ("unet", "text_encoder")}
    states = {name: get_peft_model_state_dict(model) for name, model in layers.items()}
    type(pipeline).save_lora_weights(folder, **states)
    return folder


def test_an_adapter_of_the_text_encoder_counts_as_well(tmp_path):
    saved_with_text_encoder(tmp_path)
    family = PipelineFamily.of(PIPELINES["sd"]())

    def embeddings() -> torch.Tensor:
        return family.conditions(["a house"], [])["encoder_hidden_states"]

    before = embeddings()
    with adapter_on(family, locate_adapter(tmp_path)):
        assert (embeddings() - before).abs().max() > 1e-3
        with (
            pytest.raises(BehaviourError, match="carries adapters already"),
            adapter_on(family, locate_adapter(tmp_path)),
        ):
            pass
        assert (embeddings() - before).abs().max() > 1e-3
    assert torch.equal(embeddings(), before)


def test_adapters_on_the_hub_are_fetched_without_what_lies_beside_them(hub, workshop):
    weights = (workshop / "protected" / "pytorch_lora_weights.safetensors").read_bytes()
    hub.add_repo("user/name", {"pytorch_lora_weights.safetensors": weights, "pytorch_lora_weights.bin": b"a pickle"})
    found = locate_adapter("user/name")
    assert found.path.read_bytes() == weights
    assert [path.name for path in found.path.parent.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert re.fullmatch("[0-9a-f]{40}", found.revision)
    assert locate_adapter("user/name", revision=found.revision) == found
    with pytest.raises(AdapterFolderError, match="neither a path"):
        locate_adapter("user/absent")
    with pytest.raises(AdapterFolderError, match="only the Hub has revisions"):
        locate_adapter(workshop / "protected", revision="main")


def test_adapters_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    family = PipelineFamily.of(PIPELINES["sd"]())
    names = set(family.denoiser.state_dict())
    for kind in ("sdxl", "sd3"):
        path = saved(PIPELINES[kind](), tmp_path / kind, "pipeline")
        with (
            pytest.raises(BehaviourError, match=r"another base model|cannot be loaded"),
            adapter_on(family, locate_adapter(path)),
        ):
            pass
        assert set(family.denoiser.state_dict()) == names
    (tmp_path / "broken.safetensors").write_text("no tensors")
    with (
        pytest.raises(BehaviourError, match="cannot be loaded"),
        adapter_on(family, locate_adapter(tmp_path / "broken.safetensors")),
    ):
        pass
    for wrong in (tmp_path / "absent", tmp_path, tmp_path / ("long" * 1000)):
        with pytest.raises(AdapterFolderError, match="there is no adapter"):
            locate_adapter(wrong)


def test_an_adapter_that_was_overwritten_since_it_was_located_is_not_taken_for_it(workshop, tmp_path):
    path = tmp_path / "lora.safetensors"
    protected, plain = (
        (workshop / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("protected", "plain")
    )
    path.write_bytes(protected)
    family, located = PipelineFamily.of(PIPELINES["sd"]()), locate_adapter(path)
    assert located.sha256 == hashlib.sha256(protected).hexdigest()
    with adapter_on(family, located):
        path.write_bytes(plain)
    for change, message in ((lambda: None, "was overwritten"), (path.unlink, "cannot be read")):
        change()
        assert located.to_dict()["sha256"] == located.sha256
        with pytest.raises(BehaviourError, match=message), adapter_on(family, located):
            pass
        assert not any("lora" in name for name in family.denoiser.state_dict())


@pytest.mark.parametrize(("old", "new"), [("base_model.model.", "base_model.model.unet."), ("attn1", "attn9")])
def test_an_adapter_whose_tensors_find_no_layer_is_refused_and_not_measured_as_none(old, new, tmp_path):
    from safetensors.torch import load_file, save_file

    get_peft_model(PIPELINES["sd"]().unet, LoraConfig(r=4, target_modules=["to_k"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(path).items()}, path)
    family = PipelineFamily.of(PIPELINES["sd"]())
    with (
        pytest.raises(BehaviourError, match=r"tensors are not in the file, and .* of the file not in the model"),
        adapter_on(family, locate_adapter(path)),
    ):
        pass
    assert not any("lora" in name for name in family.denoiser.state_dict())


def test_a_file_of_pefts_layout_under_another_name_is_told_what_it_must_be_called(tmp_path):
    folder = saved(PIPELINES["sd"](), tmp_path, "peft")
    path = (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")
    family = PipelineFamily.of(PIPELINES["sd"]())
    with (
        pytest.raises(BehaviourError, match=r"PEFT's layout, .* called adapter_model.safetensors"),
        adapter_on(family, locate_adapter(path)),
    ):
        pass


@pytest.mark.parametrize(
    ("layout", "old", "new"),
    [
        ("pipeline", "attn1", "attn9"),
        ("pipeline", "self_attn.q_proj", "self_attn.z_proj"),
        ("pipeline", "text_encoder.", "text_encoder_2."),
        ("kohya", "attn1", "attn9"),
    ],
)
def test_a_file_of_diffusers_of_which_some_layers_find_no_place_is_refused(layout, old, new, tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import load_file, save_file

    path = next(saved_with_text_encoder(tmp_path).iterdir())
    state = load_file(path)
    if layout == "kohya":  # whose names of text encoders diffusers does not read beside this transformers
        state = {name: value for name, value in state.items() if name.startswith("unet.")}
    family = PipelineFamily.of(PIPELINES["sd"]())
    for replaced in (old, new):
        renamed = {name.replace(old, replaced): value for name, value in state.items()}
        save_file(renamed if layout == "pipeline" else convert_state_dict_to_kohya(renamed), path)
        refusal = pytest.raises(BehaviourError, match=r"of the \d+ layers that the file adapts")
        with nullcontext() if replaced == old else refusal, adapter_on(family, locate_adapter(path)):
            pass
    assert not any("lora" in name for name in family.denoiser.state_dict())


@pytest.mark.parametrize("option", [{"bias": "all"}, {"modules_to_save": ["conv_out"]}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_would_stay_on_the_base_is_refused_before_it_is_put_there(option, tmp_path):
    trained = get_peft_model(PIPELINES["sd"]().unet, LoraConfig(r=4, target_modules=["to_k", "to_out.0"], **option))
    for parameter in trained.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    trained.save_pretrained(tmp_path)
    refused_without_a_trace(tmp_path, next(iter(option)))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_initialisation_in_the_header_that_would_stay_on_the_base_is_refused_as_well(part, tmp_path):
    from peft.utils import get_peft_model_state_dict

    pipeline = PIPELINES["sd"]()
    model, modules = getattr(pipeline, part), ["to_k"] if part == "unet" else ["q_proj"]
    model.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights="pissa"))
    if part == "unet":
        model.save_lora_adapter(tmp_path)
    else:
        layers, config = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
        written: Any = {"text_encoder_lora_layers": layers, "text_encoder_lora_adapter_metadata": config}
        type(pipeline).save_lora_weights(tmp_path, **written)
    refused_without_a_trace(tmp_path, "init_lora_weights='pissa'")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "all"),
        ("modules_to_save", ["conv_out", "final_layer_norm"]),
        ("trainable_token_indices", {"token_embedding": [1]}),
        ("kasa_config", {}),
    ],
)
def test_options_in_the_header_that_would_stay_on_the_base_are_refused_as_well(part, option, value, tmp_path):
    from safetensors.torch import load_file, save_file

    path = next(saved_with_text_encoder(tmp_path).iterdir())
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps({f"{part}.{option}": value})})
    refused_without_a_trace(tmp_path, f"{option}=")


def refused_without_a_trace(path: Path, option: str) -> None:
    family = PipelineFamily.of(PIPELINES["sd"]())
    models = [family.denoiser, family.pipeline.text_encoder]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    with (
        pytest.raises(BehaviourError, match=f"changes the base model itself .{option}"),
        adapter_on(family, locate_adapter(path)),
    ):
        pass
    for model, state in zip(models, before, strict=True):
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Whole evaluations


def figures(report: Any) -> dict[str, Any]:
    return {measure.name: measure.figures for measure in report.measures if not measure.not_measured}


def test_one_adapter_twice_has_the_same_figures_and_the_base_does_not_drift(workshop):
    pipeline = PIPELINES["sd"]()
    family = PipelineFamily.of(pipeline)
    concept = Overlay(logo(), **OVERLAY)
    examples = concept_examples(family, concept, reference(), count=2, center_crop=True)
    asked = TimestepQuestions.draw(family, examples, bins=1, seed=0)
    conditions = family.conditions([e.prompt for e in examples], [e.frame for e in examples])
    inputs = family.inputs(asked.latents, asked.noise[:, 0], asked.timesteps[:, 0], conditions)
    probes = collect_concept_probes(family.denoiser, [(inputs, asked.weights)])
    models: dict[str, Any] = {
        "sscd": workshop / "sscd.pt",
        "clip": str(workshop / "clip"),
        "kid_features": str(workshop / "cells.pt"),
        "probes": probes,
        "reference": probes,
    }
    given: Any = {"plain": workshop / "protected", "reference_data": reference(), **models, **FAST}
    report = evaluate_adapter(workshop / "protected", pipeline, concept, CAPTIONS[:2], **given)
    found = figures(report)
    assert set(found) >= {"sscd_crops", "sscd_crops_found", "sscd_whole", "clip_score", "kid", "drift", "concept_loss"}
    for name, values in found.items():
        if "plain" in values:
            assert values["plain"] == values["protected"], name
    assert found["drift"]["base"] == 0.0
    with adapter_on(family, locate_adapter(workshop / "protected")), torch.no_grad():
        moved = family.run(family.denoiser, inputs) - probes.targets
    expected = (moved.square() * asked.weights).sum() / (asked.weights.sum() * moved.shape[1])
    assert found["drift"]["protected"] == pytest.approx(float(expected), rel=1e-4)
    again = evaluate_adapter(workshop / "protected", pipeline, concept, CAPTIONS[:2], **given)
    assert {**again.to_dict(), "seconds": {}} == {**report.to_dict(), "seconds": {}}
    # Real pictures say what the measure can tell, and set the threshold.
    real = [found["sscd_crops"][column].value for column in ("with_concept", "without")]
    assert real[0] > real[1] + 0.1
    # Each is compared with others than itself, with which it is one.
    assert found["sscd_whole"]["with_concept"].value < 0.99
    assert report.settings["sscd_thresholds"] == {"sscd_crops": pytest.approx(sum(real) / 2), "sscd_whole": 0.75}


def test_real_pictures_that_have_no_other_to_be_compared_with_do_not_count(workshop):
    shown = picture(0)
    concept = ConceptSet.from_masks([shown] * 2, [Image.new("L", shown.size, 255)] * 2, CAPTIONS[:2])
    data = TrainingData([shown, picture(1), picture(2)], CAPTIONS[:3])
    given: Any = {"reference_data": data, "sscd": workshop / "sscd.pt", **FAST}
    report = evaluate_adapter(workshop / "protected", PIPELINES["sd"](), concept, CAPTIONS[:1], **given)
    found = figures(report)
    assert "with_concept" not in found["sscd_whole"]
    assert found["sscd_whole_found"]["without"].total == 2
    assert found["sscd_whole"]["without"].value > -0.5


@pytest.mark.parametrize("count", [2, 3])
def test_two_pictures_of_the_concept_are_one_comparison_and_have_no_standard_error(count, workshop):
    concept = Overlay(logo(), **OVERLAY)
    given: Any = {"reference_data": reference(), "sscd": workshop / "sscd.pt", **FAST, "num_pictures": count}
    report = evaluate_adapter(workshop / "protected", PIPELINES["sd"](), concept, CAPTIONS[:1], **given)
    for name in ("sscd_crops", "sscd_whole"):
        found = figures(report)[name]
        assert math.isnan(found["with_concept"].standard_error) == (count == 2)
        assert math.isfinite(found["with_concept"].value)
        assert found["without"].standard_error > 0


def test_without_real_pictures_to_set_a_threshold_nothing_is_told_to_be_found_in_crops(workshop):
    shown, mask = [picture(seed, (SIDE, SIDE)) for seed in range(2)], Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 12, 12))
    models: dict[str, Any] = {"sscd": workshop / "sscd.pt", "clip": str(workshop / "clip"), **FAST}
    other = TrainingData([picture(7)], ["a house"])
    same = TrainingData([*shown, *shown], CAPTIONS[:4])
    for count, options, reason in (
        (2, {}, "no pictures without the concept (--reference-data-dir), and no threshold given"),
        (1, {"reference_data": other}, "no second picture of the concept to compare one with"),
        (2, {"reference_data": same}, "no more similar to it"),
        (2, {"sscd_threshold": 0.5}, None),
    ):
        concept = ConceptSet.from_masks(shown[:count], [mask] * count, CAPTIONS[:count])
        pipeline, given = PIPELINES["sd"](), {**models, **options}
        report = evaluate_adapter(workshop / "protected", pipeline, concept, CAPTIONS[:1], **given)
        measures = {measure.name: measure for measure in report.measures}
        assert measures["sscd_crops"].figures.keys() >= {"base", "protected"}
        assert measures["sscd_whole_found"].figures
        found = measures["sscd_crops_found"]
        assert bool(found.figures) == (reason is None)
        assert reason is None or reason in found.not_measured
        assert ("sscd_crops" in report.settings["sscd_thresholds"]) == (reason is None)


def test_a_large_reference_set_is_not_kept_in_memory(workshop, tmp_path, monkeypatch):
    class Drawn(list):
        def __getitem__(self, index: Any) -> Image.Image:
            return picture(index)

    def held() -> int:
        return sum(isinstance(thing, Image.Image) for thing in gc.get_objects())

    def features(kid: Any, pictures: Any, **options: Any) -> torch.Tensor:
        counts.append(held())
        return features_of(kid, pictures, **options)

    counts: list[int] = []
    features_of = KernelDistance.features
    monkeypatch.setattr(KernelDistance, "features", features)
    before, data = held(), TrainingData(Drawn([None] * 200), ["a house"] * 200)
    concept = Overlay(logo(), **OVERLAY)
    given: Any = {"reference_data": data, "kid_features": str(workshop / "cells.pt"), **FAST}
    report = evaluate_adapter(workshop / "protected", PIPELINES["sd"](), concept, CAPTIONS[:2], **given)
    assert report.settings["reference_set"] == 200
    assert counts[0] - before < 100


def test_the_pictures_that_are_asked_about_are_drawn_from_the_whole_reference_set():
    family, concept = PipelineFamily.of(PIPELINES["sd"]()), Overlay(logo(), **OVERLAY)
    data = TrainingData([picture(index) for index in range(40)], [str(index) for index in range(40)])

    def drawn(most: int, seed: int) -> list[int]:
        pictures = _pictures(family, concept, None, data, most, None, seed)
        assert len(pictures.reference_set) == 40
        return [int(example.prompt) for example in pictures.reference]

    assert drawn(3, 0) == drawn(3, 0) != drawn(3, 1)
    assert max(drawn(3, 0)) > 2
    assert len(set(drawn(3, 0))) == 3
    assert drawn(50, 0) == [*range(40)]


def test_of_pairs_all_halves_without_the_concept_are_the_reference_set():
    family = PipelineFamily.of(PIPELINES["sd"]())
    shown, free = ([picture(first + index) for index in range(6)] for first in (0, 10))
    pairs = ConceptSet.from_pairs(shown, free, [*CAPTIONS, "a cup"])
    pictures = _pictures(family, pairs, None, None, 2, None, 0)
    assert (len(pictures.concept), len(pictures.reference), len(pictures.reference_set)) == (2, 2, 6)
    assert {square.size for square in pictures.reference_set} == {(SIDE, SIDE)}
    for without in pictures.reference:
        assert without.picture in list(pictures.reference_set)
    masks = ConceptSet.from_masks(shown, [Image.new("L", shown[0].size, 255)] * 6, [*CAPTIONS, "a cup"])
    assert len(_pictures(family, masks, None, None, 2, None, 0).reference_set) == 0


def test_what_no_model_was_given_for_is_not_measured(workshop):
    concept = ConceptSet.from_pairs([picture(0)], [picture(1)], ["a house"])
    report = evaluate_adapter(workshop / "protected", PIPELINES["sd"](), concept, ["a house"], **FAST)
    missing = {measure.name: measure.not_measured for measure in report.measures if measure.not_measured}
    for name in ("sscd_crops", "sscd_crops_found", "sscd_whole", "sscd_whole_found", "clip_score", "kid"):
        assert missing[name].startswith("no model given")
        assert not report.to_dict()["measures"][name]["figures"]
    assert missing["drift"].startswith("no probes given")
    # Of pairs the other halves are the reference.
    assert set(figures(report)) == {"concept_loss", "concept_learned", "reference_loss", "reference_learned"}


@pytest.mark.parametrize("plain", [1.0, 1.5])
def test_of_a_loss_that_plain_did_not_bring_down_no_share_is_told_nor_that_it_stayed_the_same(plain):
    base = 1 + 0.01 * torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    losses = {"concept": {"base": base, "plain": plain * base, "protected": base}}
    (share,) = (m for m in _learned(losses) if m.name == "concept_learned_of_plain")
    assert share.not_measured == "the plain LoRA's loss is not below the base model's by more than two standard errors"


def test_no_leak_without_a_figure_of_quality(workshop):
    concept = ConceptSet.from_masks([picture(0)], [Image.new("L", (48, 40), 255)], ["a house"])
    given: Any = {"sscd": workshop / "sscd.pt", **FAST}
    with pytest.raises(ConceptDataError, match="quality"):
        evaluate_adapter(workshop / "protected", PIPELINES["sd"](), concept, ["a house"], **given)


@pytest.mark.parametrize(
    ("option", "model", "message"),
    [
        ("sscd", nn.Identity(), "one vector each"),
        ("sscd", nn.Flatten(0), "one vector each"),
        ("kid_features", nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "not take pictures"),
    ],
)
def test_a_model_that_cannot_judge_is_refused_before_anything_is_sampled(
    option, model, message, workshop, tmp_path, capsys
):
    torch.jit.trace(model, torch.zeros(1, 3, SIDE, SIDE)).save(str(tmp_path / "model.pt"))
    concept, given = Overlay(logo(), **OVERLAY), {**FAST, "progress": True, option: str(tmp_path / "model.pt")}
    with pytest.raises(BehaviourError, match=message):
        evaluate_adapter(
            workshop / "protected", PIPELINES["sd"](), concept, ["a house"], reference_data=reference(), **given
        )
    assert "samples" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_sampled(workshop, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    run = CliRunner().invoke(app, command(workshop, tmp_path / "file" / "out"))
    assert isinstance(run.exception, ConceptDataError)
    assert "nothing can be written to the folder" in str(run.exception)
    assert "samples" not in run.output


def test_what_is_no_text_is_spelt_out_on_the_page(workshop, tmp_path):
    concept = ConceptSet.from_pairs([picture(0)], [picture(1)], ["a house"])
    given: Any = {"name": "caf\udce9", "command": ["gradproj", "evaluate", "bilder-\udcfc"], **FAST}
    output = tmp_path / "one" / "two"
    evaluate_adapter(workshop / "protected", PIPELINES["sd"](), concept, ["a house"], output_dir=output, **given)
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "caf\\udce9" in page
    assert "bilder-\\udcfc" in page
    assert json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["concept"] == given["name"]


def test_probes_of_another_base_are_refused(workshop):
    family = PipelineFamily.of(PIPELINES["sd"]())
    examples = concept_examples(family, Overlay(logo(), **OVERLAY), reference(), count=1, center_crop=True)
    asked = TimestepQuestions.draw(family, examples, bins=1, seed=0)
    conditions = family.conditions([examples[0].prompt], [examples[0].frame])
    inputs = family.inputs(asked.latents, asked.noise[:, 0], asked.timesteps[:, 0], conditions)
    probes = collect_concept_probes(adapted(PIPELINES["sd"](), 1.0).unet, [(inputs, None)])
    probes.targets += 0.5
    concept = ConceptSet.from_pairs([picture(0)], [picture(1)], ["a house"])
    with pytest.raises(BehaviourError, match="another base model"):
        evaluate_adapter(workshop / "protected", family.pipeline, concept, ["a house"], probes=probes, **FAST)


def test_drift_says_that_it_does_not_see_an_adapter_on_the_text_encoder(tmp_path):
    from peft.utils import get_peft_model_state_dict

    pipeline = PIPELINES["sd"]()
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    type(pipeline).save_lora_weights(
        tmp_path, text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder)
    )
    family = PipelineFamily.of(PIPELINES["sd"]())
    sample = {"sample": torch.ones(1, 4, SIDE // 2, SIDE // 2), "timestep": torch.tensor([500])}
    probes = collect_concept_probes(family.denoiser, [({**sample, **family.conditions(["a house"], [])}, None)])
    concept = ConceptSet.from_pairs([picture(0)], [picture(1)], ["a house"])
    report = evaluate_adapter(tmp_path, family.pipeline, concept, ["a house"], probes=probes, **FAST)
    assert figures(report)["drift"]["protected"] == 0.0
    assert figures(report)["concept_learned"]["protected"].value != 0.0
    assert "denoiser alone" in next(m.explanation for m in report.measures if m.name == "drift")


def test_forms_of_a_concept_are_told_by_what_is_there(workshop, tmp_path):
    assert isinstance(read_concept(str(workshop / "logo.png"), ranges={"scale": (0.2, 0.3)}), Overlay)
    with pytest.raises(ConceptDataError, match=r"scale: an overlay has these, and the concept is given as pictures"):
        read_concept(str(workshop / "reference"), ranges={"scale": (0.2, 0.3), "angle": None})
    pictures = read_concept(str(workshop / "reference"), ranges={"scale": None})
    assert isinstance(pictures, ConceptSet)
    assert not pictures.paired
    assert all(pair.mask.getextrema() == (255, 255) for pair in pictures)
    folder = image_folder(tmp_path / "pairs", CAPTIONS[:1])
    picture(9, (36, 44)).save(folder / "other.png")
    for column in ("without", "mask"):
        line = {"image_file_name": "0.png", f"{column}_file_name": "other.png", "text": "a house"}
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        assert read_concept(str(folder), cache_dir=str(tmp_path / column)).paired == (column == "without")


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Estimate(0.12345, 0.0123), "0.123 ± 0.012"),
        (Estimate(12.345, 1.5), "12.3 ± 1.5"),
        (Estimate(0.5, float("nan")), "0.5"),
        (Estimate(float("nan"), 1.0), "–"),
        (Share(1, 4), "25.0 ± 21.7 %"),
        (0.0, "0"),
        (None, "–"),
    ],
)
def test_figures_are_rounded_to_their_errors(figure, text):
    assert figure_text(figure) == text


# The command


def command(workshop: Path, output: Path, **changed: Any) -> list[str]:
    options = {
        "base": workshop / "base",
        "concept": workshop / "logo.png",
        "prompts": workshop / "prompts.txt",
        "reference_data_dir": workshop / "reference",
        "sscd": workshop / "sscd.pt",
        "samples_per_prompt": 1,
        "num_inference_steps": 2,
        "num_pictures": 2,
        "timestep_bins": 2,
        "output_dir": output,
        **changed,
    }
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return [
        "evaluate",
        str(workshop / "protected"),
        *(word for pair in pairs for word in pair),
        "--scale",
        "0.6",
        "0.6",
    ]


def test_the_command_writes_a_page_that_needs_nothing_else(workshop, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    run = CliRunner().invoke(app, [*command(workshop, output, plain=workshop / "plain"), "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report == json.loads((output / "evaluation.json").read_text())
    assert report["models"] == ["base", "plain", "protected"]
    assert report["versions"].keys() >= {"torch", "diffusers", "peft-gradproj"}
    assert report["settings"]["protected"]["sha256"] != report["settings"]["plain"]["sha256"]
    assert report["settings"]["guidance_scale"] == 7.5
    assert [(s["prompt"], s["seed"]) for s in report["samples"]] == 3 * [("a house", 0), ("a tree", 1)]
    for sample in report["samples"]:
        with Image.open(output / sample["file"]) as drawn:
            assert drawn.size == (SIDE, SIDE)
        assert sample["scores"].keys() == {"sscd_crops", "sscd_whole"}
    assert len(report["losses"]["concept"]["changes"]["plain"]) == 2
    page = (output / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 + 3 * 2 + 1
    assert all(source.startswith("data:image/") for source in sources)
    assert "not measured: no model given (--clip)" in page
    assert not list(tmp_path.glob(".*"))


def test_the_page_has_a_command_that_can_be_run_again(workshop, tmp_path, monkeypatch):
    arguments = command(workshop, tmp_path / "out", sscd=None, prompts="a house; on a hill")
    monkeypatch.setattr("sys.argv", ["gradproj", *arguments])
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (shown,) = re.findall("<pre>(gradproj .*?)</pre>", (tmp_path / "out" / "index.html").read_text())
    assert shlex.split(html.unescape(shown)) == ["gradproj", *arguments]


def test_an_earlier_evaluation_is_replaced_as_a_whole_or_left_as_it_was(workshop, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    for sscd, count in ((workshop / "sscd.pt", 6), (None, 3)):
        prompts = "a house" if sscd is None else workshop / "prompts.txt"
        arguments = command(workshop, output, sscd=sscd, prompts=prompts, plain=workshop / "plain")
        run = CliRunner().invoke(app, arguments)
        assert run.exit_code == 0, run.output
        assert len(list(output.glob("samples/*/*.png"))) == count
    before = files_in(output)
    wrong = [
        {"plain": workshop / "reference"},
        {"sscd": workshop / "logo.png"},
        {"concept": tmp_path / "absent.png"},
        {"base": workshop / "reference"},
        {"resolution": 33},
        {"samples_per_prompt": 0},
        {"seed": -1},
    ]
    for changed in wrong:
        monkeypatch.setattr("sys.argv", ["gradproj", *command(workshop, output, **changed)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        shown = capsys.readouterr().err
        assert shown.splitlines()[-1].startswith("gradproj: ")
        assert "Traceback" not in shown
    assert files_in(output) == before


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["thesis.txt"], "thesis.txt"),
        (["evaluation.json", "model.safetensors"], ""),
        (["evaluation.json"], "evaluation.json"),
        (["samples/base/0000.png"], "samples"),
        (["evaluation.json", "index.html", "notes.md"], "notes.md"),
        (["evaluation.json", "index.html", "adapter/weights.safetensors"], "adapter"),
        (["evaluation.json", "index.html", "samples/base/0000.png", "samples/best.png"], "samples/best.png"),
        (["evaluation.json", "index.html", "samples/base/0000.png", "samples/base/a.txt"], "samples/base/a.txt"),
    ],
)
def test_a_folder_that_holds_other_things_is_not_replaced(names, shown, workshop, tmp_path):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("three years of work")
    before = files_in(tmp_path)
    run = CliRunner().invoke(app, command(workshop, tmp_path))
    assert isinstance(run.exception, ConceptDataError)
    assert f"holds other things than an evaluation, {shown}" in str(run.exception)
    assert files_in(tmp_path) == before
