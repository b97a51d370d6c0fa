"""Tiny real models of diffusers and transformers, concept bases for them, and the leakage of what they save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import random_layer_basis
from torch import Tensor, nn

from peft_gradproj import ConceptBasis
from peft_gradproj.adapter_folder import parse_lora_layers
from peft_gradproj.projection import leakage

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""What rounding to a dtype may leave of leakage."""


def tiny_unet(**options: Any) -> Any:
    """A UNet of Stable Diffusion; `options` of its config go before the ones here."""
    from diffusers import UNet2DConditionModel

    given = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**given, **options})


def tiny_text_encoder(kind: Any, **options: Any) -> Any:
    """A CLIP text encoder of a class of transformers, likewise."""
    from transformers import CLIPTextConfig

    given = {
        "vocab_size": 32,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    return kind(CLIPTextConfig(**{**given, **options}))


def tiny_llama(vocabulary: int = 32, **options: Any) -> Any:
    """A causal language model, likewise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**given, **options}))


def unet_inputs(n: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(n, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (n,), generator=generator),
        "encoder_hidden_states": torch.randn(n, 5, 12, generator=generator),
    }


def basis_for(
    model: nn.Module,
    targets: Iterable[str],
    r: int = 4,
    spaces: Iterable[str] = ("input", "output"),
    k: int = 2,
    seed: int = 0,
) -> ConceptBasis:
    """A random basis for every layer whose name ends with one of `targets`."""
    endings = tuple(f".{target}" for target in targets)
    spaces = tuple(spaces)
    layers = {}
    for number, (name, module) in enumerate(model.named_modules()):
        if f".{name}".endswith(endings):
            weight: Any = module.weight
            d_out, d_in = weight.flatten(1).shape
            layers[name] = random_layer_basis(d_in, d_out, r, spaces, k, seed=seed + number)
    return ConceptBasis(layers, concept="planted")


def tensors_leakage(tensors: Mapping[str, Tensor], basis: ConceptBasis) -> float:
    """Largest leakage, over layers and the input and output spaces, of LoRA tensors in any layout."""
    parsed = parse_lora_layers(tensors)
    assert not parsed.malformed
    assert not parsed.uncovered
    assert set(parsed.pairs) == set(basis), "the file does not hold the layers that were trained"
    worst = 0.0
    for name, layer in basis.items():
        pair = parsed.pairs[name]
        assert pair.b.norm() > 0, f"{name} was not trained; its leakage would mean nothing"
        for space in ("input", "output"):
            if getattr(layer, space) is not None:
                worst = max(worst, leakage(pair.a, pair.b, getattr(layer, space), space=space))
    return worst


def folder_leakage(folder: str | Path, basis: ConceptBasis) -> float:
    """`tensors_leakage` of the one file of LoRA weights in `folder`."""
    from safetensors.torch import load_file

    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    (file,) = (Path(folder, name) for name in names if Path(folder, name).exists())
    return tensors_leakage(load_file(file), basis)


def tiny_t5() -> nn.Module:
    """A model of an encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()
