"""What is saved is a plain LoRA for everybody, and a GradProj adapter for us."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from helpers import LAYERS, saved_leakage, small_net_basis, train, trainable
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from published_folders import CONFIG, MANIFEST, edit_json
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA_TARGETS, UNET_TARGETS, basis_for, tiny_llama, tiny_unet, unet_inputs

from peft_gradproj import (
    ConceptBasis,
    ConceptProbes,
    GradProjConfig,
    LayerBasis,
    adapter_folder,
    save_sidecars,
    verify_adapter,
)
from peft_gradproj.errors import AdapterFolderError

STOCK_LOAD = """
import sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
sys.path.insert(0, {tests!r})
from conftest import SmallNet
folder = {folder!r}
config = PeftConfig.from_pretrained(folder)
assert type(config).__name__ == "LoraConfig", config
base = SmallNet()
base.load_state_dict(load_file({base!r}))
model = PeftModel.from_pretrained(base, folder).eval()
assert "peft_gradproj" not in sys.modules
save_file({{"output": model(load_file({inputs!r})["pictures"])}}, {output!r})
"""


def trained(config=None, base=None):
    basis = small_net_basis()
    config = config or GradProjConfig(
        r=4, lora_alpha=8, target_modules=list(LAYERS), concept_basis=basis, restore=0.5, probe_every=3
    )
    model = get_peft_model(base or SmallNet(), config)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 10)
    return model, basis


@pytest.mark.parametrize("saver", ["peft", "transformers"])
def test_an_adapter_that_is_too_large_to_be_verified_is_saved_with_a_warning(tmp_path, monkeypatch, saver):
    monkeypatch.setattr(adapter_folder, "MAX_FILE_BYTES", 1000)
    if saver == "peft":
        model, basis = trained()
        model.add_adapter("second", GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis))
        folders = [tmp_path, tmp_path / "second"]
    else:
        model, folders = tiny_llama(), [tmp_path]
        basis = basis_for(model, LLAMA_TARGETS)
        model.add_adapter(GradProjConfig(r=4, target_modules=LLAMA_TARGETS, concept_basis=basis))
    with pytest.warns(UserWarning, match=r"at most 1,000 can be verified\. Save the adapter in half precision"):
        model.save_pretrained(tmp_path)
    expected = model.state_dict()
    for folder in folders:
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved
        for key, value in saved.items():
            name = "default" if folder == tmp_path else folder.name
            key = key if saver == "peft" else key.removeprefix("base_model.model.")
            torch.testing.assert_close(value, expected[key.replace(".weight", f".{name}.weight")])
        assert (folder / CONFIG).is_file()
        assert not (folder / MANIFEST).exists()


def test_the_saved_config_has_exactly_loras_keys_and_type(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = get_peft_model(SmallNet(), LoraConfig(r=4, lora_alpha=8, target_modules=list(LAYERS)))
    plain.save_pretrained(tmp_path / "plain")
    expected = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    for config in (saved, expected):
        config["target_modules"] = sorted(config["target_modules"])
    assert saved == expected
    assert (
        load_file(tmp_path / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "plain" / "adapter_model.safetensors").keys()
    )


def test_a_process_without_us_loads_it_bit_identically_and_without_a_warning(tmp_path):
    base = SmallNet()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    pictures = torch.randn(4, 3, 8, 8)
    save_file({"pictures": pictures}, tmp_path / "inputs.safetensors")
    model, _ = trained(base=base)
    model.save_pretrained(tmp_path / "adapter")
    program = STOCK_LOAD.format(
        tests=str(Path(__file__).parent),
        folder=str(tmp_path / "adapter"),
        base=str(tmp_path / "base.safetensors"),
        inputs=str(tmp_path / "inputs.safetensors"),
        output=str(tmp_path / "output.safetensors"),
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    output = load_file(tmp_path / "output.safetensors")["output"]
    with torch.no_grad():
        # What we train with projects in forward, which rounds once more than the plain LoRA does.
        torch.testing.assert_close(output, model.eval()(pictures), atol=1e-6, rtol=1e-5)
        same_base = SmallNet()
        same_base.load_state_dict(load_file(tmp_path / "base.safetensors"))
        with_us_imported = PeftModel.from_pretrained(same_base, tmp_path / "adapter").eval()
        assert torch.equal(output, with_us_imported(pictures))


def test_the_config_round_trips_with_its_basis(tmp_path):
    model, basis = trained()
    model.save_pretrained(tmp_path)
    config = GradProjConfig.from_pretrained(tmp_path)
    original = model.peft_config["default"]
    for field in fields(GradProjConfig):
        if field.name not in ("inference_mode", "auto_mapping"):
            assert getattr(config, field.name) == getattr(original, field.name), field.name
    assert config.concept_basis == basis
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig


def test_training_resumes_with_projection(tmp_path):
    model, basis = trained()
    model.save_pretrained(tmp_path)
    config = GradProjConfig.from_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(SmallNet(), tmp_path, config=config, is_trainable=True)
    start = resumed.base_model.model.query.lora_A["default"].weight.detach().clone()
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.query.lora_A.weight"]
    torch.testing.assert_close(start, saved, atol=1e-7, rtol=1e-6)
    train(resumed, torch.optim.AdamW(trainable(resumed), lr=1e-2), 10)
    resumed.save_pretrained(tmp_path / "resumed")
    assert not torch.equal(resumed.base_model.model.query.lora_A["default"].weight, start)
    assert saved_leakage(tmp_path / "resumed", basis) <= 1e-6


def test_what_is_saved_verifies(tmp_path):
    model, _ = trained()
    model.save_pretrained(tmp_path)
    report = verify_adapter(tmp_path)
    assert report.ok, report.to_json()


def test_an_adapter_with_an_uncovered_layer_does_not_verify(tmp_path):
    config = GradProjConfig(
        r=4,
        target_modules=["query", "key"],
        concept_basis=small_net_basis(layers=("query",)),
        uncovered="ignore",
    )
    model, _ = trained(config)
    model.save_pretrained(tmp_path)
    report = verify_adapter(tmp_path)
    assert not report.ok
    assert "key" in report.to_json()


@pytest.mark.parametrize(
    "settings",
    [
        {"concept_probes": "/etc/passwd"},
        {"concept_basis": "stranger/basis"},
        {"endpoint": "http://stranger"},
        {"cache_dir": "/"},
        {"target_modules": ["head"]},
        {"strength": "1"},
        {"strength": True},
        {"probe_every": 1.5},
        {"rule": None},
    ],
    ids=str,
)
def test_settings_of_strangers_name_nothing_to_read_and_are_of_their_types(tmp_path, settings):
    trained()[0].save_pretrained(tmp_path)
    edit_json(tmp_path, MANIFEST, lambda manifest: manifest["settings"].update(settings))
    with pytest.raises(AdapterFolderError, match=f"setting '{next(iter(settings))}' = .* which this release does not"):
        GradProjConfig.from_pretrained(tmp_path)


def test_options_of_ours_or_of_tomorrow_in_the_plain_config_are_ignored(tmp_path):
    model, basis = trained()
    model.save_pretrained(tmp_path)
    edit_json(tmp_path, CONFIG, lambda config: config.update(concept_probes="/etc/passwd", strength=0, newest=1))
    with pytest.warns(UserWarning, match=r"ignored: \['concept_probes', 'newest', 'strength'\]"):
        config = GradProjConfig.from_pretrained(tmp_path)
    assert (config.concept_probes, config.strength, config.concept_basis) == (None, 1.0, basis)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(AdapterFolderError, match="expected a JSON object"):
        GradProjConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_manifest_gives_no_gradproj_config(tmp_path):
    plain = get_peft_model(SmallNet(), LoraConfig(r=4, target_modules=["query"]))
    plain.save_pretrained(tmp_path)
    with pytest.raises(AdapterFolderError, match=r"gradproj\.json"):
        GradProjConfig.from_pretrained(tmp_path)


def test_weights_that_diffusers_saved_give_no_config_but_say_how_to_go_on(tmp_path):
    trained()[0].save_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(AdapterFolderError, match="add_adapter"):
        GradProjConfig.from_pretrained(tmp_path)


def test_sidecars_of_a_model_without_a_gradproj_adapter_are_refused(tmp_path):
    plain = get_peft_model(SmallNet(), LoraConfig(r=4, target_modules=["query"]))
    with pytest.raises(AdapterFolderError, match="GradProjConfig"):
        save_sidecars(plain, tmp_path)


def test_an_adapter_with_probes_only_names_its_concept_and_is_not_called_verified(tmp_path):
    probes = ConceptProbes({"sample": torch.randn(4, 3, 8, 8)}, concept="a planted pattern")
    model, _ = trained(GradProjConfig(r=4, target_modules=["query"], concept_probes=probes))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "gradproj.json").read_text())["concept"] == "a planted pattern"
    assert verify_adapter(tmp_path).status == "could not be checked"


def test_a_process_that_does_not_know_the_type_yet_can_unpickle_a_config(tmp_path):
    basis = ConceptBasis({"layer": LayerBasis(input=torch.eye(4)[:, :1])})
    config = GradProjConfig(r=2, target_modules=["layer"], concept_basis=basis, strength=0.5)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    code = (
        "import pickle, sys; c = pickle.load(open(sys.argv[1], 'rb')); "
        "print(c.peft_type.value, c.strength, c.concept_basis['layer'].input.shape)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.pkl")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer.strip() == "GRADPROJ 0.5 torch.Size([4, 1])"


def test_an_adapter_on_the_head_verifies_only_without_the_base_models_own_head(tmp_path):
    targets = ["q_proj", "lm_head"]
    base = tiny_llama()
    basis = basis_for(base, targets)
    model = get_peft_model(base, GradProjConfig(r=4, target_modules=targets, concept_basis=basis))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    failed = [check.layer for check in verify_adapter(tmp_path / "with").checks if not check.passed]
    assert failed == ["base_model.model.lm_head.base_layer.weight"]
    assert verify_adapter(tmp_path / "without").ok


@pytest.mark.parametrize(
    ("of_basis", "of_probes", "expected"),
    [
        (("org/basis", "v1"), ("org/probes", "v2"), ("org/basis", "v1")),
        ((None, None), ("org/probes", "v2"), ("org/probes", "v2")),
        (("org/basis", None), ("org/probes", "v2"), ("org/basis", None)),
        (("org/model", None), (None, None), ("org/model", "0" * 40)),
        ((None, None), (None, None), ("org/model", "0" * 40)),
    ],
)
def test_the_manifest_names_the_base_model_though_diffusers_clears_it_in_the_config(
    tmp_path, of_basis, of_probes, expected
):
    unet = tiny_unet()
    unet.register_to_config(_name_or_path=f"/hub/models--org--model/snapshots/{'0' * 40}/unet")
    basis = ConceptBasis(basis_for(unet, UNET_TARGETS), "planted", *of_basis)
    probes = ConceptProbes(unet_inputs(2), base_model=of_probes[0], revision=of_probes[1])
    unet.add_adapter(
        GradProjConfig(r=4, target_modules=UNET_TARGETS, concept_basis=basis, concept_probes=probes, uncovered="ignore")
    )
    unet.save_lora_adapter(tmp_path)
    save_sidecars(unet, tmp_path)
    named = json.loads((tmp_path / MANIFEST).read_text())["base_model"]
    assert (named["id"], named["revision"]) == expected
