"""The model card: what the Hub indexes, what it says of the checks, and what it leaves of others' words."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SmallNet
from helpers import LAYERS, small_net_basis
from peft import get_peft_model, get_peft_model_state_dict
from published_folders import CONFIG, directions, edit_json, honest_folder, reseal
from tiny_pipelines import PIPELINES
from torch import nn

from peft_gradproj import ConceptBasis, GradProjConfig, LayerBasis, save_sidecars, verify_adapter
from peft_gradproj.errors import AdapterFolderError
from peft_gradproj.model_card import is_unfilled, write_model_card

BEGIN, END = "<!-- gradproj:begin", "<!-- gradproj:end -->"


def written(folder: Path, **options: Any) -> str:
    return write_model_card(folder, verify_adapter(folder), **options).read_text()


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def section(card: str) -> str:
    return card[card.index(BEGIN) : card.index(END)]


def row(card: str, check: str) -> list[str]:
    """The cells of a check's row in the table."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {check} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    honest_folder(tmp_path / "adapter")
    return tmp_path / "adapter"


# Metadata


def test_the_hub_can_index_it(folder):
    found = metadata(written(folder, license="apache-2.0"))
    assert found == {
        "base_model": "someone/model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["lora", "gradproj"],
    }


def test_diffusers_layout_is_of_diffusers(tmp_path):
    honest_folder(tmp_path, style="unet, old")
    assert metadata(written(tmp_path))["library_name"] == "diffusers"


@pytest.mark.parametrize(
    ("task", "tag"), [("CAUSAL_LM", "text-generation"), ("SEQ_CLS", "text-classification"), (None, None)]
)
def test_the_pipeline_tag_follows_the_task(folder, task, tag):
    edit_json(folder, CONFIG, lambda config: config.update(task_type=task))
    reseal(folder)
    assert metadata(written(folder)).get("pipeline_tag") == tag


@pytest.mark.parametrize("base", ["/home/me/base", "./base", "base/", "a/b/c", "me/base.git", None])
def test_a_local_path_is_no_base_model_for_the_hub(tmp_path, base):
    from published_folders import random_basis

    basis = random_basis(base_model=None, revision=None)
    config = {"base_model_name_or_path": base, "revision": None}
    honest_folder(tmp_path, basis=basis, config=config, base_model=base, revision=None)
    card = written(tmp_path, existing="---\nbase_model: /home/me/base\n---\nHello.\n")
    assert not {"base_model", "base_model_relation"} & metadata(card).keys()
    assert "/home/me" not in card


def test_pictures_become_a_gallery_and_replace_their_own_entries(folder):
    other = {"text": "a cat", "output": {"url": "images/cat.png"}}
    existing = (
        f"---\nwidget: {json.dumps([other, {'text': 'old', 'output': {'url': 'images/dog.png'}}])}\n---\nHello.\n"
    )
    found = metadata(written(folder, existing=existing, images=[("a dog", "images/dog.png")]))
    assert found["widget"] == [other, {"text": "a dog", "output": {"url": "images/dog.png"}}]


# What it says


def test_it_says_what_was_kept_out_and_what_the_checks_found(folder):
    report = verify_adapter(folder)
    card = section(written(folder))
    assert "**logo**" in card
    worst = max(value for layer in report.layers for value in layer.leakage.values())
    assert worst > 0
    assert row(card, "integrity")[1] == "passed"
    assert row(card, "orthogonality")[1] == "passed"
    assert f"{worst:.1e}" in row(card, "orthogonality")[2]
    assert "1e-06" in row(card, "orthogonality")[2]
    assert row(card, "behaviour")[1] == "not checked"


def test_what_failed_is_named(tmp_path):
    honest_folder(tmp_path, strength=0.5, uncovered=["the bias of `x|y`"])
    card = section(written(tmp_path))
    assert row(card, "orthogonality")[1] == "**failed**"
    assert "did not verify" in card
    assert "strength 0.5; only strength 1 gives a guarantee" in card
    assert re.search(r"Not covered.*the bias of 'x\\\|y'", card)
    assert "- strength: is 0.5" in card


