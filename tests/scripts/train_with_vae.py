"""A training script that encodes pictures itself, and knows nothing of masks.

As in diffusers' text-to-image and DreamBooth scripts: pictures are cropped and mirrored at random, encoded, noised and
denoised under accelerate with accumulation; in between the model is sampled from, as for validation. What each training
pass saw is recorded, so that a test can look at it.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=2)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--pictures", type=int, default=5)
    parser.add_argument("--cache_latents", action="store_true")
    return parser.parse_args()


def main(args):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=args.mixed_precision)
    set_seed(0)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae").requires_grad_(False).to(dtype)
    unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet").requires_grad_(False).to(dtype)
    scheduler = DDPMScheduler.from_pretrained(args.base, subfolder="scheduler")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    pictures = F.interpolate(torch.rand(args.pictures, 3, 6, 6) * 2 - 1, size=(36, 36), mode="bicubic")
    words = torch.randn(1, 5, 12, dtype=dtype)
    unet, optimizer = accelerator.prepare(unet, optimizer)

    def batches():
        # The last one may be smaller.
        for batch in pictures.split(2):
            top, left = torch.randint(5, (2,)).tolist()
            crop = batch[..., top : top + 32, left : left + 32]
            yield (crop.flip(-1) if torch.rand(()) < 0.5 else crop).to(dtype)

    def encoded():
        for batch in batches():
            yield vae.encode(batch).latent_dist

    cached = list(encoded()) if args.cache_latents else None
    step, seen = 0, []
    while step < args.max_train_steps:
        for posterior in cached or encoded():
            with accelerator.accumulate(unet):
                latents = posterior.sample() * vae.config.scaling_factor
                noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
                noisy = scheduler.add_noise(latents, noise, timesteps)
                prediction = unet(noisy, timesteps, words.expand(len(latents), -1, -1), return_dict=False)[0]
                prediction.retain_grad()
                loss = F.mse_loss(prediction.float(), noise.float())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            expected = 2 * (prediction - noise).detach().float() / prediction.numel() / 2
            seen.append((posterior.mode().float(), prediction.grad.float(), expected))
            if accelerator.sync_gradients:
                step += 1
                sample(vae, accelerator.unwrap_model(unet), scheduler, words)
                if step >= args.max_train_steps:
                    break

    Path(args.output_dir).mkdir(exist_ok=True)
    torch.save(seen, Path(args.output_dir) / "seen.pt")
    model = accelerator.unwrap_model(unet)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)
    print(f"trained as {type(model.peft_config['default']).__name__}")


def sample(vae, unet, scheduler, words):
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    unet.eval()
    with torch.autocast("cpu", enabled=vae.dtype != torch.float32, dtype=torch.bfloat16):
        pipeline(prompt_embeds=words, guidance_scale=1, num_inference_steps=2, output_type="pt")
    unet.train()


if __name__ == "__main__":
    main(parse_args())
