"""Verification: honest adapters pass, whatever their layout; every other folder is found out for its own reason."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from published_folders import (
    BASIS,
    BOUND_FILES,
    CONFIG,
    DIFFUSERS_WEIGHTS,
    HARMLESS,
    KEY_STYLES,
    MANIFEST,
    NOT_VERIFIED,
    REFUSED,
    SHAPES,
    TAMPERINGS,
    WEIGHTS,
    Tampering,
    adapter_config,
    contents,
    edit_json,
    edit_tensors,
    honest_folder,
    honest_tensors,
    random_basis,
    reseal,
)
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_gradproj import ConceptBasis, LayerBasis, adapter_folder, verify_adapter
from peft_gradproj.adapter_folder import CHECKABLE_SPACES, read_basis_or_adapter, write_sidecars
from peft_gradproj.errors import AdapterFolderError, ConceptBasisError, GradProjError
from peft_gradproj.saving import load_settings
from peft_gradproj.verification import VerificationReport

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def failed(report: VerificationReport) -> set[str]:
    return {check.name for check in report.failures}


# Honest folders


@pytest.mark.parametrize("style", KEY_STYLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_honest_adapter_is_verified(tmp_path, style, dtype):
    honest_folder(tmp_path, style=style, dtype=dtype)
    report = verify_adapter(tmp_path)
    assert report.ok, report.render()
    assert report.exit_status == 0
    assert {layer.name for layer in report.layers} == set(SHAPES)
    assert {check.name for check in report.checks} == {
        *("digests", "files", "config", "base model", "shapes", "dtypes", "values"),
        *("strength", "basis", "coverage", "leakage", "claims"),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"basis": random_basis(["input"])},
        {"basis": random_basis(["output"], k=5)},
        {"basis": random_basis(["rank"])},
        {"basis": random_basis(["input", "rank", "output", "gradient"])},
        {"basis": random_basis(base_model=None, revision=None)},
        {"rank_pattern": {"to_q": 2, "down.conv": 6}, "config": {"alpha_pattern": {"to_q": 16}}},
        {"config": {"rank_pattern": {"^down.*conv$": 4}, "r": 4}},
        {"config": {"lora_alpha": 1, "use_rslora": True, "init_lora_weights": "gaussian"}},
        {"config": {"task_type": "CAUSAL_LM", "some_future_option": None}},
        {"recipe": {"data": "stamped"}},
    ],
    ids=lambda options: ", ".join(options) if isinstance(options, dict) else "",
)
def test_honest_variants_are_verified(tmp_path, options):
    options = dict(options)
    config = options.pop("config", {})
    pattern = config.pop("rank_pattern", None) if "rank_pattern" in config else None
    honest_folder(tmp_path, config=config, **options)
    if pattern is not None:
        edit_json(tmp_path, CONFIG, lambda written: written.update(rank_pattern=pattern))
        reseal(tmp_path)
    report = verify_adapter(tmp_path)
    assert report.ok, report.render()


@pytest.mark.parametrize(
    "keys",
    [
        ("to_q", "down.attn.to_q"),
        ("down.attn.to_q", "to_q"),
        ("^to_q", "to_q"),
        ("^down.attn.to_q$", "to_q"),
        ("to_q$", "to_q"),
        (".*attn.*", "to_q", "to_out.0"),
        ("to_q", ".*attn.*"),
        ("to", "q"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("module", list(SHAPES))
def test_of_a_rank_pattern_the_first_key_that_matches_counts_as_in_peft(tmp_path, keys, module):
    pattern = {key: 2 + place for place, key in enumerate(keys)}
    expected = pattern.get(get_pattern_key(pattern, module), 7)
    # Expressions are not run: what others say in place of one is let through too, unless a name stands before it.
    ranks = [2, 3, 7] if ".*attn.*" not in keys or (keys[0] == "to_q" and "to_q" in module) else [expected]
    (tmp_path / CONFIG).write_text(json.dumps(adapter_config(r=7, rank_pattern=pattern)))
    for rank in ranks:
        tensors = {"A": torch.ones(rank, 12), "B": torch.ones(10, rank)}
        save_file({f"{module}.lora_{part}.weight": tensor for part, tensor in tensors.items()}, tmp_path / WEIGHTS)
        write_sidecars(tmp_path, None, settings={}, base_model=None)
        assert ("config" in failed(verify_adapter(tmp_path))) == (rank != expected)


def test_both_layouts_beside_each_other_are_both_checked(tmp_path):
    basis = honest_folder(tmp_path)
    save_file(honest_tensors(basis, style="unet"), tmp_path / DIFFUSERS_WEIGHTS)
    write_sidecars(tmp_path, basis, settings={"strength": 1.0}, base_model="someone/model", revision="abc")
    report = verify_adapter(tmp_path)
    assert report.ok, report.render()
    assert len(report.layers) == 2 * len(SHAPES)


def test_an_adapter_that_was_never_trained_is_verified(tmp_path):
    basis = honest_folder(tmp_path)
    edit_tensors(tmp_path, WEIGHTS, lambda t: [t.update({k: 0 * v}) for k, v in list(t.items()) if "lora_B" in k])
    write_sidecars(tmp_path, basis, settings={"strength": 1.0}, base_model="someone/model", revision="abc")
    assert verify_adapter(tmp_path).ok


def test_a_text_encoder_counts_under_its_own_name(tmp_path):
    covered = random_basis(["input"])
    encoder = {
        "text_encoder.layer.q_proj.lora_A.weight": torch.ones(4, 6),
        "text_encoder.layer.q_proj.lora_B.weight": torch.ones(6, 4),
    }
    honest_folder(tmp_path / "uncovered", basis=covered, style="unet", extra_tensors=encoder)
    report = verify_adapter(tmp_path / "uncovered")
    assert [(check.name, check.layer) for check in report.failures] == [("coverage", "text_encoder.layer.q_proj")]

    u = torch.zeros(6, 1)
    u[:2, 0] = torch.tensor([1.0, -1.0]) / 2**0.5
    both = ConceptBasis({**covered, "text_encoder.layer.q_proj": LayerBasis(input=u)})
    honest_folder(tmp_path / "covered", basis=covered, published_basis=both, style="unet", extra_tensors=encoder)
    assert verify_adapter(tmp_path / "covered").ok


def test_attention_processors_of_old_name_the_projection_that_they_adapt(tmp_path):
    basis = random_basis(["input"]).restrict(["down.attn.to_q"])
    tensors = honest_tensors(random_basis(["input"]), style="unet")
    a, b = (tensors[f"unet.down.attn.to_q.lora_{part}.weight"] for part in "AB")
    old = {"unet.down.attn.processor.to_q_lora.down.weight": a, "unet.down.attn.processor.to_q_lora.up.weight": b}
    save_file(old, tmp_path / DIFFUSERS_WEIGHTS)
    write_sidecars(tmp_path, basis, settings={"strength": 1.0}, base_model=None)
    assert verify_adapter(tmp_path).ok


@pytest.mark.parametrize(("option", "ok"), [({"unet.r": 4, "unet.lora_alpha": 8}, True), ({"unet.r": 4}, False),
                                            ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_dora": True}, False),
                                            ({"r": 5, "lora_alpha": 8}, False)])  # fmt: skip
def test_the_config_that_diffusers_keeps_in_the_header_is_checked(tmp_path, option, ok):
    honest_folder(tmp_path, style="unet", metadata={"lora_adapter_metadata": json.dumps(option)})
    assert failed(verify_adapter(tmp_path)) == (set() if ok else {"config"})


@pytest.mark.parametrize(("option", "ok"), [({"text_encoder.r": 2, "text_encoder.rank_pattern": {"q": 3}}, True),
                                            ({"text_encoder.r": 3}, False)])  # fmt: skip
def test_the_parts_of_a_pipeline_have_configs_of_their_own(tmp_path, option, ok):
    option = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 8, **option}
    encoder = {
        "text_encoder.q_proj.lora_A.weight": torch.ones(2, 6),
        "text_encoder.q_proj.lora_B.weight": torch.ones(6, 2),
    }
    metadata = {"lora_adapter_metadata": json.dumps(option)}
    honest_folder(tmp_path, style="unet", extra_tensors=encoder, metadata=metadata)
    assert failed(verify_adapter(tmp_path)) == {"coverage", *([] if ok else ["config"])}


def test_a_config_in_a_header_that_is_none_is_refused(tmp_path):
    honest_folder(tmp_path, style="unet", metadata={"lora_adapter_metadata": "[]"})
    with pytest.raises(AdapterFolderError, match="not a JSON object"):
        verify_adapter(tmp_path)


@pytest.mark.parametrize(("limit", "detail"), [("MAX_DIRECTIONS", "rank 4"), ("MAX_ELEMENTS", "entries")])
def test_factors_too_large_to_compute_with_are_not_verified(tmp_path, monkeypatch, limit, detail):
    honest_folder(tmp_path, basis=random_basis(["input"]))
    monkeypatch.setattr(adapter_folder, limit, {"MAX_DIRECTIONS": 3, "MAX_ELEMENTS": 60}[limit])
    report = verify_adapter(tmp_path)
    assert any(check.name == "shapes" and detail in check.detail for check in report.failures)


def test_it_neither_changes_the_folder_nor_needs_to_write_there(tmp_path):
    honest_folder(tmp_path / "adapter")
    before = contents(tmp_path / "adapter")
    (tmp_path / "adapter").chmod(0o555)
    verify_adapter(tmp_path / "adapter")
    (tmp_path / "adapter").chmod(0o755)
    assert contents(tmp_path / "adapter") == before


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path):
    honest_folder(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "commit", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate((tmp_path / "plain").iterdir()):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    assert verify_adapter(snapshot).ok
    # The blobs' folder itself may not be a link to elsewhere.
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterFolderError, match="link out of the folder"):
        verify_adapter(snapshot)


# Tampered folders


@pytest.mark.parametrize("tampering", NOT_VERIFIED, ids=str)
def test_a_tampered_adapter_is_not_verified_for_its_own_reason(tmp_path, tampering: Tampering):
    honest_folder(tmp_path / "adapter")
    tampering.change(tmp_path / "adapter")
    report = verify_adapter(tmp_path / "adapter")
    assert not report.ok
    assert report.exit_status == 1
    assert failed(report) == set(tampering.fails), report.render()
    details = "\n".join(check.detail for check in report.failures)
    assert tampering.reason in details, report.render()


@pytest.mark.parametrize("tampering", REFUSED, ids=str)
def test_what_cannot_be_read_safely_is_refused_for_its_own_reason(tmp_path, monkeypatch, tampering: Tampering):
    honest_folder(tmp_path / "adapter")
    tampering.change(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFolderError) as raised:
        verify_adapter(tmp_path / "adapter")
    assert tampering.reason in str(raised.value), raised.value
    assert len(str(raised.value)) < 1000
    assert not (tmp_path / "pickle-was-opened").exists()


@pytest.mark.parametrize("tampering", TAMPERINGS, ids=str)
def test_a_tampered_adapter_can_be_looked_at_or_is_our_error(tmp_path, monkeypatch, tampering: Tampering):
    honest_folder(tmp_path / "adapter")
    tampering.change(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    look_at(tmp_path / "adapter")
    assert not (tmp_path / "pickle-was-opened").exists()


@pytest.mark.parametrize("harmless", HARMLESS, ids=str)
def test_what_nobody_loads_may_lie_beside(tmp_path, harmless: Tampering):
    honest_folder(tmp_path / "adapter")
    harmless.change(tmp_path / "adapter")
    before, start = peak_memory(), time.process_time()
    report = verify_adapter(tmp_path / "adapter")
    assert report.ok, report.render()
    assert time.process_time() - start < 2
    assert peak_memory() - before < MEMORY
    look_at(tmp_path / "adapter")


def test_a_regular_expression_is_told_of(tmp_path):
    honest_folder(tmp_path)
    assert "regular expressions" not in verify_adapter(tmp_path).render()
    edit_json(tmp_path, CONFIG, lambda config: config.update(target_modules=r".*\.conv"))
    assert any("regular expressions, which are not run here" in note for note in verify_adapter(tmp_path).notes)


def test_a_person_is_shown_no_megabytes(tmp_path):
    honest_folder(tmp_path)
    edit_json(tmp_path, MANIFEST, lambda manifest: manifest.update(uncovered=["x" * 2**20], concept="y" * 2**20))
    assert len(verify_adapter(tmp_path).render()) < 20_000
    stream = io.StringIO()
    Console(file=stream).print(read_basis_or_adapter(tmp_path))
    assert len(stream.getvalue()) < 20_000


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff"])
def test_a_path_that_no_system_takes_does_not_exist(name):
    with pytest.raises(AdapterFolderError, match="does not exist"):
        verify_adapter(name)
    with pytest.raises(AdapterFolderError, match="does not exist"):
        read_basis_or_adapter(name)
    with pytest.raises(ConceptBasisError, match="does not exist"):
        verify_adapter("whatever", basis=name)


@given(size=st.floats(-4.0, 0.0), dtype=st.sampled_from(DTYPES), part=st.sampled_from("AB"))
def test_a_leak_above_the_rounding_of_the_dtype_is_found(tmp_path_factory, size, dtype, part):
    folder = tmp_path_factory.mktemp("leak")
    basis = random_basis()
    tensors = honest_tensors(basis, dtype=torch.float64)
    key = f"base_model.model.down.attn.to_q.lora_{part}.weight"
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(tensors[key].shape, generator=generator, dtype=torch.float64)
    tensors[key] += 10**size * tensors[key].norm() / noise.norm() * noise
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS)
    honest_config = folder.parent / "config-of-leaks"
    if not honest_config.exists():
        honest_folder(honest_config)
    (folder / CONFIG).write_bytes((honest_config / CONFIG).read_bytes())
    write_sidecars(folder, basis, settings={"strength": 1.0}, base_model="someone/model", revision="abc")
    report = verify_adapter(folder)
    leaks = {layer.name: max(layer.leakage.values()) for layer in report.layers}
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert ("leakage" in failed(report)) == (leaks["down.attn.to_q"] > tolerance)
    if 10**size > 10 * tolerance:
        assert failed(report) == {"leakage"}
        assert {check.layer for check in report.failures} == {"down.attn.to_q"}


def test_a_column_of_b_that_does_nothing_does_not_hide_what_is_along_the_rank_basis(tmp_path):
    layers = {name: LayerBasis(rank=torch.eye(4)[:, :1]) for name in SHAPES}
    basis = ConceptBasis(layers, "logo", base_model="someone/model", revision="abc")
    honest_folder(tmp_path, basis=basis)

    def change(tensors):
        a, b = (f"base_model.model.down.attn.to_q.lora_{part}.weight" for part in "AB")
        tensors[a][1:] = 0.0
        tensors[b][:, 0], tensors[b][:, 1:] = 1.0, 1e8

    edit_tensors(tmp_path, WEIGHTS, change)
    write_sidecars(tmp_path, basis, settings={"strength": 1.0}, base_model="someone/model", revision="abc")
    (failure,) = verify_adapter(tmp_path).failures
    assert (failure.name, failure.layer) == ("leakage", "down.attn.to_q")
    assert failure.value == pytest.approx(1.0)


def test_b_along_the_rank_basis_must_be_zero_even_where_a_is(tmp_path):
    basis = random_basis(["rank"])
    honest_folder(tmp_path, basis=basis)
    r = basis["down.conv"].rank

    def change(tensors):
        a, b = (f"base_model.model.down.conv.lora_{part}.weight" for part in "AB")
        tensors[a] = (tensors[a].flatten(1) - r @ (r.T @ tensors[a].flatten(1))).reshape(tensors[a].shape)
        tensors[b][:, :, 0, 0] += 0.01 * torch.ones(8, 2) @ r.T

    edit_tensors(tmp_path, WEIGHTS, change)
    write_sidecars(tmp_path, basis, settings={"strength": 1.0}, base_model="someone/model", revision="abc")
    report = verify_adapter(tmp_path)
    assert [(c.name, c.layer) for c in report.failures] == [("leakage", "down.conv")]


def test_a_gradient_basis_alone_covers_nothing_and_the_report_says_so(tmp_path):
    honest_folder(tmp_path, basis=random_basis(["gradient"]))
    report = verify_adapter(tmp_path)
    assert failed(report) == {"coverage", "leakage"}
    assert any("gradient space" in note for note in report.notes)


# The verifier's own basis, and none at all


def test_without_a_basis_orthogonality_could_not_be_checked_but_integrity_is(tmp_path):
    honest_folder(tmp_path, published_basis=None)
    report = verify_adapter(tmp_path)
    assert (report.status, report.ok, report.exit_status) == ("could not be checked", False, 2)
    assert [check.name for check in report.checks if check.passed is None] == ["leakage"]
    assert all(check.passed for check in report.checks if check.group == "integrity")
    edit_json(tmp_path, CONFIG, lambda config: config.update(r=5))
    assert verify_adapter(tmp_path).exit_status == 1


def test_a_withheld_basis_has_to_be_brought(tmp_path):
    basis = honest_folder(tmp_path / "adapter", publish_basis="digest")
    assert not (tmp_path / "adapter" / BASIS).exists()
    report = verify_adapter(tmp_path / "adapter")
    assert report.exit_status == 2
    assert "withheld" in report.render()
    basis.save(tmp_path / "own.safetensors")
    for own in (basis, tmp_path / "own.safetensors", str(tmp_path / "own.safetensors")):
        report = verify_adapter(tmp_path / "adapter", basis=own)
        assert report.ok, report.render()
        assert "your basis is the one" in report.render()
    report = verify_adapter(tmp_path / "adapter", basis=random_basis(seed=4))
    assert failed(report) == {"leakage against your basis"}
    assert "your basis is not the one" in report.render()


def test_claims_about_a_withheld_basis_are_checked_by_who_has_it(tmp_path):
    basis = honest_folder(tmp_path, publish_basis="digest")
    edit_json(tmp_path, MANIFEST, lambda manifest: manifest["leakage"]["down.conv"].update(input=0.1))
    assert failed(verify_adapter(tmp_path, basis=basis)) == {"claims"}
    assert "claims" not in failed(verify_adapter(tmp_path, basis=random_basis(seed=4)))


def test_a_junk_basis_is_found_by_bringing_ones_own(tmp_path):
    honest_folder(tmp_path, basis=random_basis(seed=7))
    assert verify_adapter(tmp_path).ok
    report = verify_adapter(tmp_path, basis=random_basis(seed=0))
    assert failed(report) == {"leakage against your basis"}
    angles = next(check for check in report.checks if check.name == "principal angles")
    assert angles.value is not None
    assert angles.value < 0.9


def test_another_fit_of_the_concept_passes_with_a_tolerance(tmp_path):
    basis = honest_folder(tmp_path)
    near = ConceptBasis(
        {
            name: LayerBasis(**{s: torch.linalg.qr(u + 1e-3 * torch.randn_like(u))[0] for s, u in layer.items()})
            for name, layer in basis.items()
        }
    )
    assert failed(verify_adapter(tmp_path, basis=near)) == {"leakage against your basis"}
    report = verify_adapter(tmp_path, basis=near, basis_tolerance=0.05)
    assert report.ok, report.render()
    angles = next(check for check in report.checks if check.name == "principal angles")
    assert 0.99 < angles.value < 1.0


def test_own_basis_must_cover_every_layer(tmp_path):
    basis = honest_folder(tmp_path)
    report = verify_adapter(tmp_path, basis=basis.restrict(["down.conv", "down.attn.to_q"]))
    assert [(c.name, c.layer) for c in report.failures] == [("coverage", "down.attn.to_out.0")]


def test_own_basis_of_another_width_measures_nothing_and_passes_nothing(tmp_path):
    basis = honest_folder(tmp_path, publish_basis="digest")
    narrow = ConceptBasis({**basis, "down.conv": LayerBasis(input=torch.eye(9, 2), output=torch.eye(9, 2))})
    report = verify_adapter(tmp_path, basis=narrow)
    assert {(c.name, c.layer) for c in report.failures} == {("your basis", "down.conv")}, report.render()


def test_the_base_model_that_only_the_config_names_is_reported(tmp_path):
    honest_folder(tmp_path, basis=random_basis(base_model=None, revision=None), base_model=None, revision=None)
    check = next(check for check in verify_adapter(tmp_path).checks if check.name == "base model")
    assert "someone/model" in check.detail


@pytest.mark.parametrize(
    ("revisions", "same"),
    [
        (("main", "a" * 40), True),
        (("a" * 40, "v1.0"), True),
        (("main", "main"), True),
        (("a" * 40, "b" * 40), False),
        (("main", "v1.0"), False),
    ],
)
def test_a_branch_is_not_another_revision_than_a_commit(tmp_path, revisions, same):
    """Which commit it stands for is not known here."""
    of_basis, of_training = revisions
    honest_folder(
        tmp_path,
        basis=random_basis(revision=of_basis),
        revision=of_training,
        config={"base_model_name_or_path": "someone/model", "revision": of_training},
    )
    report = verify_adapter(tmp_path)
    assert failed(report) == (set() if same else {"base model"}), report.render()
    (detail,) = (check.detail for check in report.checks if check.name == "base model")
    assert repr(of_basis) in detail
    assert repr(of_training) in detail


def test_small_values_in_half_precision_are_no_denormal_numbers(tmp_path):
    """They are in float16, and not in the float32 in which a processor that takes those for zero computes."""
    honest_folder(tmp_path, dtype=torch.float16)
    edit_tensors(tmp_path, WEIGHTS, lambda t: t.update({k: (b * 1e-3) for k, b in t.items() if "lora_B" in k}))
    assert max(float(b.abs().max()) for k, b in load_file(tmp_path / WEIGHTS).items() if "lora_B" in k) < 6.1e-5
    reseal(tmp_path)
    assert "values" not in failed(verify_adapter(tmp_path))


@pytest.mark.parametrize("path", ["/home/me/base", "./base", "../base", "base/", "a/b/c", "~/base", "C:\\base"])
def test_a_base_model_in_a_folder_is_that_which_the_basis_names(tmp_path, path):
    """It was fitted on the Hub's, and trained on a copy on disk."""
    honest_folder(tmp_path, base_model=path, revision=None, config={"base_model_name_or_path": path, "revision": None})
    report = verify_adapter(tmp_path)
    assert report.ok, report.render()
    (detail,) = (check.detail for check in report.checks if check.name == "base model")
    assert "'someone/model' at 'abc'; not compared" in detail
    assert detail.count(repr(path)) == 2


