"""A published basis is fitted anew from its recipe: an honest one is found again, any other is named by its layers."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallNet
from helpers import LAYERS, random_basis, train, trainable
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict
from published_folders import entry, safetensors_bytes
from safetensors.torch import load_file
from tiny_models import UNET_TARGETS, basis_for, tiny_unet, unet_inputs
from tiny_pipelines import PIPELINES, logo, picture
from torch import Tensor, nn

from peft_gradproj import (
    ConceptBasis,
    ContrastBatches,
    GradProjConfig,
    LayerBasis,
    TrainingData,
    fit_concept,
    fit_concept_basis,
    refresh_concept_basis,
    save_adapter,
    verify_adapter,
)
from peft_gradproj.adapter_folder import write_sidecars
from peft_gradproj.cli import main
from peft_gradproj.concepts import Overlay
from peft_gradproj.contrast import FORMAT_VERSION, BatchesDigest
from peft_gradproj.errors import BehaviourError, ConceptBasisError, ConceptDataError
from peft_gradproj.model_arguments import nest_arguments
from peft_gradproj.refit import Recipe, largest_sine
from peft_gradproj.verification import VerificationReport


def pairs(count: int = 4, seed: int = 0) -> ContrastBatches:
    """Pictures with something in one corner, and the same without."""
    generator = torch.Generator().manual_seed(seed)
    concept, reference = [], []
    for _ in range(count):
        x = 0.3 * torch.randn(6, 3, 8, 8, generator=generator)
        corner = torch.zeros_like(x)
        corner[:, :, :4, :4] = 3 * torch.randn(6, 3, 1, 1, generator=generator)
        concept.append({"sample": x + corner})
        reference.append({"sample": x})
    return ContrastBatches(concept, reference)


def fitted(model: nn.Module, batches: ContrastBatches, **options: Any) -> ConceptBasis:
    return fit_concept_basis(
        model,
        batches.concept,
        batches.reference,
        **{"target_modules": list(LAYERS), "rank": 2, "max_reference_overlap": 1, "progress": False, **options},
    )


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet()


def publish(base: nn.Module, basis: ConceptBasis, folder: Path) -> Path:
    """An adapter that is orthogonal to `basis`, whatever that is."""
    model = get_peft_model(base, GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis))
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 2)
    save_adapter(model, folder)
    model.unload()
    return folder


def with_layers(basis: ConceptBasis, **layers: LayerBasis) -> ConceptBasis:
    """Other directions in some layers, under the same recipe."""
    return basis.with_layers({**basis, **layers})


def with_notes(basis: ConceptBasis, **notes: Any) -> ConceptBasis:
    return ConceptBasis(basis, basis.concept, fit={**(basis.fit or {}), **notes})


def of_refit(report: VerificationReport) -> list[tuple[bool | None, str | None]]:
    return [(check.passed, check.layer) for check in report.checks if check.name == "refit"]


def refit_details(report: VerificationReport) -> str:
    return "; ".join(check.detail for check in report.checks if check.name == "refit")


# Found again, or not


@pytest.mark.parametrize(
    "options",
    [{}, {"contrast": "generalized", "threshold": 1.0}, {"rank": None, "energy": 0.8, "unfit": "skip"}],
    ids=["pairs", "generalized", "by energy"],
)
def test_an_honest_basis_is_found_again_and_the_model_is_left_as_it_was(base, tmp_path, options):
    basis = fitted(base, pairs(), max_positions=20, **options)
    folder = publish(base, basis, tmp_path / "out")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    file = pairs().save(tmp_path / "contrast.safetensors")
    report = verify_adapter(folder, base_model=base, refit=file)
    assert report.ok, report.render()
    (check,) = (check for check in report.checks if check.name == "refit")
    assert check.value < 1e-4
    assert any("is for you to see" in note for note in report.notes)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_junk_under_an_honest_recipe_passes_all_but_the_refit_which_names_the_layer(base, tmp_path):
    basis = fitted(base, pairs())
    junk = LayerBasis(input=random_basis(8, 2, seed=3), output=basis["query"].output)
    folder = publish(base, with_layers(basis, query=junk), tmp_path / "out")
    assert verify_adapter(folder).ok
    report = verify_adapter(folder, base_model=base, refit=pairs())
    assert [(check.name, check.layer) for check in report.failures] == [("refit", "query")]
    assert "the published input basis is another" in refit_details(report)
    assert verify_adapter(folder, base_model=base, refit=pairs(), refit_tolerance=1.0).ok


def test_what_was_dropped_or_added_is_named(base, tmp_path):
    basis = fitted(base, pairs())
    changed = {
        "query": LayerBasis(output=basis["query"].output),
        "key": LayerBasis(input=basis["key"].input[:, :1], output=basis["key"].output),
    }
    folder = publish(base, with_layers(basis, **changed), tmp_path / "out")
    report = verify_adapter(folder, base_model=base, refit=pairs())
    assert of_refit(report) == [(False, "key"), (False, "query")]
    assert "has shape (8, 1), the recipe gives (8, 2)" in refit_details(report)
    assert "is published without the input basis" in refit_details(report)
    only_input = publish(base, with_notes(basis, spaces=["input"]), tmp_path / "more")
    report = verify_adapter(only_input, base_model=base, refit=pairs())
    assert {layer for _, layer in of_refit(report)} == set(LAYERS)
    assert "has a published output basis, and the recipe gives none" in refit_details(report)


def test_a_basis_of_training_beside_what_is_found_again_is_not_checked_and_hides_nothing(base, tmp_path):
    basis = fitted(base, pairs())
    model = get_peft_model(base, GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, 2)
    gradients = fitted(
        model, pairs(), spaces=("gradient",), loss_fn=lambda output, _: output.square().mean(), unfit="skip"
    )
    refresh_concept_basis(model, gradients)
    train(model, optimizer, 2)
    save_adapter(model, tmp_path / "out")
    model.unload()
    assert verify_adapter(tmp_path / "out").ok
    report = verify_adapter(tmp_path / "out", base_model=base, refit=pairs())
    assert report.status == "could not be checked", report.render()
    assert of_refit(report) == [(True, None), (None, None)]
    assert all(f"{name}.gradient" in refit_details(report) for name in gradients)

    junk = LayerBasis(input=random_basis(8, 2, seed=3), output=basis["query"].output, rank=random_basis(4, 1))
    report = verify_adapter(
        publish(base, with_layers(basis, query=junk), tmp_path / "junk"), base_model=base, refit=pairs()
    )
    assert report.status == "not verified"
    assert of_refit(report) == [(False, "query"), (None, None)]


def test_layers_that_are_not_adapted_may_be_left_out(base, tmp_path):
    part = fitted(base, pairs()).restrict(["query", "key"])
    model = get_peft_model(base, GradProjConfig(r=4, target_modules=["query", "key"], concept_basis=part))
    save_adapter(model, tmp_path / "out")
    report = verify_adapter(tmp_path / "out", base_model=model.unload(), refit=pairs())
    assert report.ok, report.render()


def test_other_batches_are_refused_by_their_digest(base, tmp_path):
    folder = publish(base, fitted(base, pairs()), tmp_path / "out")
    report = verify_adapter(folder, base_model=base, refit=pairs(seed=1))
    assert of_refit(report) == [(False, None)]
    assert "the recipe names" in refit_details(report)


def test_without_a_digest_the_directions_decide(base, tmp_path):
    basis = with_notes(fitted(base, pairs()), concept_set=None)
    folder = publish(base, basis, tmp_path / "out")
    report = verify_adapter(folder, base_model=base, refit=pairs())
    assert report.ok, report.render()
    assert "names no digest" in refit_details(report)
    assert not verify_adapter(folder, base_model=base, refit=pairs(seed=1)).ok


def test_another_base_model_gives_another_basis(base, tmp_path):
    folder = publish(base, fitted(base, pairs()), tmp_path / "out")
    torch.manual_seed(1)
    report = verify_adapter(folder, base_model=SmallNet(), refit=pairs())
    assert "query" in {layer for passed, layer in of_refit(report) if passed is False}


def test_batches_that_the_model_does_not_take_are_an_error_and_no_answer(base, tmp_path):
    basis = with_notes(fitted(base, pairs()), concept_set=None)
    folder = publish(base, basis, tmp_path / "out")
    other = ContrastBatches([{"pixels": batch["sample"]} for batch in pairs().concept])
    for halves in ((other.concept, other.concept), ([{"sample": torch.ones(2, 7)}],) * 2):
        with pytest.raises(BehaviourError, match="cannot be run on the contrast batches"):
            verify_adapter(folder, base_model=base, refit=ContrastBatches(*halves))


def test_a_call_by_code_of_the_publishers_is_told(base, tmp_path):
    basis = fitted(base, pairs(), run_model=lambda model, batch: model(batch["sample"] * 1e-3))
    report = verify_adapter(publish(base, basis, tmp_path / "out"), base_model=base, refit=pairs())
    assert False in {passed for passed, _ in of_refit(report)}
    assert "by code of his own" in refit_details(report)


def test_other_rounding_is_allowed_for_and_half_precision_is_told(base, tmp_path):
    halves = [
        [{"sample": batch["sample"].bfloat16()} for batch in half] for half in (pairs().concept, pairs().reference)
    ]
    batches = ContrastBatches(*halves)
    folder = publish(base, fitted(copy.deepcopy(base).bfloat16(), batches), tmp_path / "out")
    assert verify_adapter(folder, base_model=base, refit=batches).ok
    report = verify_adapter(folder, base_model=base, refit=batches, refit_tolerance=1e-5)
    assert "it was fitted in bfloat16" in refit_details(report)


# What cannot be done


UNFITTABLE: dict[str, tuple[dict[str, Any] | None, str]] = {
    "no notes": (None, "does not say how"),
    "a union": ({"method": "union"}, "a union"),
    "the rank space": ({"spaces": ["input", "rank"]}, "the rank and gradient spaces"),
    "no spaces": ({"spaces": "input"}, "spaces is 'input'"),
    "a huge rank": ({"rank": 10**9}, "rank is 1000000000"),
    "a rank that is none": ({"rank": True}, "rank is True"),
    "a huge number of positions": ({"max_positions": 10**12}, "max_positions is"),
    "a seed that is none": ({"seed": "0"}, "seed is '0'"),
    "no layers": ({"layers": {}, "left_out": [], "derived": 3}, "names 0 layers"),
    "ten thousand layers": ({"layers": {str(i): {} for i in range(10_001)}}, "names 10,00"),
    "ten thousand partners": ({"derived": {"key": "query.output", **{str(i): i for i in range(10_001)}}}, "names 10,0"),
}


@pytest.mark.parametrize("name", UNFITTABLE)
def test_a_recipe_that_cannot_be_followed_is_told(base, name):
    notes, reason = UNFITTABLE[name]
    basis = fitted(base, pairs())
    changed = ConceptBasis(basis) if notes is None else with_notes(basis, **notes)
    with pytest.raises(ConceptBasisError, match=reason):
        Recipe.of(changed.fit)


def test_what_could_not_be_fitted_anew_is_not_verified(base, tmp_path):
    basis = fitted(base, pairs())
    folder = publish(base, with_notes(basis, method="union"), tmp_path / "out")
    report = verify_adapter(folder, base_model=base, refit=pairs())
    assert report.status == "could not be checked"
    assert of_refit(report) == [(None, None)]
    (folder / "concept_basis.safetensors").unlink()
    write_sidecars(folder, basis, settings={"strength": 1.0}, base_model=None, publish_basis="digest")
    report = verify_adapter(folder, base_model=base, refit=pairs())
    assert "it was withheld" in refit_details(report)


@pytest.mark.parametrize(
    "notes", [{"method": "magic"}, {"epsilon": -1}, {"rank": 0}, {"layers": {"nowhere": {}}, "left_out": {}}]
)
def test_a_recipe_that_gives_nothing_fails(base, tmp_path, notes):
    folder = publish(base, with_notes(fitted(base, pairs()), **notes), tmp_path / "out")
    report = verify_adapter(folder, base_model=base, refit=pairs())
    assert of_refit(report) == [(False, None)]
    assert "the recipe gives no basis" in refit_details(report)


def test_regular_expressions_of_strangers_are_not_run(base, tmp_path):
    basis = with_notes(fitted(base, pairs()), target_modules="(.*.*.*.*.*.*.*.*)*!")
    report = verify_adapter(publish(base, basis, tmp_path / "out"), base_model=base, refit=pairs())
    assert report.ok, report.render()


def test_a_refit_needs_a_base_model_and_a_base_model_a_reason(base, tmp_path):
    for alone in ({"refit": pairs()}, {"base_model": base}):
        with pytest.raises(BehaviourError, match="give both, or neither"):
            verify_adapter(tmp_path, **alone)


# The file


def test_batches_are_the_same_after_saving_and_have_the_digest_that_the_fit_notes(base, tmp_path):
    batches = pairs()
    loaded = ContrastBatches.load(batches.save(tmp_path / "contrast.safetensors"))
    assert (len(loaded.concept), len(loaded.reference)) == (4, 4)
    assert torch.equal(loaded.concept[3]["sample"], batches.concept[3]["sample"])
    noted = fitted(base, batches, source="user/contrast@abc").fit["concept_set"]
    assert noted == {"sha256": loaded.digest(), "source": "user/contrast@abc"}
    generalized = fitted(base, batches, contrast="generalized", threshold=1.0).fit["concept_set"]
    assert generalized["sha256"] == loaded.digest()


def test_nested_arguments_shared_tensors_and_any_dtype_survive(tmp_path):
    shared, half = torch.tensor(7), torch.randn(2, 3).bfloat16()
    batch = {"timestep": shared, "added": {"text": half, "absent": None}, "mask": torch.tensor([True, False])}
    batches = ContrastBatches([batch], [batch])
    loaded = ContrastBatches.load(batches.save(tmp_path / "contrast.safetensors"))
    assert loaded.digest() == batches.digest()
    back = nest_arguments(loaded.reference[0])
    assert back["added"].keys() == {"text"}
    assert torch.equal(back["added"]["text"], half)
    assert torch.equal(back["timestep"], shared)


@pytest.mark.parametrize(
    "change",
    [
        lambda c, r: (c[1:], r),
        lambda c, r: (c, r[:-1]),
        lambda c, r: (r, c),
        lambda c, r: (c[::-1], r),
        lambda c, r: ([{"other": batch["sample"]} for batch in c], r),
        lambda c, r: ([{"sample": batch["sample"].double()} for batch in c], r),
        lambda c, r: ([{"sample": batch["sample"].transpose(2, 3)} for batch in c], r),
    ],
)
def test_any_difference_shows_in_the_digest(change):
    batches = pairs()
    assert ContrastBatches(*change(batches.concept, batches.reference)).digest() != batches.digest()


def test_batches_of_other_things_have_no_digest_and_no_file():
    digest = BatchesDigest()
    digest.add("concept", {"sample": torch.ones(1)})
    digest.add("concept", {"prompt": "a logo"})
    assert digest.hexdigest() is None
    for batch in ({"prompt": "a logo"}, [torch.ones(1)]):
        with pytest.raises(ConceptDataError, match="expected a"):
            ContrastBatches([batch])


HEADER = {"__metadata__": {"format_version": FORMAT_VERSION}}
MALFORMED = {
    "a pickle": (b"\x80\x04}.", "pickle|cut short"),
    "no version": (safetensors_bytes({"concept.0.x": entry()}, b"1234"), "format version None"),
    "another version": (safetensors_bytes({"__metadata__": {"format_version": "9"}}), "format version '9'"),
    "no batches": (safetensors_bytes(HEADER), "no concept batches"),
    "a gap": (safetensors_bytes({**HEADER, "concept.1.x": entry()}, b"1234"), "not numbered 0, 1, 2"),
    "another half": (safetensors_bytes({**HEADER, "plain.0.x": entry()}, b"1234"), "holds 'plain.0.x'"),
    "a name that is none": (safetensors_bytes({**HEADER, "concept.0.x.": entry()}, b"1234"), "holds 'concept.0.x.'"),
    "a number of no end": (safetensors_bytes({**HEADER, f"concept.{'9' * 99}.x": entry()}, b"1234"), "holds 'concept"),
    "a number in other digits": (safetensors_bytes({**HEADER, "concept.0٣.x": entry()}, b"1234"), "holds 'concept"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(tmp_path, name):
    data, reason = MALFORMED[name]
    (tmp_path / "contrast.safetensors").write_bytes(data)
    with pytest.raises(ConceptDataError, match=reason):
        ContrastBatches.load(tmp_path / "contrast.safetensors")


def test_an_argument_cannot_be_a_tensor_and_a_mapping():
    for names in (("a", "a.b"), ("a.b", "a"), ("a.b", "a.b.c")):
        with pytest.raises(ConceptDataError, match="at once"):
            nest_arguments({name: torch.ones(1) for name in names})


@given(position=st.integers(0), byte=st.integers(0, 255))
def test_any_byte_may_be_another(tmp_path, position, byte):
    file = tmp_path / "contrast.safetensors"
    data = bytearray(pairs(1).save(file).read_bytes())
    # Most of the file is pictures, in which every value is as good as any other.
    data[position % 400] = byte
    file.write_bytes(data)
    with suppress(ConceptDataError):
        assert len(ContrastBatches.load(file).concept) == 1


def test_the_sine_is_that_of_the_angle():
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    for angle in (0.0, 1e-6, 0.3, torch.pi / 2):
        turned: Tensor = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        turned[:, 1] = torch.tensor([0.0, angle, 0.0]).cos() * torch.tensor([0.0, 1.0, 0.0])
        turned[2, 1] = torch.tensor(angle, dtype=torch.float64).sin()
        turned[1, 1] = torch.tensor(angle, dtype=torch.float64).cos()
        assert largest_sine(u, turned) == pytest.approx(float(torch.tensor(angle, dtype=torch.float64).sin()), abs=1e-9)


# What `gradproj fit` makes


@pytest.fixture(scope="module")
def fit_of_a_pipeline(tmp_path_factory) -> tuple[ConceptBasis, ContrastBatches]:
    data = TrainingData([picture(seed) for seed in range(4)], ["a house", "a tree", "a dog", "two cats"])
    options = {"num_pairs": 8, "num_probes": 2, "rank": 2, "batch_size": 4, "progress": False, "save_contrast": True}
    folder = tmp_path_factory.mktemp("fit")
    basis, _, made = fit_concept(PIPELINES["sd"](), Overlay(logo()), data, output_dir=folder, **options)
    return basis, ContrastBatches.load(made.files["contrast"])


def sd_unet() -> Any:
    """The UNet that the pipeline of that fit had."""
    return PIPELINES["sd"]().unet


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_basis_of_a_pipeline_is_found_again_with_the_layers_that_have_it_of_a_partner(tmp_path, kind):
    pipeline = PIPELINES[kind]()
    data = TrainingData([picture(seed) for seed in range(4)], ["a house", "a tree", "a dog", "two cats"])
    options = {"num_pairs": 8, "num_probes": 2, "rank": 2, "batch_size": 4, "progress": False}
    with pytest.raises(ConceptDataError, match="needs output_dir"):
        fit_concept(pipeline, Overlay(logo()), data, save_contrast=True, **options)
    basis, _, made = fit_concept(
        pipeline, Overlay(logo()), data, output_dir=tmp_path / "fit", save_contrast=True, **options
    )
    assert made.derived
    unet = pipeline.unet
    unet.add_adapter(GradProjConfig(r=4, target_modules=made.target_modules, concept_basis=basis))
    save_adapter(unet, tmp_path / "out")
    unet.unload_lora()
    report = verify_adapter(tmp_path / "out", base_model=unet, refit=made.files["contrast"])
    assert report.ok, report.render()


def test_the_recipe_of_a_pipeline_can_be_followed_without_code_of_the_publishers(fit_of_a_pipeline):
    assert Recipe.of(fit_of_a_pipeline[0].fit).caveats == ""


def test_layers_that_have_their_basis_of_a_partner_may_be_published_without_it(fit_of_a_pipeline, tmp_path):
    basis, contrast = fit_of_a_pipeline
    kept = [name for name in basis if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert set(kept) == set((basis.fit or {})["derived"])
    unet = sd_unet()
    config = GradProjConfig(r=4, target_modules=["attn2.to_k", "attn2.to_v"], concept_basis=basis.restrict(kept))
    unet.add_adapter(config)
    save_adapter(unet, tmp_path / "out")
    report = verify_adapter(tmp_path / "out", base_model=sd_unet(), refit=contrast)
    assert report.ok, report.render()


def test_layers_of_a_text_encoder_beside_the_unet_are_not_checked(fit_of_a_pipeline, tmp_path):
    fit, contrast = fit_of_a_pipeline
    pipeline = PIPELINES["sd"]()
    unet, encoder = pipeline.unet, pipeline.text_encoder
    words = basis_for(encoder, ["q_proj"])
    named = {f"text_encoder.{name}": layer for name, layer in words.items()}
    encoder.add_adapter(GradProjConfig(r=4, target_modules=["q_proj"], concept_basis=words))
    weights = {"text_encoder_lora_layers": get_peft_model_state_dict(encoder)}

    def publish_with(basis: ConceptBasis, folder: Path) -> VerificationReport:
        type(pipeline).save_lora_weights(folder, **weights)
        write_sidecars(folder, basis, settings={"strength": 1.0}, base_model=None)
        assert verify_adapter(folder).ok
        return verify_adapter(folder, base_model=sd_unet(), refit=contrast)

    report = publish_with(fit.with_layers(named), tmp_path / "words alone")
    assert report.status == "could not be checked", report.render()
    assert of_refit(report) == [(None, None)]
    assert "the base model has no such layers: text_encoder." in refit_details(report)

    unet.add_adapter(GradProjConfig(r=4, target_modules=UNET_TARGETS, concept_basis=fit))
    weights["unet_lora_layers"] = get_peft_model_state_dict(unet)
    report = publish_with(fit.with_layers({**fit, **named}), tmp_path / "both")
    assert report.status == "could not be checked", report.render()
    assert of_refit(report) == [(True, None), (None, None)]


# The command line


def test_the_command_fits_a_unet_from_files(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "unet")
    halves = [[{**unet_inputs(4, seed), "sample": unet_inputs(4, seed + shift)["sample"]} for seed in range(3)]
              for shift in (50, 0)]  # fmt: skip
    batches = ContrastBatches(*halves)
    file = batches.save(tmp_path / "contrast.safetensors")
    basis = fitted(unet, batches, target_modules=UNET_TARGETS, unfit="skip")
    unet.add_adapter(GradProjConfig(r=2, target_modules=UNET_TARGETS, concept_basis=basis, uncovered="ignore"))
    save_adapter(unet, tmp_path / "out")
    arguments = ["verify", str(tmp_path / "out"), "--refit", str(file), "--json"]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gradproj", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    _, out = run("--base-model", str(tmp_path / "unet"))
    found = [check for check in json.loads(out)["checks"] if check["name"] == "refit"]
    assert [check["passed"] for check in found] == [True], found
    assert set(load_file(file)) == {
        f"{half}.{index}.{name}" for half in ("concept", "reference") for index in range(3) for name in unet_inputs()
    }
    assert run()[0] == 2
