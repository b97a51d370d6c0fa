"""LoRAs of whole pipelines, saved by diffusers' own means, from the script to the Hub and back into a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from tiny_models import UNET_TARGETS, basis_for, tiny_text_encoder, tiny_unet
from torch import Tensor, nn

from peft_gradproj import ConceptBasis, push_adapter_to_hub, verify_adapter
from peft_gradproj.launch import LaunchedRun

pytest_plugins = ("hub_server",)

NAME = "user/name"
PUBLISHED = {"pytorch_lora_weights.safetensors", "concept_basis.safetensors", "gradproj.json", "README.md"}
TEXT_TARGETS = ["q_proj", "v_proj"]
PARTS = ("unet", "text_encoder", "text_encoder_2")


def sdxl_unet() -> nn.Module:
    return tiny_unet(
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    )


def sdxl_pipeline() -> Any:
    """Stable Diffusion XL in small, with random weights."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=tiny_text_encoder(CLIPTextModel, projection_dim=12),
        text_encoder_2=tiny_text_encoder(CLIPTextModelWithProjection, projection_dim=12),
        tokenizer=None,
        tokenizer_2=None,
        unet=sdxl_unet(),
        scheduler=DDIMScheduler(),
    )


def whole_basis(pipeline: Any) -> ConceptBasis:
    """Of the UNet, and of the text encoders under the prefixes that diffusers saves them under."""
    layers = dict(basis_for(pipeline.unet, UNET_TARGETS))
    for seed, part in enumerate(PARTS[1:]):
        for name, layer in basis_for(getattr(pipeline, part), TEXT_TARGETS, seed=seed).items():
            layers[f"{part}.{name}"] = layer
    return ConceptBasis(layers, "planted")


def as_peft_names_them(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def as_scripts_save_them(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_diffusers

    return convert_state_dict_to_diffusers(state)


def save_lora_of(pipeline: Any, folder: Path, names: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    layers = {f"{part}_lora_layers": names(get_peft_model_state_dict(getattr(pipeline, part))) for part in PARTS}
    type(pipeline).save_lora_weights(folder, **layers)


@pytest.mark.parametrize(
    ("names", "suffix"), [(as_peft_names_them, ".lora_A.weight"), (as_scripts_save_them, "down.weight")]
)
def test_sdxl_with_both_text_encoders_goes_up_and_comes_back(hub, tmp_path, names, suffix):
    from safetensors.torch import load_file

    pipeline = sdxl_pipeline()
    run = LaunchedRun.from_options({"concept_basis": whole_basis(pipeline)})
    with run.watching():
        for part in PARTS:
            targets = UNET_TARGETS if part == "unet" else TEXT_TARGETS
            getattr(pipeline, part).add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
            for name, parameter in getattr(pipeline, part).named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter)
        save_lora_of(pipeline, tmp_path / "out", names)
    keys = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert {key.partition(".")[0] for key in keys} == set(PARTS)
    assert any(key.endswith(suffix) for key in keys)
    assert {path.name for path in (tmp_path / "out").iterdir()} == PUBLISHED

    report = push_adapter_to_hub(tmp_path / "out", NAME).report
    assert report.ok, report.render()
    assert set(hub.files(NAME)) == PUBLISHED
    pulled = verify_adapter(NAME)
    assert pulled.ok, pulled.render()
    assert {layer.name for layer in pulled.layers} == set(whole_basis(pipeline))

    fresh = sdxl_pipeline()
    # Named, since diffusers may have been imported offline, which it remembers; test_hub.py leaves it to guess.
    fresh.load_lora_weights(NAME, weight_name="pytorch_lora_weights.safetensors", revision=pulled.commit)
    for part in PARTS:
        trained, loaded = getattr(pipeline, part), getattr(fresh, part)
        (adapter,) = loaded.peft_config
        expected, found = get_peft_model_state_dict(trained), get_peft_model_state_dict(loaded, adapter_name=adapter)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("card_on_hub", [None, b"---\nlicense: mit\n---\n# Mine\n\nWritten on the Hub.\n"])
def test_the_upload_of_a_script_has_basis_manifest_and_card(hub, tmp_path, card_on_hub):
    """What diffusers' scripts do with `--push_to_hub`: save, write a card over what is there, upload the folder."""
    from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

    hub.add_repo(NAME, None if card_on_hub is None else {"README.md": card_on_hub})
    unet = tiny_unet()
    run = LaunchedRun.from_options({"concept_basis": basis_for(unet, UNET_TARGETS)})
    with run.watching():
        from huggingface_hub import HfApi, upload_folder

        unet.add_adapter(LoraConfig(r=4, target_modules=UNET_TARGETS))
        unet.save_lora_adapter(tmp_path)
        assert "gradproj:begin" in (tmp_path / "README.md").read_text()
        card = load_or_create_model_card(NAME, from_training=True, model_description="What I trained.", license="mit")
        populate_model_card(card, tags=["lora"]).save(tmp_path / "README.md")
        assert "gradproj:begin" not in (tmp_path / "README.md").read_text()
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "optimizer.bin").write_bytes(b"a pickle")
        upload_folder(repo_id=NAME, folder_path=tmp_path, ignore_patterns=["step_*", "epoch_*"])
        (tmp_path / "README.md").unlink()
        hub.add_repo("user/again")
        HfApi().upload_folder(repo_id="user/again", folder_path=tmp_path)
    for name in (NAME, "user/again"):
        assert set(hub.files(name)) == PUBLISHED
        there = hub.files(name)["README.md"].decode()
        assert f"$ gradproj verify {name}\n" in there
        assert "| orthogonality | passed |" in there
    own = "What I trained." if card_on_hub is None else "Written on the Hub."
    assert own in hub.files(NAME)["README.md"].decode()
    assert verify_adapter(NAME).ok