def test_an_own_basis_that_is_none_is_an_error_of_the_verifier(tmp_path):
    honest_folder(tmp_path / "a")
    other = tmp_path / "b"
    honest_folder(other)
    edit_tensors(other, BASIS, lambda t: t.update({"down.conv.input": torch.zeros(27, 2)}))
    with pytest.raises(ConceptBasisError, match="orthonormal"):
        verify_adapter(tmp_path / "a", basis=other / BASIS)


# The report


def test_the_report_is_json_and_names_the_failing_layer(tmp_path):
    honest_folder(tmp_path)
    edit_tensors(tmp_path, WEIGHTS, lambda t: next(iter(t.values())).view(-1)[:1].fill_(torch.nan))
    report = verify_adapter(tmp_path)
    value = json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert value == report.to_dict()
    assert (value["status"], value["ok"]) == ("not verified", False)
    assert {c["layer"] for c in value["checks"] if c["name"] == "values"} <= set(SHAPES)
    assert "FAIL" in report.render()
    assert "not verified" in report.render()


def test_what_strangers_wrote_cannot_command_the_terminal(tmp_path):
    honest_folder(tmp_path)
    edit_json(tmp_path, MANIFEST, lambda m: m.update(uncovered=["\x1b[2J\rverified [bold]x[/bold]"]))
    text = verify_adapter(tmp_path).render()
    assert "\x1b" not in text
    assert "\r" not in text
    assert r"\x1b[2J\rverified" in text
    assert "[bold]" in text


