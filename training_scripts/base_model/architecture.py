"""The parts of the base model: a Stable Diffusion pipeline small enough to train on two cores.

Pictures of 64x64 pixels become latents of 4x16x16. All parts are the stock classes of diffusers
and transformers, so everything that works on Stable Diffusion works on this model.
"""

from __future__ import annotations

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    ModelMixin,
    StableDiffusionPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

__all__ = [
    "assemble_pipeline",
    "build_scheduler",
    "build_text_encoder",
    "build_tokenizer",
    "build_unet",
    "build_vae",
    "count_parameters",
]

TOKENS = 8
"""Length of a prompt in tokens, with start and end: what the longest caption needs, for padding
dilutes the words."""
TEXT_WIDTH = 160


def silence_residuals(model: ModelMixin) -> ModelMixin:
    """Set the last layer of each residual branch to zero: the model starts nearly linear."""
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            last = module.conv2
        elif isinstance(module, Transformer2DModel):
            last = module.proj_out
        elif isinstance(module, Attention) and module.residual_connection:
            last = module.to_out[0]
        else:
            continue
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


def carry_channels(vae: AutoencoderKL) -> AutoencoderKL:
    """Let the convolutions of the main path start as copies of their first channels, plus noise.

    So red, green and blue reach the latents and the output from the first step. With the usual
    start, brightness is learned first and the pictures stay grey for thousands of steps.
    """
    branches = [
        layer for module in vae.modules() if isinstance(module, ResnetBlock2D) for layer in (module.conv1, module.conv2)
    ]
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and all(module is not layer for layer in branches):
            copy = nn.init.dirac_(torch.empty_like(module.weight))
            module.weight.data.mul_(0.5).add_(copy)
    return vae


def build_vae() -> AutoencoderKL:
    """Build the autoencoder: (N, 3, 64, 64) in [-1, 1] to latents (N, 4, 16, 16)."""
    vae = AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    carry_channels(silence_residuals(vae))
    # The latents start almost without noise: noise as large as the signal hides the colours.
    nn.init.zeros_(vae.quant_conv.weight[4:])
    nn.init.constant_(vae.quant_conv.bias[4:], -6.0)
    return vae


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser of latents (N, 4, 16, 16) under text (N, TOKENS, TEXT_WIDTH).

    Besides the cross-attention the pooled text is added to the embedding of the timestep: with
    cross-attention alone the prompts were still ignored after a thousand steps.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        norm_num_groups=16,
    )
    return silence_residuals(unet)


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Learn a CLIP tokenizer in which each word of the captions is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    captions = sorted(captions)
    last_letters = sorted({word[-1] for caption in captions for word in caption.lower().split()})
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        show_progress=False,
        # Else they are numbered in an order that differs between runs, and with them which of two equally frequent
        # merges comes first.
        special_tokens=[f"{letter}</w>" for letter in last_letters],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(captions, trainer)
    return clip_tokenizer(bpe)


def clip_tokenizer(bpe: Tokenizer) -> CLIPTokenizer:
    """Turn a byte-pair encoding into a CLIPTokenizer with the vocabulary in CLIP's order."""
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet]
    words += ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder: token ids (N, TOKENS) to embeddings (N, TOKENS, TEXT_WIDTH)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Build the noise schedule.

    The last step is pure noise (zero terminal SNR), since a model that always sees a trace of the
    picture in training paints grey where the ground should be white.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def assemble_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """Put the parts together, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
