"""Behaviour: drift on concept probes against a reference set, measured on what stock loaders make of the files."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from conftest import SmallNet
from helpers import LAYERS, small_net_basis, train, trainable
from peft import LoraConfig, get_peft_model
from published_folders import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS, adapter_config, edit_json, edit_tensors, reseal
from safetensors.torch import load_file, save_file
from tiny_models import UNET_TARGETS, basis_for, tiny_llama, tiny_unet, unet_inputs
from torch import nn

from peft_gradproj import (
    ConceptBasis,
    ConceptProbes,
    GradProjConfig,
    LayerBasis,
    collect_concept_probes,
    push_adapter_to_hub,
    save_adapter,
    verify_adapter,
)
from peft_gradproj.adapter_folder import write_sidecars
from peft_gradproj.behaviour import load_base_model, loaded_adapter
from peft_gradproj.errors import BehaviourError

# A planted concept: pictures that are bright in one corner. The network sees it in its first layer.


def pictures(n: int = 8, *, concept: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    x = 0.3 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    if concept:
        x[:, :, :4, :4] += 3.0
    return {"sample": x}


@pytest.fixture
def base():
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture
def sets(base):
    """Concept probes and a reference set."""
    return [collect_concept_probes(base, [(pictures(concept=concept), None)]) for concept in (True, False)]


def publish(base: nn.Module, folder, **config):
    model = get_peft_model(
        base, GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=small_net_basis(), **config)
    )
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 5)
    save_adapter(model, folder)
    model.unload()
    return folder


def behaviour(report) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks if check.group == "behaviour"}


def expected_drift(base, folder, inputs) -> float:
    """By PEFT alone."""
    from peft import PeftModel

    with torch.no_grad():
        before = base.eval()(**inputs)
        adapted = PeftModel.from_pretrained(base, folder)
        after = adapted.eval()(**inputs)
        adapted.unload()
    return float((after - before).square().mean())


def test_the_drift_is_that_of_peft_and_the_model_is_left_as_it_was(base, sets, tmp_path):
    publish(base, tmp_path / "out")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    next(base.children()).eval()
    flags = [parameter.requires_grad for parameter in base.parameters()]
    modes = [module.training for module in base.modules()]
    assert len(set(modes)) == 2
    report = verify_adapter(tmp_path / "out", base_model=base, probes=sets[0], reference=sets[1], batch_size=3)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in base.parameters()]
    assert modes == [module.training for module in base.modules()]
    figures = report.behaviour
    expected = [expected_drift(base, tmp_path / "out", pictures(concept=concept)) for concept in (True, False)]
    assert figures.drift == pytest.approx(expected[0], rel=1e-4)
    assert figures.reference_drift == pytest.approx(expected[1], rel=1e-4)
    assert figures.drift > 0
    assert json.loads(report.to_json())["behaviour"]["drift"] == figures.drift


def test_the_threshold_decides(base, sets, tmp_path):
    publish(base, tmp_path / "out")
    given = {"base_model": base, "probes": sets[0], "reference": sets[1]}
    ratio = verify_adapter(tmp_path / "out", **given).behaviour.ratio
    for tolerance, passed in ((1.01 * ratio, True), (0.99 * ratio, False)):
        report = verify_adapter(tmp_path / "out", **given, drift_tolerance=tolerance)
        assert behaviour(report) == {"loaded": True, "drift": passed}
        assert report.ok == passed


def test_only_the_weighted_outputs_count(base, sets, tmp_path):
    publish(base, tmp_path / "out")
    weights = torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0]])
    probes = ConceptProbes(sets[0].inputs, sets[0].targets, weights)
    figures = verify_adapter(tmp_path / "out", base_model=base, probes=probes, batch_size=3).behaviour
    with loaded_adapter_of(tmp_path / "out", base), torch.no_grad():
        moved = base.eval()(**pictures(concept=True)) - sets[0].targets
    assert figures.drift == pytest.approx(float(moved[:, 2].square().mean()), rel=1e-4)


def loaded_adapter_of(folder, base):
    from peft_gradproj.adapter_folder import read_adapter_folder

    read = read_adapter_folder(folder)
    return loaded_adapter(read, read.layers()[WEIGHTS].pairs, base)


def test_without_a_reference_set_the_drift_is_told_and_not_judged(base, sets, tmp_path):
    publish(base, tmp_path / "out")
    report = verify_adapter(tmp_path / "out", base_model=base, probes=sets[0])
    assert behaviour(report) == {"loaded": True, "drift": None}
    assert (report.exit_status, report.behaviour.ratio) == (2, None)


def test_an_adapter_that_does_nothing_drifts_nowhere(base, sets, tmp_path):
    model = get_peft_model(base, GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=small_net_basis()))
    save_adapter(model, tmp_path / "out")
    model.unload()
    report = verify_adapter(tmp_path / "out", base_model=base, probes=sets[0], reference=sets[1])
    assert report.ok
    assert report.behaviour.ratio == 0


def test_probes_of_another_base_model_are_not_measured_with(base, sets, tmp_path):
    publish(base, tmp_path / "out")
    torch.manual_seed(1)
    report = verify_adapter(tmp_path / "out", base_model=SmallNet(), probes=sets[0], reference=sets[1])
    assert behaviour(report)["drift"] is None
    assert "another base model" in report.render()


def test_what_fails_integrity_is_not_loaded(base, sets, tmp_path, monkeypatch):
    publish(base, tmp_path / "out")
    edit_tensors(tmp_path / "out", WEIGHTS, lambda t: t.update({k: 2 * v for k, v in t.items()}))
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *a, **o: pytest.fail("it was loaded"))
    report = verify_adapter(tmp_path / "out", base_model=base, probes=sets[0])
    assert behaviour(report) == {"drift": None}
    assert report.exit_status == 1


def test_a_layer_that_loaders_pass_over_is_named(base, sets, tmp_path):
    """The config targets fewer layers than the file holds; PEFT loads only those."""
    publish(base, tmp_path / "out")
    edit_json(tmp_path / "out", CONFIG, lambda config: config.update(target_modules=["conv", "query", "key"]))
    reseal(tmp_path / "out")
    report = verify_adapter(tmp_path / "out", base_model=base, probes=sets[0], reference=sets[1])
    assert [(check.name, check.detail[:4]) for check in report.failures if check.name == "loaded"] == [
        ("loaded", "head")
    ]


def test_a_layer_that_loaders_add_is_named(base, sets, tmp_path):
    model = get_peft_model(
        base, GradProjConfig(r=4, target_modules=["query"], concept_basis=small_net_basis(layers=["query"]))
    )
    save_adapter(model, tmp_path / "out")
    model.unload()
    edit_json(tmp_path / "out", CONFIG, lambda config: config.update(target_modules=["query", "key"]))
    reseal(tmp_path / "out")
    report = verify_adapter(tmp_path / "out", base_model=base, probes=sets[0], reference=sets[1])
    assert [check.detail for check in report.failures] == ["key gets an adapter that is not in the file"]


def test_patterns_of_strangers_are_not_run(base, sets, tmp_path):
    publish(base, tmp_path / "out")
    edit_json(tmp_path / "out", CONFIG, lambda config: config.update(alpha_pattern={".*.*.*.*.*.*.*.*!": 4}))
    reseal(tmp_path / "out")
    with pytest.raises(BehaviourError, match="alpha_pattern of the adapter holds a regular expression"):
        verify_adapter(tmp_path / "out", base_model=base, probes=sets[0])


class Stack(nn.Module):
    """Layers that are numbered, and one beside them of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(6, 6)}) for _ in "ab")})
        self.last = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for block in (*self.body["layers"], self.last):
            sample = sample + block["proj"](sample)
        return sample


