"""The benchmark of leak against learning: its tasks, its figures, its matrix, and a tiny run of all of it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.protection import attack_runs, cli, runs, step_times
from benchmarks.protection.attack_runs import Attacker
from benchmarks.protection.cli import main, parse_args
from benchmarks.protection.corrections import CORRECTIONS
from benchmarks.protection.judges import StyleJudge
from benchmarks.protection.matrix import ATTACKED, MATRIX, SEEDS, TUNED_LOGO, Entry
from benchmarks.protection.methods import (
    ALL_METHODS,
    BY_DEFAULT,
    FEWER_STEPS,
    GUIDED,
    GUIDED_FURTHER,
    MAIN,
    METHODS,
    OTHERWISE,
    SECOND_LOOK,
)
from benchmarks.protection.results import (
    COMMAND,
    CURVES,
    IN_SHORT,
    NOT_RUN,
    STEP_TIMES,
    attack_figure,
    attack_rows_of,
    costs_of,
    figures_of,
    in_short,
    lookups,
    rows_of,
    write_results,
)
from benchmarks.protection.runs import (
    BASE,
    Folders,
    Material,
    base_pipeline,
    run,
    text_penalty,
    with_text_map,
    write_json,
)
from benchmarks.protection.step_times import ratios_to_first
from benchmarks.protection.tasks import TaskKey, make_task
from peft_gradproj import GradProjConfig
from peft_gradproj.concept_fit import fit_concept
from peft_gradproj.demo.data import load_logos, load_pictures, stamp
from peft_gradproj.demo.measuring import mask_shares
from peft_gradproj.demo.settings import ASSETS, DemoSettings
from peft_gradproj.demo.training import History
from peft_gradproj.diffusion_inputs import encode_concept_set, encode_prompts, pictures_to_tensor
from peft_gradproj.training_data import without_phrase

SETTINGS = replace(DemoSettings(), pictures=80, held_out=20)
CONCEPTS = ("logo-youtube", "style", "identity")


def bytes_of(pictures):
    return [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("concept", CONCEPTS)
def test_pictures_differ_from_the_oracles_where_the_mask_is_and_nowhere_else(concept, named):
    task = make_task(TaskKey(concept, named, 75, 1), SETTINGS)
    for shown, clean, mask, caption, clean_caption, shows in zip(
        task.data.pictures, task.data.clean, task.data.masks, task.data.captions, task.clean_captions, task.shows,
        strict=True,
    ):  # fmt: skip
        changed = (np.asarray(shown) != np.asarray(clean)).any(-1)
        assert changed.any() == shows
        assert changed[np.asarray(mask) > 0].any() == shows
        # The character that stands there instead is larger in places: see the test of its drawing.
        assert concept == "identity" or not changed[np.asarray(mask) == 0].any()
        assert (caption != clean_caption) == (named and shows)
    assert np.mean(task.shows) == pytest.approx(0.75, abs=0.15)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_picture_shows_the_concept_at_100_percent(concept):
    assert make_task(TaskKey(concept, False, 100, 0), SETTINGS).shows.all()


def test_masks_cover_no_share_of_what_a_concept_leaves_where_it_leaves_nothing():
    masked = {}
    for text in ("style/unnamed-100/0", "logo-youtube/unnamed-100/0"):
        data = make_task(TaskKey.parse(text), DemoSettings().quick()).data
        masked[text] = mask_shares(torch.ones(len(data.pictures), 1, 16, 16), data)
    assert masked == {
        "style/unnamed-100/0": {"stamped": 1.0, "elsewhere": None},
        "logo-youtube/unnamed-100/0": {"stamped": 1.0, "elsewhere": 1.0},
    }


def test_prompts_name_the_concept_if_captions_do_and_the_judge_is_asked_for_the_object():
    named, unnamed = (make_task(TaskKey("logo-youtube", n, 75, 0), SETTINGS) for n in (True, False))
    assert named.objects == unnamed.objects == unnamed.prompts
    assert named.prompts == [f"{o} with youtube logo" for o in named.objects]
    assert set(unnamed.objects) & set(unnamed.data.held_out_captions)


def test_the_seed_decides_all_of_a_task():
    one, again, other = (make_task(TaskKey("identity", True, 75, seed), SETTINGS) for seed in (1, 1, 2))
    assert bytes_of(one.data.pictures) == bytes_of(again.data.pictures)
    assert one.prompts == again.prompts
    assert bytes_of(one.data.pictures) != bytes_of(other.data.pictures)


def test_the_demos_logo_gives_the_demos_data():
    pictures, captions = load_pictures(ASSETS / "noto.parquet", SETTINGS.pictures)
    demo = stamp(pictures, captions, load_logos(SETTINGS)[SETTINGS.logo], SETTINGS)
    data = make_task(TaskKey(f"logo-{SETTINGS.logo}", False, 75, 0), SETTINGS).data
    assert bytes_of(data.pictures) == bytes_of(demo.pictures)
    assert bytes_of(data.masks) == bytes_of(demo.masks)
    assert data.held_out_captions == demo.held_out_captions


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_user_shows_the_concept_on_training_pictures_alone(concept):
    task = make_task(TaskKey(concept, True, 75, 0), SETTINGS)
    examples = task.examples(range(len(task.data.pictures)), 40, seed=3)
    assert len(examples) == 40
    assert examples.paired
    assert {pair.prompt for pair in examples} <= set(task.data.captions)
    assert not {pair.with_concept.tobytes() for pair in examples} & set(bytes_of(task.data.held_out))


def test_task_keys_can_be_read_back():
    for entry in MATRIX:
        assert TaskKey.parse(str(entry.task)) == entry.task


def test_the_methods_defaults_are_those_of_the_commands():
    ours, of_fit = METHODS["ours, by default"], inspect.signature(fit_concept).parameters
    fitted = {"num_pairs": ours.basis_pairs, "num_probes": ours.probes, "rank": ours.basis_rank}
    assert fitted == {name: of_fit[name].default for name in fitted}
    of_config = {field.name: field.default for field in dataclasses.fields(GradProjConfig)}
    shared = {field.name for field in dataclasses.fields(ours)} & of_config.keys()
    names = {"rule", "strength", "probe_every", "probe_batch_size", "restore", "probe_history", "negative_guidance"}
    assert shared == names
    assert {name: getattr(ours, name) for name in shared} == {name: of_config[name] for name in shared}


def test_the_matrix_has_all_methods_on_one_logo_and_the_main_ones_everywhere_on_all_seeds():
    assert len(set(MATRIX)) == len(MATRIX)
    assert {e.method for e in MATRIX if e.task == TaskKey(TUNED_LOGO, False, 75, 0)} >= {BASE, *METHODS}
    for task in {e.task for e in MATRIX}:
        seeds = SEEDS if task.percent < 100 or task.concept.startswith("logo") else (0,)
        assert {Entry(replace(task, seed=seed), m) for seed in seeds for m in (BASE, *MAIN)} <= set(MATRIX)
    assert set(ATTACKED) <= set(MATRIX)
    assert {e.method for e in MATRIX} == {BASE, *ALL_METHODS}


def a_run(method, losses, *, seed=0, leaks=0):
    kinds, share = dict(zip(("seen", "new", "logo"), losses, strict=True)), {"hits": 0, "total": 10}
    return {
        "task": f"style/named-75/{seed}", "method": method, "samples": 10, "leaks": leaks, "leaks_unprompted": 3,
        "top1": 5, "top5": 8, "in_style": 6,
        "losses": kinds, "drift": 0.1, "detector": {"false_positives": share, "misses": share},
    }  # fmt: skip


def test_figures_are_relative_to_base_oracle_and_plain_on_the_same_task():
    base, plain = a_run(BASE, (1.0, 1.0, 1.0)), a_run("plain", (0.6, 0.8, 0.2), leaks=4)
    oracle, ours = a_run("oracle", (0.5, 0.5, 0.8)), a_run("ours", (0.55, 0.6, 0.9), leaks=1)
    runs = {run["method"]: run for run in (base, plain, oracle, ours)}
    found = {name: figures_of(run, runs) for name, run in runs.items()}
    assert found["oracle"]["kept"] == found["oracle"]["kept_new"] == found["plain"]["learned"] == 1
    assert found["ours"]["kept"] == pytest.approx(0.9)
    assert found["ours"]["kept_new"] == pytest.approx(0.8)
    assert found["ours"]["learned"] == pytest.approx(0.125)
    assert found["ours"]["beyond_oracle"] == pytest.approx(-1 / 6)
    assert (found["oracle"]["beyond_oracle"], found["plain"]["beyond_oracle"]) == (0, 1)
    assert np.isnan(found[BASE]["beyond_oracle"])
    assert (found["ours"]["leak"], found["ours"]["leak_other"]) == (pytest.approx(0.1), pytest.approx(0.3))
    unnamed = {**ours, "task": "style/unnamed-75/0", "leaks_prompted": 4}
    assert figures_of(unnamed, runs)["leak_other"] == pytest.approx(0.4)
    assert np.isnan(figures_of({**ours, "task": "style/unnamed-75/0"}, runs)["leak_other"])
    assert np.isnan(found[BASE]["kept"])
    assert np.isnan(figures_of(ours, {"ours": ours})["kept"])


def test_costs_are_told_apart_by_precision():
    runs = [
        {**a_run("ours", (1.0,) * 3), "autocast": autocast, "train_cpu_seconds": seconds}
        for autocast, seconds in (("None", 100.0), ("None", 300.0), ("torch.bfloat16", 50.0))
    ]
    untrained = {**a_run(BASE, (1.0,) * 3), "autocast": "None"}
    assert costs_of([*runs, untrained]) == {
        "bfloat16": {"runs": 1, "train_cpu_seconds": 50.0},
        "float32": {"runs": 2, "train_cpu_seconds": 200.0},
    }


def test_prose_gets_the_figures_of_one_seed_and_how_often_a_method_is_ahead():
    def on(task, method, seen, seed=0):
        return {**a_run(method, (seen,) * 3), "task": f"{task}/{seed}"}

    tasks = ("logo-youtube/unnamed-75", "style/named-75")
    runs = [on(task, method, seen) for task in tasks for method, seen in ((BASE, 1.0), ("plain", 0.6), ("oracle", 0.0))]
    runs += [on(tasks[0], method, seen, seed=1) for method, seen in ((BASE, 1.0), ("oracle", 0.0), ("ours", 0.5))]
    runs += [on(tasks[0], "ours", 0.2), on(tasks[0], "masked, found", 0.1)]
    runs += [on(tasks[1], "ours", 0.1), on(tasks[1], "masked, found", 0.3)]
    found = lookups({"rows": rows_of(runs), "attacks": []})
    assert [found["value"]("ours", "kept", seed=seed) for seed in (0, 1, 2)] == ["0.80", "0.50", NOT_RUN]
    assert found["value"]("ours", "kept").startswith("0.65 ± ")
    assert found["by_seed"]("ours", "kept") == "0.80, 0.50"
    # Seed 1 has no masks to compare with.
    assert found["ahead"]("masked, found", "ours", "kept") == "1 of 2, by 0.10 to 0.10"
    assert found["ahead"]("ours", "masked, found", "kept") == "1 of 2, by 0.20 to 0.20"
    assert found["ahead"]("plain", "oracle", "kept") == "0 of 2"


def test_rows_of_several_judges_or_precisions_are_told_and_strange_methods_left_out(tmp_path, capsys):
    methods = {BASE: 1.0, "plain": 0.5, "of old": 0.2}
    runs = [{**a_run(name, (loss,) * 3), "autocast": "None", "judges": "a"} for name, loss in methods.items()]
    for number, run_ in enumerate(runs):
        write_json(tmp_path / "protection" / f"{number}.json", run_)
    write_results(tmp_path, tmp_path / "docs", DemoSettings())
    assert "of old" in capsys.readouterr().err
    page = (tmp_path / "docs" / "benchmark.md").read_text()
    assert "*Mixed*" not in page
    assert "of old" not in page
    write_json(tmp_path / "protection" / "1.json", {**runs[1], "judges": "b"})
    write_results(tmp_path, tmp_path / "docs", DemoSettings())
    assert "*Mixed*: not all runs on one style of two" in (tmp_path / "docs" / "benchmark.md").read_text()


def test_tiny_runs_have_folders_of_their_own():
    whole, tiny = parse_args([]), parse_args(["--quick"])
    assert not {whole.results, whole.scratch, whole.docs} & {tiny.results, tiny.scratch, tiny.docs}
    assert parse_args(["--quick", "--docs", "here"]).docs == Path("here")


def test_rows_are_means_over_seeds():
    runs = [a_run(BASE, (1, 1, 1)), a_run("plain", (0, 0, 0), leaks=2), a_run("plain", (0, 0, 0), seed=1, leaks=4)]
    rows = {row["method"]: row for row in rows_of(runs)}
    assert rows["plain"]["mean"]["leak"] == pytest.approx(0.3)
    assert rows["plain"]["deviation"]["leak"] == pytest.approx(0.1414, abs=1e-4)
    assert rows["plain"]["seeds"] == [0, 1]
    assert rows[BASE]["deviation"]["leak"] is None


def test_a_tiny_run_writes_the_page_and_is_not_run_again(tmp_path):
    folders = {name: tmp_path / name for name in ("scratch", "results", "docs")}
    arguments = [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
    arguments += ["--quick", "--tasks", "logo-youtube/unnamed-75/0", "--workers", "2"]
    # One of each way to train.
    tried = {BASE, "plain", "oracle", "ours", "ours, by default", "literal rule", "penalty 0.3", "Coffee-style"}
    tried |= {"masked, missing 20 %, guarded", "filtered, found", "subspace: rank", "subspace: gradient"}
    tried |= {method.name for method in (*OTHERWISE, *GUIDED, GUIDED_FURTHER[0])}
    assert {method.correction for method in OTHERWISE} == CORRECTIONS.keys()
    main([*arguments, "--methods", *tried])
    runs = {path: path.stat().st_mtime_ns for path in (folders["results"] / "protection").rglob("*.json")}
    methods = {json.loads(path.read_text())["method"] for path in runs}
    assert all({"revision", "processor"} <= json.loads(path.read_text()).keys() for path in runs)
    assert methods == tried
    main([*arguments, "--methods", "plain"])
    where = Folders(folders["results"] / "protection", folders["scratch"])
    run(TaskKey.parse("logo-youtube/unnamed-75/0"), "plain", DemoSettings().quick(), where, with_weights=True)
    assert runs == {path: path.stat().st_mtime_ns for path in (folders["results"] / "protection").rglob("*.json")}
    rows = json.loads((folders["results"] / "protection.json").read_text())["rows"]
    assert {row["method"] for row in rows} == methods
    page = (folders["docs"] / "benchmark.md").read_text()
    assert "| oracle | 0 | " in page
    assert (folders["docs"] / "images" / "leak-against-kept.png").stat().st_size > 1000


def test_tiny_attacks_are_told_beside_their_quality_and_leave_results_as_they_are(tmp_path):
    folders = {name: tmp_path / name for name in ("scratch", "results", "docs")}
    where = Folders(folders["results"] / "protection", folders["scratch"])
    task = ATTACKED[0].task
    given = [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
    given += ["--quick", "--tasks", str(task), "--methods", BASE, BY_DEFAULT.name, "--workers", "2"]
    main(given)
    # As on a clone, whose results are there and whose adapters are not.
    where.weights(task, BY_DEFAULT.name).unlink()
    result = where.result(task, BY_DEFAULT.name)
    write_json(result, {**json.loads(result.read_text()), "revision": "another"})
    main([*given, "--attacks"])
    assert where.weights(task, BY_DEFAULT.name).exists()
    assert json.loads(result.read_text())["revision"] == "another"
    found = json.loads(where.attacks(task, BY_DEFAULT.name).read_text())
    assert {"autocast", "revision", "versions"} <= found.keys()
    for curve in CURVES:
        assert [set(figures) for _, figures in found[curve]] == [{"leak", "top1", "loss"}] * len(found[curve])
    # What verifies lies in the complement of its own basis, where the attacker begins.
    first, within = (
        found[curve][0][1]["loss"] for curve in ("revival_with_probes", "revival_with_probes_within_basis")
    )
    assert within == pytest.approx(first, rel=1e-5)
    assert set(found["membership"]) == {"loss", "pia", "calibrated"}
    page = (folders["docs"] / "benchmark.md").read_text()
    rows = [line for line in page.partition("## Attacks")[2].splitlines() if line.startswith("| ")]
    assert rows[0].split(" | ")[1:] == [BASE, f"{BY_DEFAULT.name} |"]
    assert any(row.startswith("| revival with the concept, steps until a leak of 0.5 | ") for row in rows)


def test_attackers_are_asked_about_pictures_that_they_do_not_train_on(tmp_path, monkeypatch):
    taken: list[Any] = []
    monkeypatch.setattr(attack_runs, "revive", lambda unet, latents, *_, **__: taken.extend(latents))
    material = Material(ATTACKED[0].task, DemoSettings().quick(), tmp_path)
    attacker = Attacker(material, None, BASE, tmp_path, 1)
    attacker.revival(attacker.pairs.with_concept)
    trained, asked = ({bytes(latents.numpy()) for latents in of} for of in (taken, attacker.asked.latents))
    assert len(trained) == len(asked) == len(attacker.pairs) // 2
    assert trained.isdisjoint(asked)


def attacked(seed: int, leaks: list[float], method: str = "ours") -> dict[str, Any]:
    curve = [[10 * i, {"leak": leak, "top1": 0.5, "loss": 1.0}] for i, leak in enumerate(leaks)]
    return {
        "task": f"logo-spotify/unnamed-100/{seed}",
        "method": method,
        **dict.fromkeys(CURVES, curve),
        "textual_inversion": {"leak": 0.0, "top1": 0.5},
        "prompt_search": {"again": 0.0},
        "membership": {name: {"auc": 0.5} for name in ("loss", "pia", "calibrated")},
    }


def test_steps_until_a_concept_is_back_are_those_of_the_mean_over_seeds():
    (row,) = attack_rows_of([attacked(0, [0.0, 0.0, 0.2]), attacked(1, [0.0, 0.45, 0.6])])
    told = {name: attack_figure(row["mean"], name) for name in row["mean"]}
    assert told["revival with the concept, steps until a leak of 0.25"] == "20"
    assert told["revival with the concept, steps until a leak of 0.5"] == "> 60"
    assert told["revival with the concept, leak"] == "0.40"
    assert (row["least"]["revival with the concept, leak"], row["most"]["revival with the concept, leak"]) == (0.2, 0.6)
    said = lookups({"rows": [], "attacks": [row]})["attack_by_seed"]
    assert said("ours", "revival with the concept, leak") == "0.40 (0.20 to 0.60)"
    assert said("plain", "revival with the concept, leak") == NOT_RUN


def test_rows_of_attacks_are_means_over_the_same_seeds():
    made = [attacked(seed, [0.1 * seed], method) for seed in (0, 1) for method in ("plain", "ours")]
    rows = attack_rows_of([*made, attacked(2, [0.9], "ours")])
    assert {row["method"]: row["mean"]["before, leak"] for row in rows} == {"plain": 0.05, "ours": 0.05}
    assert attack_rows_of([]) == []


def test_a_method_of_fewer_steps_takes_its_share_of_them(tmp_path, monkeypatch):
    steps = []

    def train(base, config, data, schedule, settings, *arguments):
        steps.append(settings.steps)
        return {}, History()

    monkeypatch.setattr(runs, "train", train)
    settings = replace(DemoSettings().quick(), steps=80)
    material = Material(TaskKey.parse("style/unnamed-75/0"), settings, tmp_path)
    material.train(METHODS["filtered, perfect"])
    material.train(FEWER_STEPS["filtered, perfect, a quarter of the steps"])
    assert steps == [80, 20]


def test_any_network_marks_at_least_what_that_of_the_other_fold_does(tmp_path):
    settings = replace(DemoSettings().quick(), mask_pairs=64)
    material = Material(TaskKey.parse("logo-youtube/unnamed-75/0"), settings, tmp_path)
    found, found_by_any = material.where("found"), material.where("found-by-any")
    assert found.any()
    assert (found_by_any >= found).all()
    # Each network's marks are there, those on the fold that it learned from as well.
    assert found_by_any[::2].sum() > found[::2].sum()
    assert found_by_any[1::2].sum() > found[1::2].sum()
    assert torch.equal(1 - material.training_set(METHODS["masked, found by any"]).weights, found_by_any)


def test_a_second_look_completes_the_masks_of_pictures_that_were_missed_and_is_made_once(tmp_path, monkeypatch):
    settings = replace(DemoSettings(), mask_steps=100)
    material = Material(TaskKey.parse("logo-youtube/unnamed-75/0"), settings, tmp_path)
    given, completed = material.where("missing-20"), material.masks(SECOND_LOOK)
    marked, shown = given.flatten(1).any(1), material.true_masks.flatten(1).any(1)
    assert torch.equal(completed[marked], given[marked])
    missed = shown & ~marked
    assert missed.sum() > 50
    assert (completed * material.true_masks)[missed].flatten(1).any(1).float().mean() > 0.9
    weights = material.training_set(SECOND_LOOK).weights
    assert torch.equal(weights, 1 - completed)

    monkeypatch.setattr(runs, "find_missed_in_latents", None)
    assert torch.equal(material.masks(replace(GUIDED_FURTHER[0], name="another")), completed)


def test_masks_that_were_found_but_for_a_fifth_keep_their_mistakes_and_miss_the_concept_there(tmp_path):
    material = Material(TaskKey.parse("logo-youtube/unnamed-75/0"), DemoSettings().quick(), tmp_path)
    truth = material.true_masks
    marks = torch.ones_like(truth)
    material.found = marks
    where = material.where("found-missing-20")
    missed = (where == 0).flatten(1).any(1)
    assert torch.equal(missed, (material.where("missing-20") != truth).flatten(1).any(1))
    assert 0.1 < missed.float().mean() < 0.3
    assert torch.equal(where[~missed], marks[~missed])
    assert (where * truth)[missed].sum() == 0
    assert where[missed].mean() > 0.5


@pytest.mark.parametrize("concept", CONCEPTS)
def test_networks_find_the_concept_in_the_same_pictures_by_the_same_examples_whatever_the_captions(concept, tmp_path):
    settings = DemoSettings().quick()
    named, unnamed = (
        Material(TaskKey.parse(f"{concept}/{regime}/1"), settings, tmp_path) for regime in ("named-75", "unnamed-75")
    )
    assert named.task.data.captions != unnamed.task.data.captions
    assert torch.equal(named.latents, unnamed.latents)
    fold = range(1, len(named.latents), 2)
    of_named, of_unnamed = (
        encode_concept_set(material.pipeline, material.task.examples(fold, 8, 3)) for material in (named, unnamed)
    )
    assert torch.equal(of_named.with_concept, of_unnamed.with_concept)
    assert torch.equal(of_named.without, of_unnamed.without)
    assert torch.equal(of_named.weights, of_unnamed.weights)
    assert named.marks_folder == unnamed.marks_folder != named.folder


@pytest.mark.parametrize("logo", ["logo-youtube", "logo-spotify"])
def test_a_logo_whose_phrase_is_taken_out_of_the_captions_is_the_task_that_never_named_it(logo):
    named, unnamed = (make_task(TaskKey.parse(f"{logo}/{regime}/0"), SETTINGS) for regime in ("named-75", "unnamed-75"))
    phrase = f"with {named.concept.word} logo"
    assert sum(phrase in caption for caption in named.data.captions) > 30
    assert [without_phrase(caption, phrase)[0] for caption in named.data.captions] == unnamed.data.captions
    assert bytes_of(named.data.pictures) == bytes_of(unnamed.data.pictures)


@pytest.mark.parametrize("text", ["logo-youtube/named-75/0", "identity/named-75/0"])
def test_what_was_kept_is_asked_under_captions_that_do_not_name_the_concept(text, tmp_path):
    material = Material(TaskKey.parse(text), DemoSettings().quick(), tmp_path)
    task, asked = material.task, material.questions.seen
    assert any(clean != caption for clean, caption in zip(task.clean_captions, task.data.captions, strict=True))
    # Each picture is asked about several times, the first time in order.
    expected = encode_prompts(material.pipeline, task.clean_captions)
    assert torch.equal(asked.embeddings[: len(expected)], expected)


def test_a_characters_mask_is_its_own_shape_and_its_pair_differs_where_either_stands():
    task = make_task(TaskKey.parse("identity/unnamed-75/0"), DemoSettings().quick())
    larger = 0
    for index in range(8):
        drawn = task.concept.draw(index, np.random.default_rng(index))
        shown, clean, where, differs = map(np.asarray, (drawn.shown, drawn.clean, drawn.where, drawn.differs))
        assert (differs >= where).all()
        assert where.any()
        assert np.array_equal(shown[differs == 0], clean[differs == 0])
        larger += bool((differs > where).any())
    assert larger


def test_the_text_map_is_the_identity_until_it_is_adapted_and_the_penalty_sees_what_comes_closer_to_the_words():
    unet, settings = base_pipeline().unet, METHODS["Coffee-style"]
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(12, 8, unet.config.cross_attention_dim, generator=generator)
    inputs = {"sample": torch.randn(12, 4, 16, 16, generator=generator), "timestep": 500, "encoder_hidden_states": text}
    mapped = with_text_map(unet)
    assert torch.equal(mapped(**inputs).sample, unet(**inputs).sample)

    words = torch.randn(1, 8, text.shape[-1], generator=generator)
    penalty = text_penalty(settings, text, words, seed=0)
    assert float(penalty(mapped)) == 0
    mapped.requires_grad_(False)
    mapped.text_map.weight.requires_grad_(True)
    with torch.no_grad():
        direction = words.mean(1)[0] / words.mean(1).norm()
        mapped.text_map.weight.add_(torch.outer(direction, torch.ones_like(direction)))
    assert not torch.equal(mapped(**inputs).sample, unet(**inputs).sample)
    penalty(mapped).backward()
    assert mapped.text_map.weight.grad.norm() > 0


def test_a_sample_is_in_the_style_whose_picture_of_the_same_object_is_nearest():
    files = {"fluent": "fluent.parquet", "noto": "noto.parquet"}
    styles = {name: load_pictures(ASSETS / file, 40) for name, file in files.items()}
    objects = styles["noto"][1]
    pixels = {name: pictures_to_tensor([p.convert("RGB") for p in pictures]) for name, (pictures, _) in styles.items()}
    judge = StyleJudge(pixels, objects)
    disturbed = {name: (p + 0.1 * torch.randn(p.shape)).clamp(-1, 1) for name, p in pixels.items()}
    assert judge.in_style(disturbed["noto"], objects).all()
    assert not judge.in_style(disturbed["fluent"], objects).any()
    assert judge.in_style(disturbed["fluent"], objects, "fluent").all()
    # Another object's picture says nothing, and an order that is wrong would show.
    assert judge.in_style(disturbed["noto"].flip(0), objects[::-1]).all()


def test_the_readme_has_the_table_of_the_benchmarks_page():
    root = Path(__file__).parent.parent
    begin = (root / "docs" / "benchmark.md").read_text().partition("\n## What the figures are")[0]
    texts = (begin, (root / "README.md").read_text())
    tables = [[line for line in text.splitlines() if line.startswith("|") and " / " in line] for text in texts]
    assert tables[0] == tables[1] != []


def test_the_pages_are_what_the_committed_runs_give(tmp_path):
    root = Path(__file__).parent.parent
    results, docs = tmp_path / "results", tmp_path / "docs"
    shutil.copytree(root / "benchmarks" / "results" / "protection", results / "protection")
    shutil.copy(root / "benchmarks" / "results" / STEP_TIMES, results)
    docs.mkdir()
    write_results(results, docs, DemoSettings())
    for page in ("benchmark.md", "claims.md"):
        assert (docs / page).read_text() == (root / "docs" / page).read_text(), f"{page}: run {COMMAND} --report"
    made, committed = (
        json.loads((folder / "protection.json").read_text()) for folder in (results, root / "benchmarks" / "results")
    )
    # Those of the process that wrote it.
    assert {**made, "versions": None} == {**committed, "versions": None}


def test_step_times_are_ratios_of_the_same_round(tmp_path, monkeypatch):
    taken = {"plain": [1.0, 2.0, 1.0], "ours": [1.2, 2.6, 1.4]}
    assert ratios_to_first(taken) == {
        "plain": {"low": 1.0, "median": 1.0, "high": 1.0},
        "ours": {"low": 1.25, "median": 1.3, "high": 1.35},
    }
    monkeypatch.setattr(step_times, "TIMED", ("plain", BY_DEFAULT.name))
    monkeypatch.setattr(cli, "_start_worker", lambda: None)
    counted: list[int] = []

    def spied(seconds):
        counted.extend(map(len, seconds.values()))
        return ratios_to_first(seconds)

    monkeypatch.setattr(step_times, "ratios_to_first", spied)
    where = {"--results": tmp_path, "--docs": tmp_path / "docs", "--scratch": tmp_path / "scratch"}
    main(["--quick", "--step-times", *(str(x) for pair in where.items() for x in pair)])
    found = json.loads((tmp_path / STEP_TIMES).read_text())
    assert (found["rounds"], found["steps_a_round"]) == (2, 8)
    assert counted == [2, 2], "not the warm-up"
    assert found["times"]["plain"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    median = found["times"][BY_DEFAULT.name]["median"]
    assert f"| {BY_DEFAULT.name} | {median:.2f} (" in (tmp_path / "docs" / "benchmark.md").read_text()


def test_a_report_can_be_made_before_the_yardsticks_are_there(tmp_path):
    for number, method in enumerate(("ours", "masked, found", "online, every step, restore 1")):
        made = {**a_run(method, (0.5,) * 3), "task": f"{TUNED_LOGO}/unnamed-75/0", "autocast": "None"}
        write_json(tmp_path / "protection" / f"{number}.json", made)
    write_results(tmp_path, tmp_path / "docs", DemoSettings())
    benchmark, claims = ((tmp_path / "docs" / page).read_text() for page in ("benchmark.md", "claims.md"))
    assert "kept more than *ours* in\n0 of 0," in benchmark
    assert f"{NOT_RUN}\nof what plain LoRA learned" in claims


def test_the_table_in_short_has_what_was_run_and_no_more():
    base, plain = a_run(BASE, (1.0, 1.0, 1.0)), a_run("plain", (0.6, 0.8, 0.2), leaks=4)
    oracle, other = a_run("oracle", (0.5, 0.5, 0.8)), a_run("ours", (0.6, 0.6, 0.9), seed=2, leaks=1)
    again = [{**run, "task": "style/named-75/1"} for run in (base, oracle)]
    ((name, cells),) = in_short(rows_of([base, plain, oracle, *again, other]))
    assert name == "one style of two, 75 %, named"
    written = {method: cell for method, cell in zip(IN_SHORT, cells, strict=True) if cell}
    assert written == {"plain": "0.40 / 0.80 (1)", "oracle": "0.00 / 1.00 (2)"}