def test_a_revision_of_a_local_folder_has_no_meaning(tmp_path):
    honest_folder(tmp_path)
    with pytest.raises(AdapterFolderError, match="only the Hub"):
        verify_adapter(tmp_path, revision="main")


def test_a_repository_that_cannot_be_reached_is_our_error():
    with pytest.raises(AdapterFolderError, match="nobody/nothing is neither"):
        verify_adapter("nobody/nothing")


@pytest.mark.parametrize(
    "option", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_a_regular_expression_of_a_stranger_is_not_run_but_told_of(tmp_path, option):
    honest_folder(tmp_path)
    slow = r".*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*!"
    value = {slow: 4} if option in ("rank_pattern", "alpha_pattern") else slow
    edit_json(tmp_path, CONFIG, lambda config: config.update({option: value}))
    reseal(tmp_path)
    start = time.process_time()
    report = verify_adapter(tmp_path)
    assert time.process_time() - start < 2
    assert report.ok
    assert any("regular expressions, which are not run here" in note for note in report.notes)


@pytest.mark.slow
def test_an_adapter_of_the_size_of_stable_diffusion_takes_two_seconds_at_most(tmp_path):
    generator = torch.Generator().manual_seed(0)
    layers, tensors = {}, {}
    for index in range(128):
        name = f"down.{index}.to_q"
        bases = [torch.linalg.qr(torch.randn(768, 16, generator=generator))[0] for _ in range(2)]
        layers[name] = LayerBasis(input=bases[0], output=bases[1])
        a, b = torch.randn(16, 768, generator=generator), torch.randn(768, 16, generator=generator)
        tensors[f"unet.{name}.lora_A.weight"] = a - (a @ bases[0]) @ bases[0].T
        tensors[f"unet.{name}.lora_B.weight"] = b - bases[1] @ (bases[1].T @ b)
    save_file(tensors, tmp_path / DIFFUSERS_WEIGHTS)
    write_sidecars(tmp_path, ConceptBasis(layers), settings={"strength": 1.0}, base_model=None)
    start = time.process_time()
    assert verify_adapter(tmp_path).ok
    assert time.process_time() - start < 2


# Fuzzing


class _Watch:
    """Notes what this process opens, changes and calls while `noted` is a list; an audit hook cannot be removed."""

    CHANGES: ClassVar = {
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
        *("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"),
    }

    def __init__(self) -> None:
        self.noted: list[tuple[str, bool]] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.noted is None:
            return
        if event == "open" and not isinstance(arguments[0], int):
            writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self.noted.append((os.fsdecode(arguments[0]), writes))
        elif event in self.CHANGES:
            self.noted.append((event, True))


watch = _Watch()
CODE = tuple(
    f"{os.path.realpath(root)}{os.sep}" for root in (sys.prefix, sys.base_prefix, Path(adapter_folder.__file__).parent)
)
"""Where modules are imported from, which may happen at any time."""

MEMORY = 256 * 2**20
"""What reading a damaged folder of some kilobytes may take, beyond what this process has had before."""


def peak_memory() -> int:
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report_or_our_error(folder: Path) -> VerificationReport | None:
    """A report that can be shown to programs and people, or none where the folder is refused as it should be.

    Either way nothing outside of the folder is read, nothing is written, and memory stays bounded; and so it is for
    the other readers of the folder.
    """
    before = peak_memory()
    watch.noted = noted = []
    try:
        look_at(folder)
        report = verify_adapter(folder)
    except AdapterFolderError:
        return None
    finally:
        watch.noted = None
        inside = f"{os.path.realpath(folder)}{os.sep}"
        found = [(os.path.realpath(path), writes) for path, writes in noted]
        found = [(path, writes) for path, writes in found if not path.startswith(CODE)]
        assert all(path.startswith(inside) and not writes for path, writes in found), f"opened or changed: {found}"
        assert peak_memory() - before < MEMORY
    json.loads(report.to_json())
    assert report.render()
    for name in (WEIGHTS, BASIS):
        # What we read, the readers of others have to read as well.
        with safe_open(folder / name, "pt") as file:
            assert all(file.get_slice(key).get_shape() for key in file.keys())  # noqa: SIM118
    return report


def look_at(folder: Path) -> None:
    """Let the readers that `gradproj inspect` and resuming use read the folder; they may raise errors of ours only."""
    for path in (folder, folder / BASIS):
        with suppress(GradProjError):
            found = read_basis_or_adapter(path)
            json.dumps(found.to_dict(), allow_nan=False)
            Console(file=io.StringIO(), width=80).print(found)
    with suppress(GradProjError):
        load_settings(str(folder))


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, list[tuple[float, bytes, int]], bool]:
    """A file, some splices in it (where, what is written, how much is removed), and whether digests are renewed."""
    name = draw(st.sampled_from([WEIGHTS, CONFIG, BASIS, MANIFEST]))
    # JSON and the headers are at the start of a file, where most of what can go wrong is.
    place = st.one_of(st.floats(0, 0.05), st.floats(0, 1))
    written = st.one_of(
        st.binary(max_size=4), st.sampled_from([b"-", b"9" * 99, b"[", b"{", b'"', b"null", b"1e999", b"../", b"\\"])
    )
    splices = draw(st.lists(st.tuples(place, written, st.integers(0, 4)), min_size=1, max_size=4))
    return name, splices, draw(st.booleans())


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("honest")
    honest_folder(folder)
    # What is imported on the way opens files that are none of the folder's doing.
    look_at(folder)
    verify_adapter(folder).render()
    return contents(folder)