def checked_once_saved(base: nn.Module, folder, inputs: str, **config):
    """The report on an adapter of linear layers of width 6, filled and saved; the model calls its argument `inputs`."""
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    basis = ConceptBasis({name: LayerBasis(input=torch.eye(6, 1)) for name in layers})
    model = get_peft_model(base, GradProjConfig(r=2, concept_basis=basis, **config))
    for parameter in trainable(model):
        nn.init.normal_(parameter)
    save_adapter(model, folder)
    model.unload()
    probes = ConceptProbes({inputs: torch.randn(4, 6)})
    return verify_adapter(folder, base_model=base, probes=probes, reference=probes, drift_tolerance=1.1)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": ["last.proj"]},
        {"exclude_modules": "last.*"},
        {"layers_to_transform": [0], "layers_pattern": ["lay.*"]},
    ],
    ids=str,
)
def test_layers_that_the_config_leaves_out_are_not_missed(tmp_path, choice):
    torch.manual_seed(0)
    report = checked_once_saved(Stack(), tmp_path, "sample", target_modules=["proj"], **choice)
    assert report.ok, report.render()


def test_a_pattern_of_layers_is_not_run_either(tmp_path):
    base = Stack()
    choice = {"layers_to_transform": [1], "layers_pattern": ["layers"]}
    checked_once_saved(base, tmp_path, "sample", target_modules=["proj"], **choice)
    # Whoever ran it would raise an error.
    edit_json(tmp_path, CONFIG, lambda config: config.update(layers_pattern=["("]))
    reseal(tmp_path)
    probes = ConceptProbes({"sample": torch.randn(4, 6)})
    report = verify_adapter(tmp_path, base_model=base, probes=probes, reference=probes, drift_tolerance=1.1)
    assert behaviour(report) == {"loaded": True, "drift": True}, report.render()


