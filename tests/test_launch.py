"""The launcher: training scripts that nobody edited, run in processes of their own."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from tiny_models import (
    FLOORS,
    LLAMA_TARGETS,
    UNET_TARGETS,
    basis_for,
    folder_leakage,
    tiny_llama,
    tiny_unet,
    unet_inputs,
)
from transformers import PreTrainedModel

from peft_gradproj import ConceptBasis, ConceptProbes, GradProjConfig, collect_concept_probes, verify_adapter
from peft_gradproj.errors import ConceptBasisError, ConceptDataError, GradProjConfigError
from peft_gradproj.launch import LaunchedRun, launch

SCRIPTS = Path(__file__).parent / "scripts"


def launched(*arguments: object, module: str = "peft_gradproj") -> subprocess.CompletedProcess[str]:
    """Run `gradproj launch`, or with `module="peft_gradproj.launch"` what `accelerate launch -m` runs."""
    command = [sys.executable, "-m", module, *(["launch"] if module == "peft_gradproj" else []), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a base UNet, and a basis and probes for it."""
    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    unet = tiny_unet()
    unet.save_pretrained(folder / "unet")
    basis_for(unet, UNET_TARGETS).save(folder / "basis.safetensors")
    collect_concept_probes(unet, [(unet_inputs(6), None)], concept="planted").save(folder / "probes.safetensors")
    return folder


def options(workshop: Path, *, probes: bool = True) -> list[object]:
    chosen: list[object] = ["--concept-basis", workshop / "basis.safetensors"]
    if probes:
        chosen += ["--concept-probes", workshop / "probes.safetensors", "--probe-every", 3, "--probe-batch-size", 2]
    return chosen


@pytest.fixture(scope="module")
def trained(workshop):
    """The script run whole, with probes: its output folder and what it printed."""
    folder = workshop / "whole"
    script = [SCRIPTS / "train_text_to_image.py", "--unet", workshop / "unet", "--output_dir", folder]
    # The script's own --strength is not the launcher's.
    run = launched(*options(workshop), *script, "--max_train_steps", 5, "--strength", "much")
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, run.stdout


def test_an_unmodified_script_trains_checkpoints_and_saves_with_projection(workshop, trained):
    folder, printed = trained
    assert "trained as GradProjConfig" in printed
    basis = ConceptBasis.load(workshop / "basis.safetensors")
    for saved in (folder / "checkpoint-2", folder / "checkpoint-4", folder):
        assert folder_leakage(saved, basis) <= FLOORS[torch.float32]
        report = verify_adapter(saved)
        assert report.ok, report.to_json()
        settings = json.loads((saved / "gradproj.json").read_text())["settings"]
        assert settings["probe_every"] == 3
        assert settings["strength"] == 1.0


def test_what_the_script_loads_again_is_a_plain_lora(trained):
    assert "loaded as LoraConfig" in trained[1]


def test_a_resumed_script_finds_basis_and_probes_again_and_ends_as_an_uninterrupted_one(workshop, trained):
    script = [SCRIPTS / "train_text_to_image.py", "--unet", workshop / "unet", "--output_dir", workshop / "resumed"]
    resume = ["--resume_from_checkpoint", trained[0] / "checkpoint-4", "--max_train_steps", 5]
    run = launched(*options(workshop), *script, *resume, module="peft_gradproj.launch")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "step 5" in run.stdout
    assert "step 4" not in run.stdout
    assert verify_adapter(workshop / "resumed").ok
    whole, resumed, checkpoint = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (trained[0], workshop / "resumed", trained[0] / "checkpoint-4")
    )
    for key, value in resumed.items():
        torch.testing.assert_close(value, whole[key], atol=1e-6, rtol=1e-5)
        assert not torch.equal(checkpoint[key], value)