@settings(max_examples=int(os.environ.get("GRADPROJ_FUZZ_EXAMPLES", "100")))
@given(damaged=damage())
def test_random_damage_gives_a_report_or_our_error(tmp_path_factory, honest, damaged):
    name, splices, sealed = damaged
    folder = _written(tmp_path_factory, honest)
    data = honest[name]
    for place, written, removed in splices:
        position = int(place * len(data))
        data = data[:position] + written + data[position + removed :]
    (folder / name).write_bytes(data)
    if sealed and name != MANIFEST:
        reseal(folder)
    report = report_or_our_error(folder)
    if report is None:
        return
    # What is bound and differs from what was published never passes unless its digest was renewed.
    assert not report.ok or sealed or name == MANIFEST or data == honest[name]


numbers = st.integers(-(10**60), 10**60) | st.floats(allow_nan=False, allow_infinity=False)
any_json = st.recursive(
    st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["LORA", 0, 1, "unet.r"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_value_in_any_place_gives_a_report_or_our_error(tmp_path_factory, honest, data):
    folder = _written(tmp_path_factory, honest)
    name = data.draw(st.sampled_from([CONFIG, MANIFEST]))
    known = st.sampled_from(sorted({*json.loads(honest[name]), "modules_to_save", "loftq_config", "alpha_pattern"}))
    for _ in range(data.draw(st.integers(1, 3))):
        place, value = data.draw(known), data.draw(any_json)
        inner = data.draw(st.sampled_from([None, "id", "published", "strength", "down.conv", "to_q"]))

        def change(content, place=place, value=value, inner=inner):
            at_inner = inner is not None and isinstance(content.get(place), dict)
            content[place] = {**content[place], inner: value} if at_inner else value

        edit_json(folder, name, change)
    if name == CONFIG:
        reseal(folder)
    report_or_our_error(folder)


@given(option=st.dictionaries(st.sampled_from(["unet.r", "unet.lora_alpha", "unet.rank_pattern", "r", ""]), any_json))
def test_any_config_in_a_header_gives_a_report_or_our_error(tmp_path_factory, honest, option):
    folder = _written(tmp_path_factory, honest)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"lora_adapter_metadata": json.dumps(option)})
    reseal(folder)
    assert report_or_our_error(folder) is not None


def _written(tmp_path_factory, files: dict[str, bytes]) -> Path:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_the_lists_know_the_published_names():
    assert {WEIGHTS, DIFFUSERS_WEIGHTS, CONFIG, BASIS} == set(BOUND_FILES)
    assert "gradient" not in CHECKABLE_SPACES
