"""Train the base model of the demo from one parquet file of captioned pictures.

Two stages. First the autoencoder, on random scenes composed of the pictures. Then, on its cached
latents, the denoiser together with the text encoder. Each stage writes its state into
`--checkpoints` every few minutes and on SIGTERM; the same command continues from there. What is
exported is a StableDiffusionPipeline with averaged (EMA) weights in fp16.

Example:
    python train_base_model.py --checkpoints runs/base_model
    python train_base_model.py --checkpoints runs/base_model --stage export --output exported
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from string import Template

import torch
import torch.nn.functional as F
from architecture import (
    assemble_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    count_parameters,
)
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from pictures import jitter, load_pictures, random_scenes
from torch import Tensor, nn

from peft_gradproj.demo.precision import autocast, autocast_dtype

ASSETS = Path(__file__).resolve().parents[2] / "peft_gradproj" / "demo" / "assets"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. The defaults are what most of the committed model was trained with."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default=ASSETS / "fluent.parquet", help="captioned pictures")
    add("--checkpoints", type=Path, required=True, help="folder for the state of the training")
    add("--output", type=Path, default=ASSETS / "base_model", help="folder for the pipeline")
    add("--stage", choices=["all", "vae", "unet", "export"], default="all", help="what to do")
    add("--seed", type=int, default=0, help="seed of all randomness")
    add("--threads", type=int, default=2, help="threads of the CPU")
    add("--save-minutes", type=float, default=3.0, help="minutes between two checkpoints")
    add("--vae-minutes", type=float, default=10.0, help="length of the autoencoder's training")
    add("--vae-batch-size", type=int, default=8, help="pictures in a step of the autoencoder")
    add("--vae-lr", type=float, default=1.5e-3, help="the autoencoder's highest learning rate")
    add("--kl-weight", type=float, default=1e-4, help="weight of the mean KL divergence")
    add("--variants", type=int, default=1, help="cached variants of each picture")
    add("--steps", type=int, default=4_000, help="steps of the denoiser")
    add("--decay-steps", type=int, default=1_500, help="last steps, with decaying learning rate")
    add("--warmup-steps", type=int, default=200, help="first steps, with rising learning rate")
    add("--batch-size", type=int, default=32, help="pictures in a step of the denoiser")
    add("--muon-lr", type=float, default=1e-2, help="the denoiser's highest learning rate of matrices and convolutions")
    add("--lr", type=float, default=1e-3, help="the denoiser's highest learning rate of everything else")
    add("--noise-power", type=float, default=1.5, help="above 1: more of the noisy timesteps")
    add("--text-dropout", type=float, default=0.1, help="share of pictures with an empty prompt")
    add("--ema-decay", type=float, default=0.999, help="decay of the averaged weights")
    return parser.parse_args(argv)


class Interrupt:
    """Remembers SIGTERM and SIGINT, so that a loop can save its state and leave."""

    def __init__(self) -> None:
        self.received = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


def generator_for(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step, so that a continued run draws what it would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint beside its place and rename it: a killed run leaves the old one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class MuonWithAdamW:
    """Muon for the hidden matrices and convolutions of a model, AdamW for everything else.

    In equal steps it gets much further here than AdamW alone at any learning rate that was tried. Muon takes matrices
    only, so a convolution's kernel (O, I, kh, kw) is given to it as a matrix (O, kh kw I) in the same storage.

    Args:
        model: the model, its convolutions in the memory format channels_last.
        muon_lr, lr: learning rates, before `scale_lr`.
    """

    def __init__(self, model: nn.Module, muon_lr: float, lr: float):
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self.hidden, others = [], []
        for parameter in model.parameters():
            # The first and the last layer see the 4 channels of the latents.
            inner = parameter.ndim > 1 and min(parameter.shape[:2]) > 4 and id(parameter) not in embeddings
            (self.hidden if inner else others).append(parameter)
        self.matrices = [nn.Parameter(self._as_matrix(parameter.data)) for parameter in self.hidden]
        for matrix, parameter in zip(self.matrices, self.hidden, strict=True):
            if matrix.data_ptr() != parameter.data_ptr():
                raise ValueError("a convolution is not in channels_last: its matrix would be a copy")
        self.muon = torch.optim.Muon(self.matrices, lr=muon_lr, weight_decay=0.0)
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.muon_lr, self.lr = muon_lr, lr

    @staticmethod
    def _as_matrix(weight: Tensor) -> Tensor:
        return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)

    def scale_lr(self, factor: float) -> None:
        """Set both learning rates to `factor` times what they were made with."""
        set_lr(self.muon, factor * self.muon_lr)
        set_lr(self.adamw, factor * self.lr)

    def step(self) -> None:
        """Apply the gradients that the model's parameters hold."""
        for matrix, parameter in zip(self.matrices, self.hidden, strict=True):
            matrix.grad = self._as_matrix(parameter.grad)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        """Return both optimizers' states."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore both optimizers' states."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


# ---------------------------------------------------------------------------------- autoencoder


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return differences between neighbours: (N, C, H, W - 1) and (N, C, H - 1, W)."""
    return pictures.diff(dim=3), pictures.diff(dim=2)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Loss of reconstructed pictures (N, 3, H, W); a scalar.

    L1 of pixels, half the L1 of their differences, which keeps edges sharp, and the squared error
    of 4x4 means, since L1 alone is long content with the median colour.
    """
    loss = F.l1_loss(output, target)
    for ours, theirs in zip(edges(output), edges(target), strict=True):
        loss = loss + 0.5 * F.l1_loss(ours, theirs)
    return loss + 5 * F.mse_loss(F.avg_pool2d(output, 4), F.avg_pool2d(target, 4))


def vae_loss(vae: AutoencoderKL, pictures: Tensor, kl_weight: float, noise: Tensor) -> Tensor:
    """Loss of one batch of pictures (N, 3, H, W); `noise` has the latents' shape."""
    with autocast():
        posterior = vae.encode(pictures).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        output = vae.decode(mean + std * noise).sample
    divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.clamp_min(1e-6).log()).mean()
    return reconstruction_loss(output.float(), pictures) + kl_weight * divergence


