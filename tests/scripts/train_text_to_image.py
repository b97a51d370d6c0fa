"""A training script as users have them, which knows nothing of gradient projection.

It calls diffusers, PEFT and accelerate in the order in which diffusers' text-to-image LoRA scripts do: add an adapter
for training, train under accelerate, checkpoint through hooks, resume, save, and load the result to look at it.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPTextConfig, CLIPTextModel


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--unet", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--checkpointing_steps", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--strength", help="a name that the launcher has too")
    parser.add_argument("--ranks_dir", help="where each process leaves the weights that it ended with")
    return parser.parse_args()


def tiny_text_encoder():
    torch.manual_seed(5)
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return CLIPTextModel(config)


def pipeline_of(unet):
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(args):
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=args.mixed_precision, project_dir=args.output_dir
    )
    set_seed(0)
    text_encoder = tiny_text_encoder()
    unet = UNet2DConditionModel.from_pretrained(args.unet)
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    if args.mixed_precision == "bf16":
        unet.to(torch.bfloat16)
    config = LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
    )
    unet.add_adapter(config)
    if args.train_text_encoder:
        text_config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
        text_encoder.add_adapter(text_config)

    models = [unet, text_encoder] if args.train_text_encoder else [unet]
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    data = TensorDataset(torch.randn(16, 4, 8, 8), torch.randint(3, 32, (16, 8)))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    *models, optimizer, loader = accelerator.prepare(*models, optimizer, loader)
    unet = models[0]
    if args.train_text_encoder:
        text_encoder = models[1]

    def lora_layers(model):
        return convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(model)))

    def save_lora(folder):
        text_layers = lora_layers(text_encoder) if args.train_text_encoder else None
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=lora_layers(unet), text_encoder_lora_layers=text_layers
        )

    def save_model_hook(models, weights, output_dir):
        weights.clear()
        save_lora(output_dir)

    def load_model_hook(models, input_dir):
        models.clear()
        state, _ = StableDiffusionPipeline.lora_state_dict(input_dir)
        layers = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
        set_peft_model_state_dict(accelerator.unwrap_model(unet), convert_unet_state_dict_to_peft(layers))

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        step = int(args.resume_from_checkpoint.rpartition("-")[2])

    while step < args.max_train_steps:
        for latents, tokens in loader:
            with accelerator.accumulate(unet):
                timesteps = torch.randint(0, 1000, (len(latents),))
                dtype = accelerator.unwrap_model(unet).dtype
                states = text_encoder(tokens)[0].to(dtype)
                prediction = unet(latents.to(dtype), timesteps, states).sample
                loss = F.mse_loss(prediction.float(), latents)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                print(f"step {step} loss {loss.item():.4f}")
                if step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                    accelerator.save_state(Path(args.output_dir) / f"checkpoint-{step}")
                if step >= args.max_train_steps:
                    break

    if args.ranks_dir:
        Path(args.ranks_dir).mkdir(exist_ok=True)
        save_file(lora_layers(unet), Path(args.ranks_dir) / f"{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(unet).to(torch.float32)
        save_lora(args.output_dir)
        pipeline = pipeline_of(UNet2DConditionModel.from_pretrained(args.unet))
        pipeline.load_lora_weights(args.output_dir)
        (loaded,) = pipeline.unet.peft_config.values()
        print(f"trained as {type(accelerator.unwrap_model(unet).peft_config['default']).__name__}")
        print(f"loaded as {type(loaded).__name__}")


if __name__ == "__main__":
    main(parse_args())
