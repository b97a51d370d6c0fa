"""A training script for a flow-matching transformer as users have them, which knows nothing of gradient projection.

As in diffusers' DreamBooth scripts for SD3, Flux and Sana: an adapter on the transformer, prompt embeddings computed
once, noise by the flow's sigmas, weights saved with the adapter's config as metadata, and loaded to look at them.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import (
    _collate_lora_metadata,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader, TensorDataset


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--checkpointing_steps", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint")
    return parser.parse_args()


def main(args):
    accelerator = Accelerator(cpu=True, project_dir=args.output_dir)
    set_seed(0)
    transformer = SD3Transformer2DModel.from_pretrained(args.base, subfolder="transformer")
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights="gaussian",
        target_modules=["attn.add_k_proj", "attn.to_add_out", "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"],
    )
    transformer.add_adapter(config)

    def save_lora(folder, model):
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(model),
            **_collate_lora_metadata({"transformer": model}),
        )

    def save_model_hook(models, weights, output_dir):
        (model,) = models
        weights.pop()
        save_lora(output_dir, accelerator.unwrap_model(model))

    def load_model_hook(models, input_dir):
        model = accelerator.unwrap_model(models.pop())
        state = StableDiffusion3Pipeline.lora_state_dict(input_dir)
        layers = {key.removeprefix("transformer."): value for key, value in state.items()}
        set_peft_model_state_dict(model, layers)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": 1e-2}])
    prompt_embeds, pooled = torch.randn(1, 5, 16), torch.randn(1, 12)
    loader = DataLoader(TensorDataset(torch.randn(4, 4, 8, 8)), batch_size=2, shuffle=True)
    transformer, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        step = int(args.resume_from_checkpoint.rpartition("-")[2])

    while step < args.max_train_steps:
        for (latents,) in loader:
            with accelerator.accumulate([transformer]):
                n, noise = len(latents), torch.randn_like(latents)
                u = compute_density_for_timestep_sampling("logit_normal", n, logit_mean=0.0, logit_std=1.0)
                indices = (u * 1000).long()
                sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
                prediction = transformer(
                    hidden_states=(1.0 - sigmas) * latents + sigmas * noise,
                    timestep=scheduler.timesteps[indices],
                    encoder_hidden_states=prompt_embeds.repeat(n, 1, 1),
                    pooled_projections=pooled.repeat(n, 1),
                    return_dict=False,
                )[0]
                weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas)
                loss = (weighting * (prediction - (noise - latents)) ** 2).mean()
                accelerator.backward(loss)
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
        save_lora(args.output_dir, accelerator.unwrap_model(transformer))
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel.from_pretrained(args.base, subfolder="transformer"),
            scheduler=scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.load_lora_weights(args.output_dir)
        (loaded,) = pipeline.transformer.peft_config.values()
        print(f"loaded as {type(loaded).__name__} with alpha {loaded.lora_alpha}")


if __name__ == "__main__":
    main(parse_args())
