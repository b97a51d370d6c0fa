"""What PEFT's own tests ask of LoRA on custom models, asked of a GradProj adapter on `SmallNet`."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SmallNet
from helpers import LAYERS, small_net_basis, train, trainable
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from peft_gradproj import GradProjConfig
from peft_gradproj.layers import projected_weights

PICTURES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def config(seed: int = 0) -> GradProjConfig:
    basis = small_net_basis(("input", "output", "rank"), seed=seed)
    return GradProjConfig(r=4, lora_alpha=8, target_modules=list(LAYERS), concept_basis=basis)


def trained(base: nn.Module | None = None, *names: str) -> PeftModel:
    """A model with trained adapters, `default` if none are named, the first of which is active."""
    first, *others = names or ("default",)
    model = get_peft_model(base or SmallNet(), config(), adapter_name=first)
    for seed, name in enumerate(others, 1):
        model.add_adapter(name, config(seed))
    for seed, name in enumerate((first, *others)):
        model.set_adapter(name)
        train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 5, seed=seed)
    model.set_adapter(first)
    return model.eval()


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_training_changes_every_parameter_of_the_active_adapter_and_no_other():
    model = get_peft_model(SmallNet(), config(), adapter_name="first")
    model.add_adapter("second", config(1))
    model.set_adapter("second")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 3)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".second." in name}


@pytest.mark.parametrize("safe", [False, True])
def test_merging_changes_no_output_and_unmerging_restores_the_weights(safe):
    model = trained()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    expected = model(PICTURES)
    model.merge_adapter(safe_merge=safe)
    assert any(not torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    close(model(PICTURES), expected)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in base:
            close(parameter, base[name])
    close(model(PICTURES), expected)
    close(copy.deepcopy(model).merge_and_unload(safe_merge=safe)(PICTURES), expected)


def test_what_is_merged_and_unloaded_is_a_bare_model_whose_change_has_no_part_in_the_basis():
    base = SmallNet()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    basis = config().concept_basis
    merged = trained(base).merge_and_unload()
    assert type(merged) is SmallNet
    after = merged.state_dict()
    assert after.keys() == before.keys()
    for name in LAYERS:
        change = (after[f"{name}.weight"] - before[f"{name}.weight"]).flatten(1)
        assert change.norm() > 1e-3
        assert (change @ basis[name].input).norm() < 1e-5 * before[f"{name}.weight"].norm()
        assert (basis[name].output.mT @ change).norm() < 1e-5 * before[f"{name}.weight"].norm()


def test_unloading_without_merging_gives_the_base_model():
    base = SmallNet()
    expected = base(PICTURES)
    model = trained(base)
    assert not torch.allclose(model(PICTURES), expected, atol=1e-4)
    close(model.unload()(PICTURES), expected)


def test_a_merged_adapter_is_off_within_disable_adapter_and_on_again_after_it():
    base = SmallNet()
    expected = base(PICTURES)
    model = trained(base)
    adapted = model(PICTURES)
    model.merge_adapter()
    with model.disable_adapter():
        close(model(PICTURES), expected)
    close(model(PICTURES), adapted)


def test_adapters_are_switched_deleted_and_mixed_within_a_batch():
    model = trained(None, "first", "second")
    outputs = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        outputs[name] = model(PICTURES)
    assert not torch.allclose(outputs["first"], outputs["second"], atol=1e-4)
    mixed = model(PICTURES, adapter_names=["first", "second", "__base__"] * 2)
    close(mixed[0::3], outputs["first"][0::3])
    close(mixed[1::3], outputs["second"][1::3])
    with model.disable_adapter():
        close(mixed[2::3], model(PICTURES)[2::3])
    model.delete_adapter("first")
    assert not [name for name, _ in model.named_modules() if "first" in name]
    assert not [*projected_weights(model, "first")]
    close(model(PICTURES), outputs["second"])
    with pytest.raises(ValueError, match="unknown"):
        model.delete_adapter("unknown")


@pytest.mark.parametrize("trainable_again", [False, True])
def test_a_loaded_adapter_is_trainable_only_if_asked_for(trainable_again, tmp_path):
    trained().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        SmallNet(), tmp_path, config=GradProjConfig.from_pretrained(tmp_path), is_trainable=trainable_again
    )
    expected = {name for name, _ in loaded.named_parameters() if ".default." in name} if trainable_again else set()
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_adapter_on_a_half_precision_model_is_in_float32_unless_told_otherwise(upcast, dtype):
    model = get_peft_model(SmallNet().to(dtype), config(), autocast_adapter_dtype=upcast)
    assert {p.dtype for p in trainable(model)} == {torch.float32 if upcast else dtype}
    output = model(PICTURES.to(dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_the_state_of_an_adapter_has_the_keys_and_shapes_of_loras():
    from peft import LoraConfig

    plain = get_peft_model(SmallNet(), LoraConfig(r=4, target_modules=list(LAYERS)))
    expected = {key: tensor.shape for key, tensor in get_peft_model_state_dict(plain).items()}
    assert {key: tensor.shape for key, tensor in get_peft_model_state_dict(trained()).items()} == expected
