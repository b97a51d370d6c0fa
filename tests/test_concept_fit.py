"""Basis and probes from a concept and training data: what they hold, that training and verifying take them, errors."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from tiny_pipelines import PIPELINES, SIDE, image_folder, logo, picture
from typer.testing import CliRunner

from peft_gradproj import (
    ConceptBasis,
    ConceptProbes,
    ConceptSet,
    GradProjConfig,
    TrainingData,
    fit_concept,
    online_projections,
    save_sidecars,
    verify_adapter,
)
from peft_gradproj.cli import app
from peft_gradproj.concept_fit import _with_and_without, iter_concept_examples, load_concept, read_phrases
from peft_gradproj.concepts import ConceptPair, Overlay, nth_of_shuffles
from peft_gradproj.errors import ConceptDataError
from peft_gradproj.pipelines import PipelineFamily
from peft_gradproj.training_data import without_phrase

CAPTIONS = ["a house", "a tree", "a red hat", "a dog", "two cats"]
SMALL = {"num_pairs": 8, "num_probes": 6, "rank": 2, "batch_size": 4, "progress": False}
PROBES_ONLY = {**SMALL, "num_pairs": 4}


def data(count: int = len(CAPTIONS)) -> TrainingData:
    return TrainingData([picture(seed) for seed in range(count)], CAPTIONS[:count])


def squares(count: int = 4) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of the training resolution with the logo, and without: no crop can move them."""
    without = [picture(10 + seed, (SIDE, SIDE)) for seed in range(count)]
    pairs = ConceptSet.from_overlay(Overlay(logo()), without, ["x"] * count)
    return [pair.with_concept for pair in pairs], [pair.without for pair in pairs]


def pairs(count: int = 4) -> ConceptSet:
    return ConceptSet.from_pairs(*squares(count), CAPTIONS[:count])


