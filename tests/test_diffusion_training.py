"""What the scripts for diffusion models share: flags, trackers, checkpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import UNET_TARGETS, basis_for, tiny_unet, unet_inputs
from tiny_pipelines import sd

from peft_gradproj import GradProjConfig, adapter_folder, collect_concept_probes
from peft_gradproj.diffusion_training import (
    LoraCheckpoints,
    add_concept_arguments,
    add_training_arguments,
    check_run,
    concept_options,
    finish,
    load_parts,
    make_accelerator,
    tracker_config,
)
from peft_gradproj.errors import GradProjConfigError
from peft_gradproj.files import saved_checkpoints

pytest_plugins = ("hub_server",)


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def flags(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_concept_arguments(parser)
    add_training_arguments(parser)
    return parser.parse_args(["--pretrained_model_name_or_path", "x", "--report_to", "none", *map(str, given)])


# Flags


@pytest.mark.parametrize("flag", ["--rank", "--max_train_steps", "--checkpoints_total_limit", "--probe_every"])
@pytest.mark.parametrize("number", ["0", "-2", "some"])
def test_numbers_of_things_are_refused_by_their_flag_unless_above_zero(flag, number, capsys):
    with pytest.raises(SystemExit):
        flags(flag, number)
    said = capsys.readouterr().err
    assert f"argument {flag}: " in said
    assert number in said


@pytest.mark.parametrize(
    "settings",
    [
        {"probe_every": 4, "probe_batch_size": 8, "probe_history": 8},
        {"probe_history": 4, "negative_guidance": 0.3},
        {"strength": 0.5, "restore": 0.25},
    ],
)
def test_the_settings_that_the_docs_name_can_be_given(settings):
    given = [part for name, number in settings.items() for part in (f"--{name}", number)]
    config = GradProjConfig(**concept_options(flags(*given, "--uncovered", "ignore")))
    assert config.settings().items() >= settings.items()


def test_a_base_model_on_the_hub_is_refused_by_its_kind(hub, tmp_path):
    for kind in ("StableDiffusionPipeline", "FluxPipeline"):
        hub.add_repo(f"user/{kind}", {"model_index.json": json.dumps({"_class_name": kind}).encode()})
    given = ("--output_dir", tmp_path, "--variant", "fp16", "--cache_dir", tmp_path / "cache", "--revision", "main")
    check_run(flags(*given, "--pretrained_model_name_or_path", "user/StableDiffusionPipeline"))
    with pytest.raises(GradProjConfigError, match=r"user/FluxPipeline is a FluxPipeline; .*gradproj launch"):
        check_run(flags(*given, "--pretrained_model_name_or_path", "user/FluxPipeline"))


# Trackers


def test_no_tracker_writes_the_token_down(tmp_path):
    args = flags("--output_dir", tmp_path, "--report_to", "tensorboard", "--hub_token", "hf_secret")
    accelerator = make_accelerator(args)
    accelerator.init_trackers("run", config=tracker_config(args))
    accelerator.end_training()
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"learning_rate" in content for content in written)
    assert not any(b"hf_secret" in content for content in written)


@pytest.mark.parametrize("tracker", ["wandb", "comet_ml", "all"])
def test_a_token_is_refused_beside_trackers_that_record_the_command_line(tmp_path, tracker):
    with pytest.raises(GradProjConfigError, match="--hub_token would be logged"):
        make_accelerator(flags("--output_dir", tmp_path, "--report_to", tracker, "--hub_token", "hf_secret"))


# Checkpoints


def checkpoints_in(folder: Path, *given: object, probed: bool = False) -> LoraCheckpoints:
    args = flags("--output_dir", folder, *given)
    unet = tiny_unet()
    basis = basis_for(unet, UNET_TARGETS)
    probes = collect_concept_probes(unet, [(unet_inputs(), None)]) if probed else None
    unet.add_adapter(GradProjConfig(r=4, target_modules=UNET_TARGETS, concept_basis=basis, concept_probes=probes))
    accelerator = make_accelerator(args)
    return LoraCheckpoints(accelerator, args, accelerator.prepare(unet))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["run", "run [1]*"])
def test_a_checkpoint_that_was_cut_off_is_not_resumed_from_and_leaves_room_for_the_next(tmp_path, name):
    folder = tmp_path / name
    checkpoints = checkpoints_in(folder, "--resume_from_checkpoint", "latest")
    assert checkpoints.resume() == 0
    checkpoints.save(2)

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    hook = checkpoints.accelerator.register_save_state_pre_hook(cut_off)
    for step in (2, 10):
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(step)
    hook.remove()
    kept = {key: value.clone() for key, value in get_peft_model_state_dict(checkpoints.unet).items()}
    with torch.no_grad():
        for parameter in checkpoints.unet.parameters():
            parameter.add_(parameter.requires_grad)
    assert checkpoints.resume() == 2
    for key, value in get_peft_model_state_dict(checkpoints.unet).items():
        torch.testing.assert_close(value, kept[key])
    checkpoints.save(10)
    assert names(folder) == ["checkpoint-10", "checkpoint-2"]


def test_other_folders_are_no_checkpoints(tmp_path):
    checkpoints = checkpoints_in(tmp_path, "--checkpoints_total_limit", 2)
    for step in (2, 10, 4):
        checkpoints.save(step)
        (tmp_path / "checkpoint-best").mkdir(exist_ok=True)
    assert [path.name for path in saved_checkpoints(str(tmp_path))] == ["checkpoint-4", "checkpoint-10"]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-4", "checkpoint-best"]
    checkpoints.args.resume_from_checkpoint = "latest"
    assert checkpoints.resume() == 10
    for absent in ("checkpoint-best", "checkpoint-3"):
        checkpoints.args.resume_from_checkpoint = absent
        with pytest.raises(GradProjConfigError, match=r"no checkpoint .*one of these: checkpoint-4, checkpoint-10"):
            checkpoints.resume()


@pytest.mark.parametrize(
    ("probed", "message"),
    [
        (True, "was written without --concept_probes; leave them out, or start anew in another --output_dir"),
        (False, "was written with --concept_probes; give them again"),
    ],
)
def test_probes_are_not_taken_up_or_left_out_when_a_run_is_resumed(tmp_path, probed, message):
    checkpoints_in(tmp_path, probed=not probed).save(2)
    with pytest.raises(GradProjConfigError, match=f"checkpoint-2 {message}"):
        checkpoints_in(tmp_path, "--resume_from_checkpoint", "latest", probed=probed).resume()


def test_an_adapter_that_is_too_large_to_be_verified_is_saved_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_folder, "MAX_FILE_BYTES", 1000)
    checkpoints = checkpoints_in(tmp_path)
    with pytest.warns(UserWarning, match="at most 1,000 can be verified"):
        checkpoints.save(2)
    with pytest.warns(UserWarning, match="at most 1,000 can be verified"):
        finish(checkpoints, checkpoints.args, 2, None)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert load_file(folder / "pytorch_lora_weights.safetensors")
        assert not (folder / "gradproj.json").exists()


# The end


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_base_model_that_was_saved_in_half_precision_is_sampled_from_at_the_end(tmp_path, precision):
    sd().to(torch.float16).save_pretrained(tmp_path / "base")
    base = ("--pretrained_model_name_or_path", tmp_path / "base", "--mixed_precision", precision)
    validation = ("--validation_prompt", "ab", "--num_validation_images", 1)
    args = flags("--output_dir", tmp_path / "out", *base, *validation)
    accelerator = make_accelerator(args)
    unet = load_parts(args, accelerator).unet
    basis = basis_for(unet, UNET_TARGETS)
    unet.add_adapter(GradProjConfig(r=4, lora_alpha=4, target_modules=UNET_TARGETS, concept_basis=basis))
    finish(LoraCheckpoints(accelerator, args, accelerator.prepare(unet)), args, 1, None)
    assert names(tmp_path / "out" / "images") == ["image_0.png"]