def test_a_script_that_adds_no_lora_ends_with_an_error(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys\nassert sys.argv[1:] == ['--rank', '4']\nsys.exit(0)\n")
    basis = basis_for(tiny_unet(), UNET_TARGETS)
    with pytest.raises(GradProjConfigError, match="without a LoRA"):
        launch(str(script), ["--rank", "4"], concept_basis=basis)
    with pytest.raises(GradProjConfigError, match="no script at"):
        launch(str(tmp_path / "absent.py"), concept_basis=basis)


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_a_script_that_is_asked_for_help_ends_as_it_does_alone(tmp_path, asked, capsys):
    script = tmp_path / "train.py"
    script.write_text("import argparse\nargparse.ArgumentParser(description='what it does').parse_args()\n")
    launch(str(script), [asked], concept_basis=basis_for(tiny_unet(), UNET_TARGETS))
    assert "what it does" in capsys.readouterr().out


def test_help_does_not_excuse_a_script_that_trains(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\nlayer = torch.nn.Linear(1, 1)\nlayer(torch.ones(1)).sum().backward()\n"
        "torch.optim.SGD(layer.parameters(), lr=1).step()\nsys.exit()\n"
    )
    with pytest.raises(GradProjConfigError, match="without a LoRA"), pytest.warns(UserWarning, match="first step"):
        launch(str(script), ["-h", "512"], concept_basis=basis_for(tiny_unet(), UNET_TARGETS))


def test_a_module_of_the_current_folder_is_found_as_by_python_m(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text("import sys\nassert sys.argv[1:] == ['--rank', '4']\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    # As in the `gradproj` command, which is no `python -m`.
    path = [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", path)
    with pytest.raises(SystemExit) as end:
        launch("own_module", ["--rank", "4"], module=True, concept_basis=basis_for(tiny_unet(), UNET_TARGETS))
    assert end.value.code == 3
    assert sys.path == path


def test_a_script_that_fails_fails_with_its_own_status(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(SystemExit) as end:
        launch(str(script), concept_basis=basis_for(tiny_unet(), UNET_TARGETS))
    assert end.value.code == 3


def test_language_models_with_get_peft_model_and_a_trainable_from_pretrained(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    basis = basis_for(base, LLAMA_TARGETS)
    probes = collect_concept_probes(base, [({"input_ids": torch.randint(3, 32, (4, 12))}, None)])
    for output, resumed in (("first", []), ("second", [str(tmp_path / "first")])):
        arguments = [str(tmp_path / "base"), str(tmp_path / output), *resumed]
        launch(str(SCRIPTS / "train_causal_lm.py"), arguments, concept_basis=basis, concept_probes=probes)
        assert (tmp_path / output / "types.txt").read_text() == "GradProjConfig LoraConfig"
        assert folder_leakage(tmp_path / output, basis) <= FLOORS[torch.float32]
        assert verify_adapter(tmp_path / output).ok


# In this process: what is refused, and what is restored


def test_an_adapter_in_a_subfolder_is_trained_on_with_projection(tmp_path):
    basis = basis_for(tiny_llama(), LLAMA_TARGETS)
    config = LoraConfig(r=4, lora_alpha=24, target_modules=LLAMA_TARGETS)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "inner")
    with run_for(concept_basis=basis).watching():
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True, subfolder="inner")
    resumed = model.peft_config["default"]
    assert isinstance(resumed, GradProjConfig)
    assert resumed.lora_alpha == 24


def llama_lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=LLAMA_TARGETS)


def types(model) -> list[type]:
    return [type(config) for config in model.peft_config.values()]


def step(model) -> None:
    """A step of all that is trained."""
    tokens = torch.randint(3, 32, (2, 6))
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()


def test_adapters_are_projected_whichever_way_peft_adds_them_for_training_and_stay_plain_if_only_loaded(tmp_path):
    get_peft_model(tiny_llama(), llama_lora()).save_pretrained(tmp_path)
    run = run_for(concept_basis=basis_for(tiny_llama(), LLAMA_TARGETS))
    with run.watching():
        made = PeftModelForCausalLM(tiny_llama(), llama_lora())
        made.add_adapter("more", llama_lora())
        made.load_adapter(tmp_path, "resumed", is_trainable=True)
        assert types(made) == [GradProjConfig] * 3
        assert types(PeftModel(tiny_llama(), llama_lora())) == [GradProjConfig]
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
        loaded.load_adapter(tmp_path, "more")
        assert types(loaded) == [LoraConfig] * 2
        with pytest.raises(GradProjConfigError, match="beside a plain LoRA that it has only loaded"):
            loaded.load_adapter(tmp_path, "resumed", is_trainable=True)
        # What is only loaded may be among an optimizer's parameters.
        loaded.set_requires_grad("more", requires_grad=False)
        torch.optim.SGD(loaded.parameters(), lr=1e-2).step()
        step(made)
    assert len(run.configs) == 5


def test_a_lora_that_was_injected_behind_the_launcher_is_refused_at_its_first_step():
    basis = basis_for(tiny_llama(), LLAMA_TARGETS)
    with run_for(concept_basis=basis).watching():
        model = inject_adapter_in_model(llama_lora(), tiny_llama())
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(GradProjConfigError, match=r"LoRA on a LlamaForCausalLM, but.*get_peft_model"):
            step(model)
    assert all(map(torch.equal, before, model.parameters()))
    step(model)  # the launcher has ended

    lenient = run_for(concept_basis=basis, uncovered="warn")
    with lenient.watching():
        step(get_peft_model(tiny_llama(), llama_lora()))
        with pytest.warns(UserWarning, match="trained without projection"):
            step(inject_adapter_in_model(llama_lora(), tiny_llama()))
    assert lenient.uncovered == ["the LoRA on LlamaForCausalLM"]


def test_a_lora_that_an_optimizer_gets_after_its_first_step_is_refused_as_well():
    with run_for(concept_basis=basis_for(tiny_llama(), LLAMA_TARGETS)).watching():
        model = get_peft_model(tiny_llama(), llama_lora())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        optimizer.step()
        behind = inject_adapter_in_model(llama_lora(), tiny_llama())
        optimizer.add_param_group({"params": [p for p in behind.parameters() if p.requires_grad]})
        with pytest.raises(GradProjConfigError, match="not projected"):
            optimizer.step()


def test_a_script_that_trains_no_lora_is_told_at_its_first_step():
    with (
        run_for(concept_basis=basis_for(tiny_llama(), LLAMA_TARGETS)).watching(),
        pytest.warns(UserWarning, match="takes a first step, and no LoRA"),
    ):
        step(tiny_llama())


def test_a_script_with_a_gradprojconfig_of_its_own_is_refused_when_it_adds_it():
    basis = basis_for(tiny_llama(), LLAMA_TARGETS)
    config = GradProjConfig(r=4, target_modules=LLAMA_TARGETS, concept_basis=basis)
    run = run_for(concept_basis=basis)
    with run.watching():
        with pytest.raises(GradProjConfigError, match="makes a GradProjConfig itself"):
            get_peft_model(tiny_llama(), config)
        injected = inject_adapter_in_model(config, tiny_llama())
        with pytest.raises(GradProjConfigError, match="makes a GradProjConfig itself"):
            step(injected)
        # One that the launcher has made may be used again.
        model = get_peft_model(tiny_llama(), llama_lora())
        made = model.peft_config["default"]
        model.add_adapter("reference", copy.deepcopy(made))
        other = GradProjConfig(
            r=4, target_modules=LLAMA_TARGETS, concept_basis=basis_for(tiny_llama(), LLAMA_TARGETS, seed=1)
        )
        for name in ("task_type", "base_model_name_or_path", "uncovered"):
            setattr(other, name, getattr(made, name))
        assert other == made
        with pytest.raises(GradProjConfigError, match="makes a GradProjConfig itself"):
            model.add_adapter("other", other)


def run_for(**given) -> LaunchedRun:
    return LaunchedRun.from_options(given)


def lora(**given) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": UNET_TARGETS, **given})


def test_every_option_of_the_scripts_config_is_kept():
    unet = tiny_unet()
    run = run_for(concept_basis=basis_for(unet, UNET_TARGETS, r=3), strength=0.5)
    config = run.converted(lora(r=3, lora_alpha=7, lora_dropout=0.25, init_lora_weights="gaussian"), unet)
    assert isinstance(config, GradProjConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights) == (3, 7, 0.25, "gaussian")
    assert config.strength == 0.5


def test_neither_basis_nor_probes_is_refused_before_the_script_runs():
    with pytest.raises(GradProjConfigError, match="neither"):
        run_for()


def test_a_basis_of_another_model_is_refused_by_names():
    run = run_for(concept_basis=basis_for(tiny_llama(), LLAMA_TARGETS))
    with run.watching(), pytest.raises(ConceptBasisError, match=r"covers none.*down_blocks.*model\.layers\.0"):
        tiny_unet().add_adapter(lora())


def test_a_basis_of_another_model_is_refused_by_widths():
    from diffusers import UNet2DConditionModel

    wide = UNet2DConditionModel.from_config({**tiny_unet().config, "block_out_channels": (8, 24)})
    run = run_for(concept_basis=basis_for(wide, UNET_TARGETS))
    with run.watching(), pytest.raises(ConceptBasisError, match="width 24, but the layer needs 16"):
        tiny_unet().add_adapter(lora())


def probes_of(unet) -> ConceptProbes:
    return collect_concept_probes(unet, [(unet_inputs(2), None)])


def test_probes_of_another_model_are_refused_by_inputs_outputs_and_weights():
    torch.manual_seed(0)
    unet = tiny_unet()
    good = probes_of(unet)
    wide = {**good.inputs, "encoder_hidden_states": torch.randn(2, 5, 20)}
    unknown = {**good.inputs, "added": torch.randn(2, 5)}
    for inputs in (wide, unknown):
        with pytest.raises(ConceptDataError, match="cannot be run on the concept probes"):
            run_for(concept_probes=ConceptProbes(inputs, good.targets)).converted(lora(), unet)
    with pytest.raises(ConceptDataError, match="outputs of shape"):
        run_for(concept_probes=ConceptProbes(good.inputs, good.targets[:, :2])).converted(lora(), unet)
    with pytest.raises(ConceptDataError, match="other weights"):
        run_for(concept_probes=probes_of(tiny_unet())).converted(lora(), unet)
    for dtype in (torch.float32, torch.bfloat16):
        config = run_for(concept_probes=good).converted(lora(), unet.to(dtype))
        assert config.concept_probes == good


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=32, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return CLIPTextModel(config)


def test_text_encoders_are_projected_by_the_layers_under_their_prefix():
    unet, first, second = tiny_unet(), text_encoder(), text_encoder()
    layers = dict(basis_for(unet, UNET_TARGETS))
    for number, encoder in enumerate((first, second)):
        prefix = "text_encoder." if number == 0 else "text_encoder_2."
        part = basis_for(encoder, ["q_proj"], seed=number)
        layers.update({prefix + name: layer for name, layer in part.items()})
    run = run_for(concept_basis=ConceptBasis(layers), concept_probes=probes_of(unet))
    config = LoraConfig(r=4, target_modules=["q_proj"])
    with run.watching():
        unet.add_adapter(lora())
        for encoder in (first, second):
            encoder.add_adapter(config)
    for encoder, prefix in ((first, "text_encoder."), (second, "text_encoder_2.")):
        made = encoder.peft_config["default"]
        (name,) = made.concept_basis
        assert made.concept_basis[name] == layers[prefix + name]
        assert made.concept_probes is None


def test_a_text_encoder_that_the_basis_does_not_cover_is_refused_or_recorded(tmp_path):
    unet = tiny_unet()
    basis = basis_for(unet, UNET_TARGETS)
    config = LoraConfig(r=4, target_modules=["q_proj"])
    strict = run_for(concept_basis=basis)
    with strict.watching(), pytest.raises(GradProjConfigError, match=r"CLIPTextModel.*'text_encoder\.'"):
        text_encoder().add_adapter(config)
    lenient = run_for(concept_basis=basis, uncovered="warn")
    encoder = text_encoder()
    with lenient.watching():
        unet.add_adapter(lora())
        with pytest.warns(UserWarning, match="CLIPTextModel is trained without projection"):
            encoder.add_adapter(config)
        assert type(encoder.peft_config["default"]) is LoraConfig
        unet.save_lora_adapter(tmp_path)
    assert json.loads((tmp_path / "gradproj.json").read_text())["uncovered"] == ["the LoRA on CLIPTextModel"]
    assert not verify_adapter(tmp_path).ok


def test_a_lora_that_is_let_through_is_recorded_once_however_many_of_the_functions_pass_it_on():
    run = run_for(concept_basis=basis_for(tiny_unet(), UNET_TARGETS), uncovered="ignore")
    with run.watching():
        peft.get_peft_model(text_encoder(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert run.uncovered == ["the LoRA on CLIPTextModel"]


def test_a_run_in_which_only_uncovered_loras_were_trained_ends_with_an_error():
    run = run_for(concept_basis=basis_for(tiny_unet(), UNET_TARGETS), uncovered="ignore")
    run.converted(LoraConfig(target_modules=["q_proj"]), text_encoder())
    with pytest.raises(GradProjConfigError, match="without a LoRA"):
        run.check("train.py")


def test_an_option_of_the_script_that_escapes_the_projection_is_refused_by_name():
    unet = tiny_unet()
    run = run_for(concept_basis=basis_for(unet, UNET_TARGETS))
    with run.watching(), pytest.raises(GradProjConfigError, match="use_dora"):
        unet.add_adapter(lora(use_dora=True))


def test_weights_under_another_name_are_kept_with_a_warning_instead_of_a_manifest(tmp_path):
    unet = tiny_unet()
    run = run_for(concept_basis=basis_for(unet, UNET_TARGETS))
    with run.watching():
        unet.add_adapter(lora())
        with pytest.warns(UserWarning, match=r"no gradproj\.json"):
            unet.save_lora_adapter(tmp_path, weight_name="mine.safetensors")
    assert (tmp_path / "mine.safetensors").exists()
    assert not (tmp_path / "gradproj.json").exists()


def test_get_peft_model_is_watched_wherever_it_is_imported_from():
    model = tiny_llama()
    run = run_for(concept_basis=basis_for(model, LLAMA_TARGETS))
    with run.watching():
        # As a script does, which runs in here.
        from peft.mapping_func import get_peft_model as imported

        adapted = imported(model, LoraConfig(r=4, target_modules=LLAMA_TARGETS))
    assert isinstance(adapted.peft_config["default"], GradProjConfig)
    run.check("train.py")


def test_everything_is_unwrapped_after_the_run():
    from diffusers.loaders.lora_base import LoraBaseMixin
    from diffusers.loaders.peft import PeftAdapterMixin
    from huggingface_hub import HfApi, hf_api

    def functions():
        return (
            peft.get_peft_model,
            peft.mapping_func.get_peft_model,
            PeftModel.__init__,
            PeftModel.add_adapter,
            PeftModelForCausalLM.__init__,
            BaseTuner.inject_adapter,
            PreTrainedModel.add_adapter,
            PeftAdapterMixin.add_adapter,
            PeftAdapterMixin.save_lora_adapter,
            LoraBaseMixin.write_lora_layers,
            hf_api.upload_folder,
            HfApi.upload_folder,
            LoraBaseMixin.__dict__["write_lora_layers"].__class__,
        )

    before = functions()
    with run_for(concept_basis=basis_for(tiny_unet(), UNET_TARGETS)).watching():
        assert all(now is not then for now, then in zip(functions()[:-1], before[:-1], strict=True))
    assert functions() == before
    assert get_peft_model is peft.get_peft_model