def test_a_fit_is_kept_where_the_memory_does_not_suffice_to_time_a_step(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    pipeline = PIPELINES["sd"]()
    flags = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    monkeypatch.setattr(torch.autograd, "grad", full)
    _, _, report = fit_concept(pipeline, Overlay(logo()), data(), output_dir=tmp_path, **SMALL)
    assert {Path(file).name for file in report.files.values()} == {file.name for file in tmp_path.iterdir()}
    assert len(report.files) == 2
    assert report.step_seconds is report.training_steps is None
    assert "training steps" not in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["training_steps"] is None
    assert [parameter.requires_grad for parameter in pipeline.unet.parameters()] == flags


@pytest.mark.parametrize("kind", PIPELINES)
def test_what_is_fitted_trains_saves_and_verifies(kind, tmp_path):
    PIPELINES[kind]().save_pretrained(tmp_path / "base")
    _, _, report = fit_concept(
        tmp_path / "base", Overlay(logo()), data(), name="the logo", output_dir=tmp_path / "fit", **SMALL
    )
    assert report.uncovered == []
    assert report.base_model == str(tmp_path / "base")
    assert report.training_steps > 0
    for name, file in report.files.items():
        assert Path(file).stat().st_size == report.bytes[name]
    # Another process would go on from the files alone.
    family = PipelineFamily.of(PIPELINES[kind]())
    denoiser = family.denoiser.requires_grad_(False)
    probes = ConceptProbes.load(report.files["probes"])
    assert probes.base_model == ConceptBasis.load(report.files["basis"]).base_model == report.base_model
    config = GradProjConfig(
        r=4,
        lora_alpha=4,
        target_modules=report.target_modules,
        concept_basis=report.files["basis"],
        concept_probes=report.files["probes"],
        probe_every=1,
        probe_batch_size=3,
    )
    denoiser.add_adapter(config)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = probes.batch([0, 1, 2])
    losses = []
    for _ in range(4):
        loss = F.mse_loss(denoiser(**batch.inputs).sample, batch.loss_targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] != losses[0]
    assert online_projections(denoiser)["default"].log()["gradproj/drift"] > 0
    denoiser.save_lora_adapter(tmp_path / "adapter")
    save_sidecars(denoiser, tmp_path / "adapter")
    verified = verify_adapter(tmp_path / "adapter")
    assert verified.ok, str(verified)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_fit(tmp_path):
    (tmp_path / "file").write_text("own")
    # There is no pipeline.
    with pytest.raises(ConceptDataError, match=r"nothing can be written to .*file"):
        fit_concept("nowhere", Overlay(logo()), data(), output_dir=tmp_path / "file", **SMALL)


@pytest.mark.parametrize("kind", PIPELINES)
def test_probes_hold_the_latents_noise_and_loss_target_of_the_training(kind):
    """The latents that are computed back from noised latents and loss target are those of the pictures."""
    pipeline, concept = PIPELINES[kind](), pairs()
    _, probes, _ = fit_concept(pipeline, concept, **PROBES_ONLY)
    family = PipelineFamily.of(pipeline)
    x, target, t = probes.inputs[family.sample], probes.loss_targets, probes.inputs["timestep"]
    if kind == "sd3":
        assert t.dtype == torch.float32
        found = x - (t / 1000)[:, None, None, None] * target
    else:
        assert t.dtype == torch.int64
        kept = family.schedule.alphas_cumprod[t][:, None, None, None]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        found = alpha * x - sigma * target if kind == "sd-v" else (x - sigma * target) / alpha
    order = [nth_of_shuffles(index, len(concept), 0) for index in range(len(probes))]
    expected = family.latents([concept[i].with_concept for i in order])
    # Dividing by a small alpha magnifies rounding.
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    with torch.no_grad():
        output = family.run(family.denoiser, probes.inputs)
    torch.testing.assert_close(output, probes.targets, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_both_halves_of_a_pair_have_the_same_noise_timestep_and_conditions(kind):
    pipeline, concept = PIPELINES[kind](), pairs()
    family = PipelineFamily.of(pipeline)
    seen = []
    hook = family.denoiser.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs), with_kwargs=True)
    fit_concept(pipeline, concept, **{**SMALL, "num_pairs": 4, "num_probes": 1})
    hook.remove()
    with_concept, without = seen[:2]
    for name in with_concept.keys() - {family.sample, "added_cond_kwargs"}:
        assert torch.equal(with_concept[name], without[name]), name
    for name, value in with_concept.get("added_cond_kwargs", {}).items():
        assert torch.equal(value, without["added_cond_kwargs"][name]), name
    # Noise cancels in the difference, which is that of the latents alone, scaled.
    order = [nth_of_shuffles(index, len(concept), 0) for index in range(4)]
    z, others = (family.latents([getattr(concept[i], half) for i in order]) for half in ("with_concept", "without"))
    zero, t = torch.zeros_like(z), with_concept["timestep"]
    expected = family.noised(z, zero, t) - family.noised(others, zero, t)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(with_concept[family.sample] - without[family.sample], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_layers_are_those_that_the_training_scripts_adapt(kind):
    from peft import LoraConfig

    pipeline = PIPELINES[kind]()
    basis, _, report = fit_concept(pipeline, Overlay(logo()), data(), **SMALL)
    family = PipelineFamily.of(pipeline)
    family.denoiser.add_adapter(LoraConfig(r=2, target_modules=list(family.target_modules)))
    adapted = {n.removesuffix(".lora_A") for n, _ in family.denoiser.named_modules() if n.endswith(".lora_A")}
    assert set(basis) == adapted
    # The text is the same in both halves: its projections show no contrast, and have the basis of their partners.
    text = ("attn2.to_k", "attn2.to_v", "blocks.0.attn.add_k_proj", "blocks.0.attn.add_v_proj", "0.attn.add_q_proj")
    assert set(report.derived) == {name for name in adapted if name.endswith(text)}
    assert report.derived
    for name in report.derived:
        assert basis[name].spaces() == ("output",)
        partner, _, space = basis.fit["derived"][name].rpartition(".")
        assert torch.equal(basis[name].output, getattr(basis[partner], space))
        assert partner.rpartition(".attn")[0] == name.rpartition(".attn")[0]


def test_the_same_seed_gives_the_same_and_another_seed_another():
    def fitted(seed: int):
        basis, probes, _ = fit_concept(PIPELINES["sdxl"](), Overlay(logo()), data(), seed=seed, **SMALL)
        return basis, probes

    before = torch.get_rng_state()
    one, again, other = fitted(1), fitted(1), fitted(2)
    assert one == again
    assert one[0] != other[0]
    assert one[1] != other[1]
    # Building a pipeline draws numbers; fitting does not.
    torch.set_rng_state(before)
    pipeline = PIPELINES["sd"]()
    drawn = torch.get_rng_state()
    fit_concept(pipeline, Overlay(logo()), data(), **PROBES_ONLY)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_pipeline_is_left_as_it_was():
    pipeline = PIPELINES["sd"]()
    pipeline.unet.train()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    fit_concept(pipeline, Overlay(logo()), data(), **PROBES_ONLY)
    assert pipeline.unet.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pipeline.unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())