def train_vae(args: argparse.Namespace, interrupt: Interrupt) -> bool:
    """Train the autoencoder for a given time; return whether it is finished.

    The learning rate follows a half cosine over that time, with a short rise.
    """
    path = args.checkpoints / "vae.pt"
    pictures, _ = load_pictures(args.data)
    torch.manual_seed(args.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = EMAModel(vae.parameters(), decay=0.995)
    step, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["finished"]:
            return True
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, seconds = state["step"], state["seconds"]
    print(f"autoencoder: {count_parameters(vae):,} parameters, from step {step}", flush=True)

    def save(finished: bool) -> None:
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"ema": ema.state_dict(), "step": step, "seconds": seconds, "finished": finished}
        save_atomically(state, path)

    total, saved, loss_sum = args.vae_minutes * 60, seconds, 0.0
    while seconds < total and not interrupt.received:
        start = time.monotonic()
        generator = generator_for(args.seed, step)
        batch = random_scenes(pictures, args.vae_batch_size, generator)
        noise = torch.randn(len(batch), 4, 16, 16, generator=generator)
        lr = args.vae_lr * (0.5 + 0.5 * math.cos(math.pi * seconds / total))
        set_lr(optimizer, lr * min(1, (step + 1) / 50))
        loss = vae_loss(vae, batch.to(memory_format=torch.channels_last), args.kl_weight, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.step(vae.parameters())
        step, loss_sum = step + 1, loss_sum + loss.item()
        seconds += time.monotonic() - start
        if step % 50 == 0:
            print(f"vae step {step} loss {loss_sum / 50:.4f} seconds {seconds:.0f}", flush=True)
            loss_sum = 0.0
        if seconds - saved > 60 * args.save_minutes:
            saved = seconds
            save(False)
    save(seconds >= total)
    return seconds >= total


def load_vae(checkpoints: Path) -> AutoencoderKL:
    """Load the averaged autoencoder."""
    state = torch.load(checkpoints / "vae.pt", weights_only=True)
    vae = build_vae()
    ema = EMAModel(vae.parameters())
    ema.load_state_dict(state["ema"])
    ema.copy_to(vae.parameters())
    return vae.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------- denoiser


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, pictures: Tensor, variants: int, seed: int) -> dict:
    """Encode slightly scaled and shifted variants of all pictures; the first is unchanged.

    Returns:
        `mean` and `std` of the posteriors, both with shape (variants, N, 4, h, w), already scaled
        to unit variance, and `scaling_factor`, the scale.
    """
    means, stds = [], []
    for variant in range(variants):
        generator = generator_for(seed, variant)
        batch = jitter(pictures, 0.06, 0.04, generator) if variant else pictures
        posteriors = [vae.encode(part).latent_dist for part in batch.split(32)]
        means.append(torch.cat([posterior.mean for posterior in posteriors]))
        stds.append(torch.cat([posterior.std for posterior in posteriors]))
    mean, std = torch.stack(means), torch.stack(stds)
    scale = 1 / mean.std().item()
    return {"mean": mean * scale, "std": std * scale, "scaling_factor": scale}