def unet_adapter(folder, metadata: dict[str, object] | None = None):
    """A UNet, and an adapter of it in diffusers' layout that does something, with the basis that it keeps off."""
    unet = tiny_unet()
    basis = basis_for(unet, ["to_q"], 2)
    unet.add_adapter(GradProjConfig(r=2, target_modules=["to_q"], concept_basis=basis))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(unet, folder)
    unet.unload_lora()
    if metadata is not None:
        text = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 2, **metadata})}
        save_file(load_file(folder / DIFFUSERS_WEIGHTS), folder / DIFFUSERS_WEIGHTS, text)
        reseal(folder)
    return unet, basis


def test_patterns_that_diffusers_would_run_are_not_run_either(tmp_path):
    unet, _ = unet_adapter(tmp_path, {"target_modules": ".*.*.*.*.*.*.*.*!"})
    probes = collect_concept_probes(unet, [(unet_inputs(2), None)])
    with pytest.raises(BehaviourError, match="target_modules of the adapter holds a regular expression"):
        verify_adapter(tmp_path, base_model=unet, probes=probes)


def test_both_layouts_are_measured_since_either_may_be_loaded(tmp_path):
    unet, basis = unet_adapter(tmp_path)
    loud = load_file(tmp_path / DIFFUSERS_WEIGHTS)
    quiet = {f"base_model.model.{key}": tensor * ("lora_A" in key) for key, tensor in loud.items()}
    save_file(quiet, tmp_path / WEIGHTS)
    config = adapter_config(r=2, lora_alpha=2, target_modules=["to_q"], base_model_name_or_path=None, revision=None)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    write_sidecars(tmp_path, basis, settings={"strength": 1.0}, base_model=None)
    probes = collect_concept_probes(unet, [(unet_inputs(2), None)])
    report = verify_adapter(tmp_path, base_model=unet, probes=probes, reference=probes)
    drifts = [check for check in report.checks if check.name == "drift"]
    assert [check.passed for check in drifts] == [True, False], report.render()
    assert [check.detail.split(":")[0] for check in drifts] == [WEIGHTS, DIFFUSERS_WEIGHTS]
    assert report.behaviour.drift > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": None}, "needs a base model and concept probes"),
        ({"base_model": None}, "needs a base model and concept probes"),
        ({"base_model": nn.Linear(2, 2)}, "cannot be loaded onto|cannot be run"),
        ({"probes": ConceptProbes({"sample": torch.randn(2, 5, 8, 8)})}, "cannot be run on the probes"),
        ({"base_model": "/nowhere/at/all"}, "cannot be loaded|no base model"),
    ],
)
def test_what_does_not_fit_is_our_error(base, sets, tmp_path, changes, message):
    publish(base, tmp_path / "out")
    with pytest.raises(BehaviourError, match=message):
        verify_adapter(tmp_path / "out", **{"base_model": base, "probes": sets[0], **changes})