def test_weights_are_where_the_overlay_lies():
    overlay = Overlay(logo(), scale=(0.3, 0.3), across=(0.0, 0.0), down=(0.0, 0.0))
    _, probes, _ = fit_concept(PIPELINES["sd"](), overlay, data(), **PROBES_ONLY)
    assert (probes.weights.amax((1, 2, 3)) == 1).all()
    assert probes.weights[..., :2, :2].min() > 0
    assert probes.weights[..., 8:, :].max() == 0
    assert probes.weights[..., 8:].max() == 0


def test_pictures_with_masks_are_contrasted_with_the_training_data():
    pictures, _ = squares()
    masks = [pair.mask for pair in pairs()]
    concept = ConceptSet.from_masks(pictures, masks, CAPTIONS[:4])
    basis, probes, _ = fit_concept(PIPELINES["sd"](), concept, data(), **{**SMALL, "target_modules": ["to_out.0"]})
    assert basis.fit["method"] == "generalized"
    assert basis.fit["batches"] == {"concept": 2, "reference": 2, "held_out": 1}
    assert 0 < (probes.weights > 0).float().mean() < 1
    with pytest.raises(ConceptDataError, match="needs the training data"):
        fit_concept(PIPELINES["sd"](), concept, **SMALL)


def test_a_set_of_which_some_have_another_half_is_fitted_as_if_none_had():
    sets = [pairs(), ConceptSet([ConceptPair(p.with_concept, None, p.mask, p.prompt) for p in pairs()])]
    mixed = ConceptSet([sets[i % 2][i] for i in range(4)])
    options = {**SMALL, "target_modules": ["to_out.0"]}
    (basis, probes, _), (other, others, _) = (
        fit_concept(PIPELINES["sd"](), concept, data(), **options) for concept in (mixed, sets[1])
    )
    assert basis == other
    assert probes == others


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_words_give_the_text_layers_a_basis_and_weigh_probes_by_what_they_change(kind):
    pipeline = PIPELINES[kind]()
    basis, probes, report = fit_concept(pipeline, ["by X"], data(), **SMALL)
    text = [name for name in basis if name.endswith(("attn2.to_k", "attn.add_k_proj"))]
    assert text
    assert all("input" in basis[name].spaces() for name in text)
    # What lies before the text enters cannot show it, and is said to be uncovered.
    assert all(".attn1." in name for name in report.uncovered)
    assert bool(report.uncovered) == (kind == "sd")
    assert (probes.weights.amax((1, 2, 3)) == 1).all()
    assert probes.weights.min() < 0.5
    family = PipelineFamily.of(pipeline)
    prompts = [f"{CAPTIONS[nth_of_shuffles(i, len(CAPTIONS), 0)]}, by X" for i in range(2)]
    expected = family.conditions(prompts, [])["encoder_hidden_states"]
    torch.testing.assert_close(probes.inputs["encoder_hidden_states"][:2], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a house", ("a house, by X", "a house")),
        ("a house, by X", ("a house, by X", "a house")),
        ("By x, a house", ("By x, a house", "a house")),
        ("a house by Xavier", ("a house by Xavier, by X", "a house by Xavier")),
        ('a "by X" house', ('a "by X" house', 'a "" house')),
        ("", ("by X", "")),
        ("a house by\nX", ("a house by\nX", "a house")),
        ("a house, by  X, old", ("a house, by  X, old", "a house, old")),
    ],
)
def test_captions_with_and_without_words(caption, expected):
    assert _with_and_without(caption, "by X") == expected


