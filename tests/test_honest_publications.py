"""No false alarm: what people honestly publish, made by really training it, is verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallNet
from helpers import LAYERS, small_net_basis, train, trainable
from peft import PeftModel, get_peft_model
from tiny_models import UNET_TARGETS, basis_for, tiny_llama, tiny_unet, unet_inputs

from peft_gradproj import ConceptBasis, ConceptProbes, GradProjConfig, save_adapter, save_sidecars, verify_adapter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Maker = Callable[[Path], ConceptBasis]


def trained(steps: int = 4, basis: ConceptBasis | None = None, **config: Any) -> tuple[Any, ConceptBasis]:
    config = {"r": 4, "lora_alpha": 4, "target_modules": list(LAYERS), **config}
    basis = basis or small_net_basis(r=config["r"])
    model = get_peft_model(SmallNet(), GradProjConfig(concept_basis=basis, **config))
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), steps)
    return model, basis


def with_peft(dtype: str = "float32", **options: Any) -> Maker:
    def make(folder: Path) -> ConceptBasis:
        model, basis = trained(**options)
        save_adapter(model.to(DTYPES[dtype]), folder)
        return basis

    return make


def only(*layers: str, **options: Any) -> Maker:
    return with_peft(target_modules=list(layers), basis=small_net_basis(layers=layers), **options)


def of_spaces(*spaces: str, k: int = 2) -> Maker:
    return with_peft(basis=small_net_basis(spaces, k=k))


def in_one_call(folder: Path) -> ConceptBasis:
    model, basis = trained()
    model.save_pretrained(folder)
    return basis


def combined(kind: str, weights: tuple[float, float]) -> Maker:
    def make(folder: Path) -> ConceptBasis:
        model, basis = trained()
        model.add_adapter("second", GradProjConfig(r=4, target_modules=list(LAYERS), concept_basis=basis))
        model.set_adapter("second")
        train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 4, seed=1)
        model.add_weighted_adapter(["default", "second"], list(weights), "sum", combination_type=kind)
        save_adapter(model, folder, "sum")
        return basis

    return make


def resumed(times: int, dtype: str = "float32") -> Maker:
    def make(folder: Path) -> ConceptBasis:
        model, basis = trained()
        for time in range(times):
            save_adapter(model.to(DTYPES[dtype]), folder)
            config = GradProjConfig.from_pretrained(folder)
            model = PeftModel.from_pretrained(SmallNet(), folder, config=config, is_trainable=True)
            train(model, torch.optim.AdamW(trainable(model), lr=1e-2), 3, seed=time)
        save_adapter(model.to(DTYPES[dtype]), folder)
        return basis

    return make


def of_several_concepts(folder: Path) -> ConceptBasis:
    basis = small_net_basis(k=1).union(small_net_basis(k=2, seed=5))
    assert basis["query"].input.shape[1] == 3
    return with_peft(basis=basis)(folder)


def with_probes(folder: Path) -> ConceptBasis:
    probes = ConceptProbes({"sample": torch.randn(4, 3, 8, 8)}, concept="planted")
    return with_peft(concept_probes=probes, probe_every=1)(folder)


def unet(dtype: str = "float32", targets: Any = UNET_TARGETS, spaces: Any = ("input", "output"), save: Any = None,
         **config: Any) -> Maker:  # fmt: skip
    def make(folder: Path) -> ConceptBasis:
        model = tiny_unet()
        config_of = {"r": 2, "lora_alpha": 2, **config}
        basis = basis_for(model, targets, config_of["r"], spaces)
        model.add_adapter(GradProjConfig(target_modules=targets, concept_basis=basis, **config_of))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for seed in range(2):
            model(**unet_inputs(2, seed)).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        save_adapter(model.to(DTYPES[dtype]), folder, save=None if save is None else lambda stage: save(model, stage))
        return basis

    return make


def as_a_training_script(model: Any, stage: Path) -> None:
    """As diffusers' own scripts end: keys of old, and no config."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(stage, unet_lora_layers=layers, safe_serialization=True)


