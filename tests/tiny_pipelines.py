"""Tiny random pipelines of the real classes, 32 pixels a side, and training data as people keep it on a disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_models import tiny_text_encoder, tiny_unet

SIDE = 32
WORDS = 12
"""Width of the text encoders."""
TOKENS = 40


def tokenizer() -> Any:
    """A CLIP tokenizer that knows single letters."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "th", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("t", "h")], model_max_length=TOKENS)


def text_encoder(kind: Any, tokens: Any) -> Any:
    return tiny_text_encoder(
        kind,
        vocab_size=len(tokens),
        hidden_size=WORDS,
        projection_dim=WORDS,
        max_position_embeddings=TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    ).eval()


def vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        **options,
    ).eval()


def unet(**options: Any) -> Any:
    return tiny_unet(**{"sample_size": SIDE // 2, "cross_attention_dim": WORDS, **options}).eval()


def sd(**scheduler: Any) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokens = tokenizer()
    options = {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1, **scheduler}
    return quiet(
        StableDiffusionPipeline(
            vae(),
            text_encoder(CLIPTextModel, tokens),
            tokens,
            unet(),
            PNDMScheduler(**options),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokens = tokenizer()
    return quiet(
        StableDiffusionXLPipeline(
            vae(),
            text_encoder(CLIPTextModel, tokens),
            text_encoder(CLIPTextModelWithProjection, tokens),
            tokens,
            tokens,
            unet(
                cross_attention_dim=2 * WORDS,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WORDS,
                use_linear_projection=True,
            ),
            EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        )
    )


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokens = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WORDS,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WORDS,
        pos_embed_max_size=SIDE // 4,
    ).eval()
    encoders = [text_encoder(CLIPTextModelWithProjection, tokens) for _ in range(2)]
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=encoders[0],
            tokenizer=tokens,
            text_encoder_2=encoders[1],
            tokenizer_2=tokens,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


PIPELINES = {"sd": sd, "sd-v": lambda: sd(prediction_type="v_prediction"), "sdxl": sdxl, "sd3": sd3}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture of a width and height."""
    levels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


def logo(side: int = 20) -> Image.Image:
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    image.paste((250, 20, 240, 255), (side // 4, 0, side, side))
    return image


def image_folder(folder: Path, captions: list[str], *, metadata: bool = True) -> Path:
    """Pictures of several sizes with their captions."""
    folder.mkdir(parents=True)
    lines = []
    for index, caption in enumerate(captions):
        picture(index, (48, 40) if index % 2 else (36, 44)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    if metadata:
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
