"""What projection costs in a training step, against a stock LoRA in the same run.

All arms are adapters on one UNet with random weights, and their steps are interleaved, so that whatever else the
machine is doing meets them alike. Reported are medians and quartiles of each arm's step time as a ratio to stock
LoRA's, the peak memory of a process that trains one arm only, again as a ratio, and the cost of fitting a basis and
of importing the package.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json
    python benchmarks/overhead.py --model sd15 --steps 8
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from tqdm import tqdm

import peft_gradproj
from peft_gradproj import (
    ConceptBasis,
    ConceptProbes,
    GradProjConfig,
    LayerBasis,
    collect_concept_probes,
    fit_concept_basis,
)
from peft_gradproj.projection import orthonormal_basis

ARMS = ("stock", "subspace", "online", "both")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
MODELS: dict[str, dict[str, Any]] = {
    # The architecture of the project's own base model, four times as wide.
    "small": {
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (128, 256, 384),
        "layers_per_block": 1,
        "cross_attention_dim": 256,
    },
    # Stable Diffusion 1.5, on 16x16 latents.
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small", help="Which UNet, with random weights.")
    parser.add_argument("--steps", type=int, default=40, help="Steps per arm.")
    parser.add_argument("--batch-size", type=int, default=8, help="Training batch size; probes use the same.")
    parser.add_argument("--rank", type=int, default=16, help="Rank r of the adapters.")
    parser.add_argument("--basis-rank", type=int, default=16, help="Columns k of each basis.")
    parser.add_argument("--output", type=Path, help="Where to write the figures as JSON.")
    parser.add_argument("--only", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def build_unet(name: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**MODELS[name]).to(torch.bfloat16).requires_grad_(False)


def random_inputs(unet: UNet2DConditionModel, batch: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    return {
        "sample": torch.randn(batch, 4, 16, 16, generator=generator),
        "timestep": torch.randint(1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 16, width, generator=generator),
    }


def random_basis(unet: UNet2DConditionModel, k: int) -> ConceptBasis:
    """A basis of the width of each target; what it spans does not matter for its cost."""
    layers = {}
    for name, module in unet.named_modules():
        if name.endswith(tuple(TARGETS)):
            weight = module.weight.flatten(1)
            spans = (orthonormal_basis(torch.randn(d, min(k, d // 2))) for d in reversed(weight.shape))
            layers[name] = LayerBasis(**dict(zip(("input", "output"), spans, strict=True)))
    return ConceptBasis(layers)


def add_arm(unet: UNet2DConditionModel, arm: str, args: argparse.Namespace, probes: ConceptProbes | None) -> None:
    common: dict[str, Any] = {"r": args.rank, "lora_alpha": args.rank, "target_modules": TARGETS}
    if arm == "stock":
        unet.add_adapter(LoraConfig(**common), arm)
        return
    basis = random_basis(unet, args.basis_rank) if arm in ("subspace", "both") else None
    online = probes if arm in ("online", "both") else None
    unet.add_adapter(GradProjConfig(**common, concept_basis=basis, concept_probes=online), arm)


def make_step(unet: UNet2DConditionModel, arm: str, batch_size: int) -> Callable[[int], None]:
    weights = [p for n, p in unet.named_parameters() if f".{arm}." in n]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step(index: int) -> None:
        inputs = random_inputs(unet, batch_size, index)
        with torch.autocast("cpu", torch.bfloat16):
            loss = unet(**inputs).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train_one(args: argparse.Namespace) -> None:
    """Train one arm alone and print the peak memory of this process in bytes."""
    unet = build_unet(args.model)
    probes = make_probes(unet, args.batch_size) if args.only in ("online", "both") else None
    add_arm(unet, args.only, args, probes)
    step = make_step(unet, args.only, args.batch_size)
    for index in range(5):
        step(index)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def make_probes(unet: UNet2DConditionModel, batch_size: int) -> ConceptProbes:
    batches = [(random_inputs(unet, batch_size, 10_000 + i), torch.ones(batch_size, 1, 16, 16)) for i in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        return collect_concept_probes(unet, batches)


def measure_steps(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step of each arm, interleaved; the first rounds warm up and are dropped."""
    unet = build_unet(args.model)
    probes = make_probes(unet, args.batch_size)
    for arm in ARMS:
        add_arm(unet, arm, args, probes)
    steps = {}
    for arm in ARMS:
        unet.set_adapter(arm)
        steps[arm] = make_step(unet, arm, args.batch_size)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    # A multiple of `probe_every`, so that every arm's corrected steps are counted at their true frequency.
    warm_up = 4
    for index in tqdm(range(warm_up + args.steps), desc="interleaved steps"):
        for arm in ARMS:
            unet.set_adapter(arm)
            start = time.perf_counter()
            steps[arm](index)
            if index >= warm_up:
                seconds[arm].append(time.perf_counter() - start)
    return seconds


def measure_memory(args: argparse.Namespace) -> dict[str, int]:
    """Peak memory in bytes of a process that trains one arm only."""
    own = ("--model", args.model, "--batch-size", str(args.batch_size), "--rank", str(args.rank))
    peaks = {}
    for arm in tqdm(ARMS, desc="peak memory"):
        command = [sys.executable, __file__, *own, "--basis-rank", str(args.basis_rank), "--only", arm]
        peaks[arm] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return peaks


def measure_fit(args: argparse.Namespace, stock_step: float) -> float:
    """Cost of fitting input and output bases on 8 pairs of batches, in stock training steps."""
    unet = build_unet(args.model).float()
    halves = [[random_inputs(unet, args.batch_size, offset + i) for i in range(8)] for offset in (0, 100)]
    start = time.perf_counter()
    fit_concept_basis(unet, *halves, target_modules=TARGETS, rank=args.basis_rank, progress=False)
    return (time.perf_counter() - start) / stock_step


def measure_import() -> float:
    """Seconds that importing us adds to `import peft`."""
    program = (
        "import time, peft; s = time.perf_counter(); import peft_gradproj; "
        "peft_gradproj.GradProjConfig; print(time.perf_counter() - s)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], check=True, capture_output=True) for _ in range(3)]
    return min(float(run.stdout) for run in runs)


def mean_ratio(times: list[float], stock: list[float]) -> dict[str, float]:
    """Mean over blocks of four steps, one of them corrected, against stock's same block; quartiles of the blocks."""
    blocks = [sum(times[i : i + 4]) / sum(stock[i : i + 4]) for i in range(0, len(times) - 3, 4)]
    low, middle, high = statistics.quantiles(blocks, n=4) if len(blocks) > 1 else blocks * 3
    return {"median": middle, "quartiles": [low, high]}


def main() -> None:
    args = parse_args()
    if args.only:
        train_one(args)
        return
    seconds = measure_steps(args)
    stock = statistics.median(seconds["stock"])
    memory = measure_memory(args)
    report = {
        "command": "python benchmarks/overhead.py " + " ".join(sys.argv[1:]),
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "only")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "peft": peft.__version__,
            "diffusers": diffusers.__version__,
            "peft_gradproj": peft_gradproj.__version__,
        },
        "step_seconds_stock": stock,
        "step_ratio": {arm: mean_ratio(seconds[arm], seconds["stock"]) for arm in ARMS},
        "peak_memory_ratio": {arm: memory[arm] / memory["stock"] for arm in ARMS},
        "fit_in_stock_steps": measure_fit(args, stock),
        "import_seconds": measure_import(),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