def with_its_config(model: Any, stage: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    layers, metadata = get_peft_model_state_dict(model), model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(stage, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)


def llama(dtype: str = "float32", with_transformers: bool = False, **config: Any) -> Maker:
    def make(folder: Path) -> ConceptBasis:
        targets = ["q_proj", "v_proj", "down_proj"]
        model = tiny_llama().to(DTYPES[dtype])
        basis = basis_for(model, targets)
        config_of = GradProjConfig(r=4, target_modules=targets, concept_basis=basis, task_type="CAUSAL_LM", **config)
        if with_transformers:
            model.add_adapter(config_of)
        else:
            model = get_peft_model(model, config_of, autocast_adapter_dtype=False)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        tokens = torch.randint(0, 32, (2, 6))
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        if with_transformers:
            model.save_pretrained(folder)
            save_sidecars(model, folder)
        else:
            save_adapter(model, folder)
        return basis

    return make


HONEST: dict[str, Maker] = {
    **{
        f"{dtype}, alpha {alpha}, {'rsLoRA' if rs else 'LoRA'}": with_peft(dtype, lora_alpha=alpha, use_rslora=rs)
        for dtype in DTYPES
        for alpha, rs in ((4, False), (1, False), (64, True))
    },
    **{f"spaces {', '.join(spaces)}": of_spaces(*spaces) for spaces in (
        ("input",), ("output",), ("rank",), ("input", "rank"), ("input", "gradient"),
        ("input", "rank", "output", "gradient"))},
    "one direction": of_spaces("input", "output", k=1),
    "a convolution": only("conv"),
    "a convolution in half precision": only("conv", dtype="float16"),
    "linear layers": only("query", "key"),
    "one layer in bfloat16": only("head", dtype="bfloat16"),
    "rank 1": with_peft(r=1, basis=small_net_basis()),
    "rank beyond the widths": with_peft(r=32, basis=small_net_basis()),
    "rank and alpha by layer": with_peft(
        basis=small_net_basis(), rank_pattern={"query": 2, "conv": 6}, alpha_pattern={"query": 16}),
    "rank by regular expression": with_peft(basis=small_net_basis(), rank_pattern={"^(query|key)$": 3}),
    "layers by regular expression": with_peft(target_modules="conv|query|key|head"),
    "dropout": with_peft(lora_dropout=0.3),
    "untrained": with_peft(steps=0),
    "a single step": with_peft(steps=1),
    "long trained": with_peft(steps=40),
    "initialised gaussian": with_peft(init_lora_weights="gaussian"),
    "initialised at random": with_peft(init_lora_weights=False),
    "initialised orthogonal": only("query", "key", init_lora_weights="orthogonal"),
    "saved by PEFT alone": in_one_call,
    "a sum": combined("linear", (1.0, 1.0)),
    "a difference": combined("linear", (1.0, -0.5)),
    "a concatenation": combined("cat", (0.7, 0.3)),
    "a sum by singular values": combined("svd", (1.0, 1.0)),
    "resumed": resumed(1),
    "resumed in bfloat16, twice": resumed(2, "bfloat16"),
    "several concepts": of_several_concepts,
    "with probes as well": with_probes,
    **{f"a UNet in {dtype}": unet(dtype) for dtype in DTYPES},
    "a UNet's convolutions": unet(targets=["conv1", "conv2", "to_q"]),
    "a UNet, alpha is not the rank": unet(lora_alpha=8, spaces=("output",)),
    "a UNet, as a training script saves it": unet(save=as_a_training_script),
    "a UNet, in half precision as a training script saves it": unet("float16", save=as_a_training_script),
    "a UNet with its config": unet(save=with_its_config, lora_alpha=6),
    "a language model": llama(),
    "a language model in bfloat16": llama("bfloat16"),
    "a language model, saved by transformers": llama(with_transformers=True, use_rslora=True),
}  # fmt: skip


def test_they_are_at_least_forty():
    assert len(HONEST) >= 40


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_publication_is_verified(tmp_path, name):
    basis = HONEST[name](tmp_path / "out")
    for own in (None, basis):
        report = verify_adapter(tmp_path / "out", basis=own)
        assert report.ok, report.render()
    assert len(report.layers) == len(basis)
