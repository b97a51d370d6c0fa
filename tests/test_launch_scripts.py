"""The launcher under scripts that train several models, or a transformer, or in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tiny_models import FLOORS, UNET_TARGETS, basis_for, folder_leakage, tiny_text_encoder, tiny_unet, unet_inputs

from peft_gradproj import ConceptBasis, collect_concept_probes, verify_adapter
from peft_gradproj.launch import launch

SCRIPTS = Path(__file__).parent / "scripts"
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
TRANSFORMER_TARGETS = ["attn.add_k_proj", "attn.to_add_out", "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]
PROBE_OPTIONS = {"probe_every": 2, "probe_batch_size": 2}


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_script(name: str, output: Path, *arguments: object, **options: object) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    launch(str(SCRIPTS / name), ["--output_dir", str(output), *map(str, arguments)], **options)


def assert_published(folder: Path, basis: ConceptBasis) -> None:
    """Every layer of the basis was trained, and neither leaks nor fails to verify."""
    assert folder_leakage(folder, basis) <= FLOORS[torch.float32]
    report = verify_adapter(folder)
    assert report.ok, report.to_json()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], "a staged file was left"


def assert_alike(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=1e-5, rtol=1e-4)


def check_whole_and_resumed(script: str, base: Path, folder: Path, options: dict, basis: ConceptBasis) -> None:
    """Run a script for 4 steps, and again from its checkpoint of step 2."""
    whole, resumed = folder / "whole", folder / "resumed"
    run_script(script, whole, "--base", base, **options)
    for saved in (whole / "checkpoint-2", whole / "checkpoint-4", whole):
        assert_published(saved, basis)
    run_script(script, resumed, "--base", base, "--resume_from_checkpoint", whole / "checkpoint-2", **options)
    assert not (resumed / "checkpoint-2").exists()
    assert_published(resumed, basis)
    assert_alike(whole, resumed)
    with pytest.raises(AssertionError):
        assert_alike(whole / "checkpoint-2", resumed)


# SDXL


def tiny_sdxl_unet():
    return tiny_unet(
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
    )


def tiny_sdxl_text_encoder(kind: type):
    return tiny_text_encoder(kind, projection_dim=10, bos_token_id=1, eos_token_id=31)


def sdxl_inputs(n: int) -> dict:
    conditions = {"text_embeds": torch.randn(n, 10), "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(n, 1)}
    return {
        "sample": torch.randn(n, 4, 8, 8),
        "timestep": torch.randint(0, 1000, (n,)),
        "encoder_hidden_states": torch.randn(n, 8, 24),
        "added_cond_kwargs": conditions,
    }


def test_a_script_for_sdxl_trains_its_unet_and_both_text_encoders_with_projection(tmp_path, capsys):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    models = {
        "unet": tiny_sdxl_unet(),
        "text_encoder": tiny_sdxl_text_encoder(CLIPTextModel),
        "text_encoder_2": tiny_sdxl_text_encoder(CLIPTextModelWithProjection),
    }
    layers = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "base" / name)
        prefix, targets = ("", UNET_TARGETS) if name == "unet" else (f"{name}.", TEXT_TARGETS)
        layers.update({prefix + key: layer for key, layer in basis_for(model, targets).items()})
    basis = ConceptBasis(layers, concept="planted")
    probes = collect_concept_probes(models["unet"], [(sdxl_inputs(4), None)])
    options = {"concept_basis": basis, "concept_probes": probes, **PROBE_OPTIONS}
    check_whole_and_resumed("train_text_to_image_sdxl.py", tmp_path / "base", tmp_path, options, basis)
    assert "loaded as LoraConfig, LoraConfig, LoraConfig" in capsys.readouterr().out


# A transformer


def tiny_sd3_transformer():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    )


def test_a_script_for_a_transformer_is_trained_with_projection_and_keeps_its_alpha(tmp_path, capsys):
    transformer = tiny_sd3_transformer()
    transformer.save_pretrained(tmp_path / "base" / "transformer")
    basis = basis_for(transformer, TRANSFORMER_TARGETS)
    inputs = {
        "hidden_states": torch.randn(4, 4, 8, 8),
        "timestep": torch.rand(4) * 1000,
        "encoder_hidden_states": torch.randn(4, 5, 16),
        "pooled_projections": torch.randn(4, 12),
    }
    probes = collect_concept_probes(transformer, [(inputs, None)])
    options = {"concept_basis": basis, "concept_probes": probes, **PROBE_OPTIONS}
    check_whole_and_resumed("train_dreambooth_transformer.py", tmp_path / "base", tmp_path, options, basis)
    assert "loaded as LoraConfig with alpha 8" in capsys.readouterr().out


# Two processes

RECORDER = """
import os, sys

folder, log = os.environ["RECORDED_FOLDER"], os.environ["RECORD"] + "-" + os.environ.get("RANK", "launcher")

def record(event, arguments):
    if event in ("os.rename", "os.mkdir") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        if str(arguments[0]).startswith(folder):
            with open(log, "a") as file:
                file.write(f"{event} {arguments[0]}\\n")

sys.addaudithook(record)
"""
"""Notes which process makes folders, opens files to write, or renames them, in the folder of the run."""


def test_two_processes_of_accelerate_launch_end_alike_and_only_the_first_writes(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "unet")
    basis = basis_for(unet, UNET_TARGETS)
    basis.save(tmp_path / "basis.safetensors")
    collect_concept_probes(unet, [(unet_inputs(6), None)]).save(tmp_path / "probes.safetensors")
    output, ranks = tmp_path / "output", tmp_path / "ranks"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORDER)
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tmp_path / "site"),
        "RECORDED_FOLDER": str(output),
        "RECORD": str(tmp_path / "writes"),
    }
    # `--multi_gpu` means torchrun; on the CPU, accelerate itself would start only one process, or MPI.
    launcher = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    options = ["--concept-basis", tmp_path / "basis.safetensors", "--concept-probes", tmp_path / "probes.safetensors"]
    script = [SCRIPTS / "train_text_to_image.py", "--unet", tmp_path / "unet", "--output_dir", output]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port=0"),
            *("-m", "peft_gradproj.launch", *map(str, options), "--probe-every=2", "--probe-batch-size=2"),
            *(*map(str, script), "--max_train_steps=3", "--ranks_dir", str(ranks)),
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (load_file(ranks / f"{rank}.safetensors") for rank in (0, 1))
    assert {name: tensor.tolist() for name, tensor in first.items()} == {n: t.tolist() for n, t in second.items()}
    for folder in (output / "checkpoint-2", output):
        assert_published(folder, basis)
    saved = load_file(output / "pytorch_lora_weights.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(saved[f"unet.{name}"], tensor, atol=1e-6, rtol=1e-5)
    written = (tmp_path / "writes-0").read_text()
    assert "gradproj.json" in written
    assert "concept_basis.safetensors" in written
    assert not (tmp_path / "writes-1").exists(), (tmp_path / "writes-1").read_text()