def test_captions_are_shortened_until_the_words_are_read():
    long = TrainingData([picture(0)], [" ".join(["house"] * 20)])
    pipeline = PIPELINES["sd"]()
    options = {**SMALL, "num_pairs": 2, "num_probes": 1, "target_modules": ["attn2.to_k"]}
    _, probes, _ = fit_concept(pipeline, ["by X"], long, **options)
    # 40 tokens: one a letter, the comma, begin and end.
    family = PipelineFamily.of(pipeline)
    expected = family.conditions([f"{' '.join(['house'] * 6)}, by X"], [])["encoder_hidden_states"]
    torch.testing.assert_close(probes.inputs["encoder_hidden_states"], expected, atol=1e-5, rtol=1e-4)


def test_words_that_change_nothing_are_refused():
    pipeline = PIPELINES["sd"]()
    for name, parameter in pipeline.unet.named_parameters():
        if ".attn2.to_out.0." in name:
            torch.nn.init.zeros_(parameter)
    with pytest.raises(ConceptDataError, match="change nothing in the base model's answer"):
        fit_concept(pipeline, ["by X"], data(), **{**SMALL, "target_modules": ["attn2.to_k"]})


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "at least 1"),
        ({"spaces": ("rank",)}, "need an adapter"),
        ({"resolution": 33}, "multiple of 2"),
        ({"dtype": "int8"}, None),
    ],
)
def test_options_out_of_range(options, message):
    if message is None:
        with pytest.raises(ConceptDataError, match="float32"):
            fit_concept("nowhere", Overlay(logo()), data(), **{**SMALL, **options})
        return
    with pytest.raises(ConceptDataError, match=message):
        fit_concept(PIPELINES["sd"](), Overlay(logo()), data(), **{**SMALL, **options})


def test_a_concept_that_is_larger_than_the_picture():
    with pytest.raises(ConceptDataError, match="does not fit on a picture of 32x32"):
        fit_concept(PIPELINES["sd"](), Overlay(logo(), scale=(1, 1), angle=(45, 45)), data(), **SMALL)


def test_a_concept_without_training_data_or_words():
    for concept, given in ((Overlay(logo()), None), (["by X"], None)):
        with pytest.raises(ConceptDataError, match="needs the training data"):
            fit_concept(PIPELINES["sd"](), concept, given, **SMALL)
    with pytest.raises(ConceptDataError, match="no phrase"):
        fit_concept(PIPELINES["sd"](), [" "], data(), **SMALL)


def test_a_crop_that_loses_the_concept_is_moved_to_it():
    wide = picture(0, (4 * SIDE, SIDE))
    mask = Image.new("L", wide.size)
    mask.paste(255, (120, 10, 126, 20))
    concept = ConceptSet.from_masks([wide], [mask], ["a house"])
    options = {**SMALL, "num_pairs": 4, "center_crop": True, "target_modules": ["to_out.0"]}
    _, probes, _ = fit_concept(PIPELINES["sd"](), concept, data(), **options)
    assert (probes.weights.amax((1, 2, 3)) == 1).all()


def test_a_concept_in_two_corners_of_a_wide_picture_is_in_every_crop():
    without = [Image.new("RGB", (4 * SIDE, SIDE), (200, 200, seed)) for seed in range(3)]
    pictures = [picture.copy() for picture in without]
    for shown in pictures:
        for left in (0, 4 * SIDE - 8):
            shown.paste((255, 0, 0), (left, 20, left + 8, 30))
    concept = ConceptSet.from_pairs(pictures, without, [""] * 3)
    examples = [*iter_concept_examples(concept, count=32, resolution=SIDE)]
    for example in examples:
        assert example.picture.getcolors() != example.without.getcolors()
        assert example.mask.getbbox() is not None
    # Either place, also by crops that were moved.
    assert {example.frame.left < 2 * SIDE for example in examples} == {True, False}


def test_phrases_are_found_in_scripts_without_blanks():
    assert without_phrase("桌上有宏碁标志的杯子", "宏碁标志") == ("桌上有的杯子", True)


# From files


