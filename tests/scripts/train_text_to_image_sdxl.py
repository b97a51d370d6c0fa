"""A training script for SDXL as users have them, which knows nothing of gradient projection.

As in diffusers' own: adapters on the UNet and on both text encoders, whose states are joined, and whose pooled output
is a condition beside the time ids; checkpoints through hooks, resume, save, and load the result to look at it.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import _set_state_dict_into_text_encoder
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPTextModel, CLIPTextModelWithProjection


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--checkpointing_steps", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint")
    return parser.parse_args()


def load_models(base):
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    one = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    two = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2")
    return unet, one, two


def encode_prompt(text_encoders, tokens):
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in text_encoders]
    states = torch.cat([output.hidden_states[-1] for output in outputs], dim=-1)
    return states, outputs[-1].text_embeds


def main(args):
    accelerator = Accelerator(cpu=True, project_dir=args.output_dir)
    set_seed(0)
    models = load_models(args.base)
    for model in models:
        model.requires_grad_(False)
    unet, *text_encoders = models
    unet_config = LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
    )
    unet.add_adapter(unet_config)
    text_config = LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]
    )
    for encoder in text_encoders:
        encoder.add_adapter(text_config)

    def save_lora(folder):
        layers = [
            convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(model)))
            for model in (unet, *text_encoders)
        ]
        StableDiffusionXLPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers[0],
            text_encoder_lora_layers=layers[1],
            text_encoder_2_lora_layers=layers[2],
        )

    def save_model_hook(models, weights, output_dir):
        weights.clear()
        save_lora(output_dir)

    def load_model_hook(models, input_dir):
        unet_, *text_encoders_ = [accelerator.unwrap_model(model) for model in models]
        models.clear()
        state, _ = StableDiffusionXLPipeline.lora_state_dict(input_dir)
        layers = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
        set_peft_model_state_dict(unet_, convert_unet_state_dict_to_peft(layers))
        for prefix, encoder in zip(("text_encoder.", "text_encoder_2."), text_encoders_, strict=True):
            _set_state_dict_into_text_encoder(state, prefix=prefix, text_encoder=encoder)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    data = TensorDataset(torch.randn(4, 4, 8, 8), torch.randint(3, 32, (4, 8)))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    unet, *text_encoders, optimizer, loader = accelerator.prepare(unet, *text_encoders, optimizer, loader)
    scheduler = DDPMScheduler()
    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        step = int(args.resume_from_checkpoint.rpartition("-")[2])

    while step < args.max_train_steps:
        for latents, tokens in loader:
            with accelerator.accumulate(unet):
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),))
                states, pooled = encode_prompt(text_encoders, tokens)
                time_ids = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]]).repeat(len(latents), 1)
                prediction = unet(
                    scheduler.add_noise(latents, noise, timesteps),
                    timesteps,
                    states,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
                    return_dict=False,
                )[0]
                accelerator.backward(F.mse_loss(prediction, noise))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                accelerator.save_state(Path(args.output_dir) / f"checkpoint-{step}")
            if step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_lora(args.output_dir)
        unet, one, two = load_models(args.base)
        pipeline = StableDiffusionXLPipeline(
            vae=None,
            text_encoder=one,
            text_encoder_2=two,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
        pipeline.load_lora_weights(args.output_dir)
        loaded = [type(config).__name__ for model in (unet, one, two) for config in model.peft_config.values()]
        print(f"loaded as {', '.join(loaded)}")


if __name__ == "__main__":
    main(parse_args())