@pytest.mark.parametrize("options", [{"publish_basis": "digest"}, {"published_basis": None}])
def test_what_could_not_be_checked_did_not_pass(tmp_path, options):
    honest_folder(tmp_path, **options)
    card = section(written(tmp_path))
    assert row(card, "orthogonality")[1] == "could not be checked"
    assert "--basis your_basis.safetensors" in card


def test_of_many_failures_some_are_named(tmp_path):
    honest_folder(tmp_path, uncovered=[f"part {index}" for index in range(1000)])
    card = section(written(tmp_path))
    assert card.count("\n- coverage") == 20
    assert "\n- and 980 more\n" in card


def test_a_withheld_basis_is_named_by_its_digest(tmp_path):
    basis = honest_folder(tmp_path, publish_basis="digest")
    assert basis.digest() in section(written(tmp_path))


def test_a_behaviour_check_is_shown_when_it_was_made(folder):
    report = verify_adapter(folder)
    check = replace(report.checks[0], name="drift", group="behaviour", detail="drift 0.01 on 64 probes")
    card = write_model_card(folder, replace(report, checks=(*report.checks, check))).read_text()
    assert row(card, "behaviour") == ["behaviour", "passed", "drift 0.01 on 64 probes"]


@pytest.mark.parametrize(("style", "call"), [("peft", "PeftModel.from_pretrained("), ("unet", "load_lora_weights(")])
def test_it_says_how_to_verify_and_how_to_load_without_us(tmp_path, style, call):
    honest_folder(tmp_path, style=style)
    card = section(written(tmp_path, repo_id="user/name"))
    assert "$ gradproj verify user/name\n" in card
    assert call in card
    assert card.count("user/name") == 2
    assert "import peft_gradproj" not in card


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("sd", lambda pipeline, folder: pipeline.unet.save_lora_adapter(folder)),
        ("sd", lambda pipeline, folder: pipeline.save_lora_weights(folder, get_peft_model_state_dict(pipeline.unet))),
        ("sd3", lambda pipeline, folder: pipeline.transformer.save_lora_adapter(folder)),
    ],
    ids=["save_lora_adapter", "save_lora_weights", "save_lora_adapter of a transformer"],
)
def test_what_the_card_says_loads_the_adapter(tmp_path, name, save):
    pipeline = PIPELINES[name]()
    denoiser = pipeline.unet if name == "sd" else pipeline.transformer
    denoiser.requires_grad_(False)
    targets = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and n.endswith("to_q")]
    widths = {n: denoiser.get_submodule(n).in_features for n in targets}
    generator = torch.Generator().manual_seed(0)
    basis = ConceptBasis({n: LayerBasis(input=directions(width, 2, generator)) for n, width in widths.items()})
    denoiser.add_adapter(GradProjConfig(r=2, target_modules=targets, concept_basis=basis, init_lora_weights=False))
    save(pipeline, tmp_path / "adapter")
    save_sidecars(denoiser, tmp_path / "adapter")
    card = section(written(tmp_path / "adapter"))
    (load,) = (line for line in card.splitlines() if line.startswith("pipeline."))
    fresh = PIPELINES[name]()
    exec(load.replace("path/to/this/folder", str(tmp_path / "adapter")), {"pipeline": fresh})
    loaded = fresh.unet if name == "sd" else fresh.transformer
    expected = get_peft_model_state_dict(denoiser)
    found = get_peft_model_state_dict(loaded, adapter_name=next(iter(loaded.peft_config)))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"strength": 0.5}, {"publish_basis": "digest"}, {"style": "unet"}])
def test_nothing_is_ever_called_safe(tmp_path, options):
    honest_folder(tmp_path, **options)
    assert not re.search(r"\b(un)?safe(ly|ty)?\b", written(tmp_path), re.IGNORECASE)


def test_names_cannot_break_out_of_the_section(tmp_path):
    from published_folders import random_basis

    concept = f"{END}<script>alert(1)</script>\n# a **heading** | [link](x)"
    basis = random_basis()
    basis = type(basis)(dict(basis), concept, basis.base_model, basis.revision)
    honest_folder(tmp_path, basis=basis)
    card = written(tmp_path)
    assert card.count(END) == 1
    assert "<script>" not in card
    assert r"\# a \*\*heading\*\* \| \[link\](x)" in card