def test_forms_of_a_concept_are_told_apart(tmp_path):
    with pytest.raises(ConceptDataError, match="given as nothing"):
        load_concept()
    with pytest.raises(ConceptDataError, match="overlay and prompts"):
        load_concept(overlay="logo.png", prompts=["x"])
    Image.new("1", (20_000, 9_500)).save(tmp_path / "huge.png")
    with pytest.raises(ConceptDataError, match=r"the overlay .*huge\.png cannot be read.*bomb"):
        load_concept(overlay=tmp_path / "huge.png")
    with pytest.raises(ConceptDataError, match="cannot be read"):
        load_concept(overlay=tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConceptDataError, match="cannot be read"):
        load_concept(overlay=tmp_path / "text.png")
    picture(0).save(tmp_path / "opaque.png")
    with pytest.raises(ConceptDataError, match="alpha channel"):
        load_concept(overlay=tmp_path / "opaque.png")
    (tmp_path / "words.txt").write_text("\ufeffby X\n\n in the style of Y \n", encoding="utf-8")
    assert load_concept(prompts=[str(tmp_path / "words.txt"), "Z"]) == ["by X", "in the style of Y", "Z"]
    # Too long for the name of a file.
    assert load_concept(prompts=["x" * 300]) == ["x" * 300]
    (tmp_path / "words.txt").write_text("\n")
    with pytest.raises(ConceptDataError, match="names nothing"):
        load_concept(prompts=[str(tmp_path / "words.txt")])