def load_latents(args: argparse.Namespace, pictures: Tensor) -> dict:
    """Read the cached latents, or make them."""
    path = args.checkpoints / "latents.pt"
    if not path.exists():
        vae = load_vae(args.checkpoints)
        save_atomically(cache_latents(vae, pictures, args.variants, args.seed), path)
    latents = torch.load(path, weights_only=True)
    return latents | {key: latents[key][: args.variants] for key in ("mean", "std")}


class TextToLatent(nn.Module):
    """The text encoder and the denoiser, trained as one.

    Args:
        captions: the captions, from which the tokenizer is learned.
    """

    def __init__(self, captions: list[str]):
        super().__init__()
        self.tokenizer = build_tokenizer(captions)
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.unet = build_unet()

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return token ids with shape (N, TOKENS)."""
        return self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Predict the velocity of latents (N, 4, h, w) at timesteps (N,) under ids (N, TOKENS)."""
        text = self.text_encoder(ids)[0]
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


def schedule(args: argparse.Namespace, step: int) -> float:
    """Factor of the learning rates: rising, then 1, then a half cosine to zero over the last `--decay-steps`."""
    left = min(1.0, (args.steps - step) / max(1, args.decay_steps))
    return min(1.0, (step + 1) / args.warmup_steps) * (0.5 - 0.5 * math.cos(math.pi * left))


def draw_batch(args: argparse.Namespace, latents: dict, ids: Tensor, empty: Tensor, step: int):
    """Draw clean latents (B, 4, h, w), noise alike, timesteps (B,) and token ids (B, TOKENS).

    Timesteps are stratified: each batch covers all noise levels. With a power above 1 there are
    more of the noisy ones, where the prompt decides the layout, which takes longest to learn.
    """
    generator = generator_for(args.seed, step)
    batch, (variants, count) = args.batch_size, latents["mean"].shape[:2]
    which = torch.randperm(count, generator=generator)[:batch]
    variant = torch.randint(variants, (len(which),), generator=generator)
    mean, std = latents["mean"][variant, which], latents["std"][variant, which]
    clean = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    share = (torch.arange(len(which)) + torch.rand(len(which), generator=generator)) / len(which)
    timesteps = (1000 * (1 - share**args.noise_power)).long().clamp(0, 999)
    dropped = torch.rand(len(which), 1, generator=generator) < args.text_dropout
    return clean, noise, timesteps, torch.where(dropped, empty, ids[which])