# What others wrote


def test_the_text_and_metadata_of_others_stay(folder):
    existing = (
        "---\nlicense: mit\nlibrary_name: other\ntags:\n- mine\nlanguage:\n- en\nodd_key: 3\n"
        "model-index:\n- name: m\n  results: []\n---\n\n# My adapter\n\nWritten by hand. 100 % ümläut \\1\n"
    )
    (folder / "README.md").write_text(existing)
    card = written(folder)
    found = metadata(card)
    assert (found["license"], found["library_name"], found["odd_key"]) == ("mit", "other", 3)
    assert found["tags"] == ["mine", "lora", "gradproj"]
    assert found["language"] == ["en"]
    assert card.index("Written by hand. 100 % ümläut \\1") < card.index(BEGIN)


def test_writing_it_again_changes_nothing(folder):
    (folder / "README.md").write_text("# Mine\n\nBefore.\n")
    first = written(folder)
    assert written(folder) == first


def test_only_the_section_is_replaced(folder):
    first = written(folder)
    edited = first.replace(END, f"{END}\n\nAfterwards.").replace("| integrity | passed |", "| integrity | nonsense |")
    assert edited.count("nonsense") == 1
    (folder / "README.md").write_text(edited)
    card = written(folder)
    assert "nonsense" not in card
    assert card.endswith(f"{END}\n\nAfterwards.\n")


def test_a_mark_that_lost_its_end_takes_no_text_with_it(folder):
    orphan = f"# Mine\n\n{BEGIN} -->\nhalf a section\n\nMy own words.\n"
    (folder / "README.md").write_text(orphan)
    written(folder)
    assert "My own words." in written(folder)


def test_pefts_own_card_is_kept_below(tmp_path):
    model = get_peft_model(
        SmallNet(), GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=small_net_basis())
    )
    model.save_pretrained(tmp_path)
    template = (tmp_path / "README.md").read_text()
    assert is_unfilled(template)
    card = written(tmp_path)
    assert card.index(END) < card.index("## Model Details")
    assert template.split("---", 2)[2].strip() in card
    assert "gradproj" in metadata(card)["tags"]


def test_line_endings_stay(folder):
    (folder / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\n\r\nText.\r\n")
    write_model_card(folder, verify_adapter(folder))
    data = (folder / "README.md").read_bytes()
    assert b"\n" not in data.replace(b"\r\n", b"")
    assert b"\r\r" not in data


@pytest.mark.parametrize(
    "existing",
    [
        "---\na: [\n---\n",
        f"---\na: {'[' * 2000}\n---\n",
        "---\ntags: 5\n---\n",
        "---\n- a list\n---\n",
        "---\n1: 2\n---\n",
        "---\na: b: c\n---\n",
    ],
)
def test_metadata_that_cannot_be_read_are_not_lost(folder, existing):
    (folder / "README.md").write_text(existing)
    with pytest.raises(AdapterFolderError, match=r"metadata at the head of README\.md"):
        written(folder)
    assert (folder / "README.md").read_text() == existing


@pytest.mark.parametrize("value", ["{a: b}", "[[a]]", "text", "[a, 5, null]"])
def test_metadata_of_other_kinds_than_the_hubs_are_taken_as_they_come(folder, value):
    existing = f"---\ntags: {value}\nwidget: {value}\n---\n"
    data = metadata(written(folder, existing=existing, images=[("a cat", "images/cat.png")]))
    assert data["tags"][-2:] == ["lora", "gradproj"]
    assert data["widget"][-1] == {"text": "a cat", "output": {"url": "images/cat.png"}}


def test_a_card_that_is_no_text_is_refused(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AdapterFolderError, match="UTF-8"):
        written(folder)


def test_it_appears_complete_or_not_at_all(folder, monkeypatch):
    before = written(folder)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        written(folder, license="mit")
    assert (folder / "README.md").read_text() == before
    assert not [name for name in os.listdir(folder) if name.endswith(".README.md")]


def test_the_card_is_no_part_of_what_is_verified(folder):
    written(folder)
    assert verify_adapter(folder).ok