def test_a_base_model_with_adapters_is_refused(base, sets, tmp_path):
    publish(base, tmp_path / "out")
    get_peft_model(base, LoraConfig(target_modules=["key"]))
    with pytest.raises(BehaviourError, match="carries adapters already"):
        verify_adapter(tmp_path / "out", base_model=base, probes=sets[0])


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers_layout_from_the_folder_of_a_pipeline_on_the_command_line(tmp_path, variant):
    from typer.testing import CliRunner

    from peft_gradproj.cli import app

    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "base" / "unet", variant=variant)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    probes, reference = (collect_concept_probes(unet, [(unet_inputs(2, seed), None)]) for seed in (0, 1))
    probes.save(tmp_path / "probes.safetensors")
    reference.save(tmp_path / "reference.safetensors")
    basis = basis_for(unet, UNET_TARGETS, 2)
    unet.add_adapter(GradProjConfig(r=2, target_modules=UNET_TARGETS, concept_basis=basis))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(unet, tmp_path / "out")
    options = ["--behaviour", "--base-model", tmp_path / "base", "--probes", tmp_path / "probes.safetensors"]
    options += ["--reference", tmp_path / "reference.safetensors", "--drift-tolerance", "100", "--json"]
    options += ["--variant", variant] if variant else []
    run = CliRunner().invoke(app, [str(word) for word in ("verify", tmp_path / "out", *options)])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["behaviour"]["reference_drift"] > 0
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--behaviour"]).exit_code == 2


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_language_model_from_its_folder(tmp_path, variant):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path / "base", variant=variant)
    tokens = {"input_ids": torch.randint(0, 32, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    probes = ConceptProbes(tokens)
    targets = ["q_proj", "v_proj"]
    model = get_peft_model(
        llama,
        GradProjConfig(r=4, target_modules=targets, concept_basis=basis_for(llama, targets), task_type="CAUSAL_LM"),
    )
    save_adapter(model, tmp_path / "out")
    given = {"base_model": tmp_path / "base", "probes": probes, "reference": probes}
    report = verify_adapter(tmp_path / "out", variant=variant, **given)
    assert report.ok, report.render()
    assert push_adapter_to_hub(tmp_path / "out", "user/name", dry_run=True, variant=variant, **given).report.ok
    assert type(load_base_model(str(tmp_path / "base"), variant=variant)).__name__ == "LlamaForCausalLM"
    if variant:
        with pytest.raises(BehaviourError, match="only as a variant"):
            verify_adapter(tmp_path / "out", **given)


def test_weights_that_a_loader_changes_are_named(base, tmp_path):
    publish(base, tmp_path / "out")
    from peft_gradproj.adapter_folder import LoraPair, read_adapter_folder

    read = read_adapter_folder(tmp_path / "out")
    pairs = read.layers()[WEIGHTS].pairs
    pairs["query"] = LoraPair(pairs["query"].a, 2 * pairs["query"].b)
    with loaded_adapter(read, pairs, base) as faults:
        assert faults == ["query gets other factors than are in the file"]


def test_a_model_may_have_a_text_encoder_within(tmp_path):
    """As MusicGen has: PEFT's layout is of one model, and not of a pipeline with parts."""
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(text_encoder=nn.Linear(6, 6), decoder=nn.Linear(6, 6)))
    report = checked_once_saved(base, tmp_path, "input", target_modules=["text_encoder", "decoder"])
    assert report.ok, report.render()
    edit_json(tmp_path, CONFIG, lambda config: config.update(rank_pattern={"text_encoder": 5}))
    reseal(tmp_path)
    assert [check.name for check in verify_adapter(tmp_path).failures] == ["config"]


def test_text_encoders_are_not_what_is_measured(tmp_path):
    """Their layers are in the file and not on the UNet, which is no fault of the loader."""
    unet, basis = unet_adapter(tmp_path / "out")
    weights = tmp_path / "out" / DIFFUSERS_WEIGHTS
    encoder = {f"text_encoder.q.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    save_file({**{f"unet.{key}": tensor for key, tensor in load_file(weights).items()}, **encoder}, weights)
    write_sidecars(tmp_path / "out", basis, settings={"strength": 1.0}, base_model=None)
    probes = collect_concept_probes(unet, [(unet_inputs(2), None)])
    report = verify_adapter(tmp_path / "out", base_model=unet, probes=probes, reference=probes)
    assert behaviour(report)["loaded"] is True, report.render()