@pytest.mark.parametrize("name", ["wrods.txt", "prompts.csv", "folder/metadata.jsonl", "WORDS.TXT"])
def test_a_file_of_phrases_that_is_not_there_is_no_phrase(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConceptDataError, match="there is no file"):
        read_phrases(name)
    assert read_phrases("a page of notes.txt") == ["a page of notes.txt"]
    assert read_phrases("v1.5") == ["v1.5"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_the_ends_of_lines_part_phrases(end, tmp_path):
    phrases = ["a house\u2028at night", "a tree\x0cin the sun", "a\x85cat", "a\x1cdog"]
    (tmp_path / "words.txt").write_bytes(end.join(phrases).encode())
    assert read_phrases(str(tmp_path / "words.txt")) == phrases


def concept_folder(folder: Path, other: str, *, captions: bool = True) -> Path:
    """Pairs or pictures with masks, as `datasets` reads them."""
    with_concept, without = squares(3)
    found = without if other == "without" else [pair.mask for pair in pairs(3)]
    folder.mkdir()
    lines = []
    for index, (one, two) in enumerate(zip(with_concept, found, strict=True)):
        one.save(folder / f"{index}.png")
        two.save(folder / f"{index}-{other}.png")
        line = {"image_file_name": f"{index}.png", f"{other}_file_name": f"{index}-{other}.png"}
        lines.append(json.dumps(line | ({"text": CAPTIONS[index]} if captions else {})))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("other", ["without", "mask"])
def test_pictures_are_not_kept_as_they_were_read_beside_those_of_the_concept_set(other, tmp_path, monkeypatch):
    def held() -> int:
        return sum(isinstance(thing, Image.Image) for thing in gc.get_objects())

    def counted(*given):
        counts.append(held())
        return make(*given)

    counts: list[int] = []
    form, name = {"without": ("pairs", "from_pairs"), "mask": ("masks", "from_masks")}[other]
    make = getattr(ConceptSet, name)
    monkeypatch.setattr(ConceptSet, name, counted)
    folder, before = concept_folder(tmp_path / other, other), held()
    found = load_concept(**{form: folder}, cache_dir=str(tmp_path / "cache"))
    assert len(found) == 3
    assert counts[0] - before < 3


def test_pairs_and_masks_from_folders(tmp_path):
    cache = str(tmp_path / "cache")
    found = load_concept(pairs=concept_folder(tmp_path / "pairs", "without"), cache_dir=cache)
    assert found.paired
    assert [pair.prompt for pair in found] == CAPTIONS[:3]
    one, two = squares(3)
    for pair, with_concept, without in zip(found, one, two, strict=True):
        assert ImageChops.difference(pair.with_concept, with_concept).getbbox() is None
        assert ImageChops.difference(pair.without, without).getbbox() is None
    folder = concept_folder(tmp_path / "masks", "mask", captions=False)
    with pytest.raises(ConceptDataError, match="no training data to draw them from"):
        load_concept(masks=folder, cache_dir=cache)
    found = load_concept(masks=folder, data=data(), cache_dir=cache)
    assert not found.paired
    assert {pair.prompt for pair in found} <= set(CAPTIONS)
    with pytest.raises(ConceptDataError, match="no column 'without'"):
        load_concept(pairs=folder, cache_dir=cache)


def test_of_alternative_captions_the_first_is_taken(tmp_path):
    folder = concept_folder(tmp_path / "pairs", "without", captions=False)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]

    def load(captions):
        given = [json.dumps(line | {"text": text}) for line, text in zip(lines, captions, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(given))
        return load_concept(pairs=folder, cache_dir=str(tmp_path / "cache"))

    assert [pair.prompt for pair in load([[text, "other words"] for text in CAPTIONS[:3]])] == CAPTIONS[:3]
    with pytest.raises(ConceptDataError, match=r"the caption of row 1 of .*pairs is a list; expected text"):
        load([["a"], [], ["c"]])
    # To look for what pairs show, their captions are not needed.
    uncaptioned = load_concept(
        pairs=folder, data=TrainingData(squares(3)[0], [""] * 3), caption_column=None, cache_dir=str(tmp_path / "cache")
    )
    assert [pair.prompt for pair in uncaptioned] == [""] * 3


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A pipeline, training data and a logo on a disk."""
    folder = tmp_path_factory.mktemp("workshop")
    PIPELINES["sd"]().save_pretrained(folder / "base")
    image_folder(folder / "data", CAPTIONS)
    image_folder(folder / "bare", CAPTIONS, metadata=False)
    logo().save(folder / "logo.png")
    return folder


def arguments(workshop: Path, output: Path, **changed: object) -> list[str]:
    given = {
        "pretrained-model-name-or-path": workshop / "base",
        "output-dir": output,
        "overlay": workshop / "logo.png",
        "train-data-dir": workshop / "data",
        "cache-dir": workshop / "cache",
        "num-pairs": 8,
        "num-probes": 4,
        "rank": 2,
        "concept": "the logo",
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    return ["fit", *(str(x) for name, value in given.items() if value is not None for x in (f"--{name}", value))]


def test_the_command_writes_both_files_and_says_what_they_cost(workshop, tmp_path):
    command = arguments(workshop, tmp_path, target_modules="to_q,to_out.0", spaces="input", base_model="user/base")
    run = CliRunner().invoke(app, [*command, "--scale", "0.2", "0.3", "--center-crop", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    basis, probes = ConceptBasis.load(report["files"]["basis"]), ConceptProbes.load(report["files"]["probes"])
    assert (basis.concept, basis.base_model, basis.spaces()) == ("the logo", "user/base", ("input",))
    assert (probes.concept, probes.base_model, len(probes)) == ("the logo", "user/base", 4)
    assert {name.rpartition(".attn")[2][2:] for name in basis} == {"to_q", "to_out.0"}
    assert report["training_steps"] > 0
    assert report["bytes"]["probes"] == Path(report["files"]["probes"]).stat().st_size


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_data_dir": "bare"}, "metadata.jsonl"),
        ({"train_data_dir": None}, "needs the training data"),
        ({"pretrained_model_name_or_path": "data"}, "no pipeline"),
        ({"overlay": None}, "given as nothing"),
    ],
)
def test_the_command_refuses_with_errors_of_ours(workshop, tmp_path, changed, message):
    changed = {name: value and workshop / value for name, value in changed.items()}
    run = CliRunner().invoke(app, arguments(workshop, tmp_path, **changed))
    assert isinstance(run.exception, ConceptDataError)
    assert message in str(run.exception)
    assert not list(tmp_path.iterdir())


def test_fit_and_launch_as_people_call_them(workshop, tmp_path):
    """The unmodified script names the layers that it adapts itself, the projections of the text among them."""

    def called(*command: object) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = (sys.executable, "-m", "peft_gradproj", *command)
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    fit = tmp_path / "fit"
    assert "training steps of 4 pictures" in called(*arguments(workshop, fit, num_pairs=4))
    assert {file.name for file in fit.iterdir()} == {"concept_basis.safetensors", "concept_probes.safetensors"}
    script = [Path(__file__).parent / "scripts" / "train_text_to_image.py", "--unet", workshop / "base" / "unet"]
    options = ["--concept-basis", fit, "--concept-probes", fit, "--probe-every", 1, "--probe-batch-size", 2]
    called("launch", *options, *script, "--output_dir", tmp_path / "out", "--max_train_steps", 2)
    verified = verify_adapter(tmp_path / "out", basis=fit / "concept_basis.safetensors")
    assert verified.ok, str(verified)