def restore(path: Path, model: nn.Module, optimizer: MuonWithAdamW, ema: EMAModel) -> int:
    """Load a checkpoint if there is one; return the step to continue from."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return state["step"]


def train_unet(args: argparse.Namespace, interrupt: Interrupt) -> None:
    """Train the denoiser with the text encoder up to `--steps`."""
    path = args.checkpoints / "unet.pt"
    pictures, captions = load_pictures(args.data)
    latents = load_latents(args, pictures)
    torch.manual_seed(args.seed)
    model = TextToLatent(captions)
    model.unet.to(memory_format=torch.channels_last)
    # Fused attention, the default, is slower than matrix products on a CPU: its backward takes a fifth of a step.
    model.unet.set_attn_processor(AttnProcessor())
    optimizer = MuonWithAdamW(model, args.muon_lr, args.lr)
    ema = EMAModel(model.parameters(), decay=args.ema_decay, foreach=True)
    scheduler = build_scheduler()
    ids, empty = model.tokenize(captions), model.tokenize([""])
    step = restore(path, model, optimizer, ema)
    print(
        f"denoiser: {count_parameters(model.unet):,} parameters, text encoder: "
        f"{count_parameters(model.text_encoder):,}, from step {step}",
        flush=True,
    )
    loss_sum, loss_mean, start, saved = 0.0, float("nan"), time.monotonic(), time.monotonic()

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically(state | {"ema": ema.state_dict(), "step": step, "loss": loss_mean}, path)

    while step < args.steps and not interrupt.received:
        optimizer.scale_lr(schedule(args, step))
        clean, noise, timesteps, prompt = draw_batch(args, latents, ids, empty, step)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        with autocast():
            # Not compiled: torch 2.13 on a CPU then gives convolutions that start at zero, as the last of each residual
            # branch does, a gradient of exactly zero, and they are never trained.
            output = model(noisy, timesteps, prompt)
        loss = F.mse_loss(output.float(), target)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        step, loss_sum = step + 1, loss_sum + loss.item()
        if step % 100 == 0:
            seconds, start = (time.monotonic() - start) / 100, time.monotonic()
            loss_mean, loss_sum = loss_sum / 100, 0.0
            print(f"step {step} loss {loss_mean:.4f} seconds/step {seconds:.3f}", flush=True)
        if time.monotonic() - saved > 60 * args.save_minutes:
            save()
            saved = time.monotonic()
    save()


# --------------------------------------------------------------------------------------- export


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights of the last checkpoints as a pipeline in fp16."""
    _, captions = load_pictures(args.data)
    model = TextToLatent(captions)
    state = torch.load(args.checkpoints / "unet.pt", weights_only=True)
    state["vae_steps"] = torch.load(args.checkpoints / "vae.pt", weights_only=True)["step"]
    ema = EMAModel(model.parameters())
    ema.load_state_dict(state["ema"])
    ema.copy_to(model.parameters())
    vae = load_vae(args.checkpoints)
    latents = torch.load(args.checkpoints / "latents.pt", weights_only=True)
    vae.register_to_config(scaling_factor=latents["scaling_factor"])
    pipeline = assemble_pipeline(vae, model.text_encoder, model.tokenizer, model.unet)
    write_pipeline(pipeline, args.output, state)
    print(f"exported step {state['step']}, loss {state['loss']:.4f}, to {args.output}")


def write_pipeline(pipeline: StableDiffusionPipeline, folder: Path, state: dict) -> None:
    """Write a pipeline in fp16 beside its place and rename it: nobody reads half of it."""
    partial, old = (
        folder.with_name(folder.name + ".partial"),
        folder.with_name(folder.name + ".old"),
    )
    for stale in (partial, old):
        shutil.rmtree(stale, ignore_errors=True)
    counts = {name: f"{count_parameters(getattr(pipeline, name)):,}" for name in ("vae", "unet", "text_encoder")}
    pipeline.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    load_in_fp32(partial / "text_encoder" / "config.json")
    card = Template((Path(__file__).parent / "model_card.md").read_text(encoding="utf-8"))
    figures = {"step": f"{state['step']:,}", "loss": f"{state['loss']:.3f}"}
    figures["precision"] = "float32" if autocast_dtype() is None else "bfloat16 autocast"
    figures["vae_steps"] = f"{state['vae_steps']:,}"
    (partial / "README.md").write_text(card.substitute(counts, **figures), encoding="utf-8")
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_in_fp32(config: Path) -> None:
    """Make transformers load the stored fp16 weights as fp32, which is what diffusers does."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run the stages that were asked for, each from where it stopped."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    if args.stage == "export":
        return export(args)
    interrupt = Interrupt()
    finished = args.stage == "unet" or train_vae(args, interrupt)
    if finished and args.stage != "vae":
        train_unet(args, interrupt)
        if not interrupt.received and args.stage == "all":
            export(args)


if __name__ == "__main__":
    main()
