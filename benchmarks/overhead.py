"""What projection costs in training: step time and peak memory against stock LoRA, DoRA and OSF of PEFT.

The models have random weights: a UNet of the size of Stable Diffusion 1.5, and a Llama of 1.2 billion parameters, both
in bfloat16 under autocast, or in float32 on a processor without AVX-512, where bfloat16 is tens of times slower; their
adapters in float32, AdamW. Every figure is of one *cell*, which is written as soon as it is measured, so that a run can
be interrupted and goes on where it was:

| cell | what it holds |
|---|---|
| `steps/MODEL/rR/kK` | seconds of each step of each arm, one arm after the other in every round |
| `memory/MODEL/rR/kK` | peak memory of a process that trains one arm, for each arm |
| `operators/MODEL/rR/kK` | operators that a step dispatches, in a model as deep and not as wide |
| `parts/MODEL/rR/kK` | seconds that the parts of both projections take by themselves |
| `fit/MODEL` | seconds to fit a concept basis, beside those of a stock step |
| `osf/MODEL` | step time of OSF on the attention alone: it decomposes every adapted layer, which takes minutes |
| `verify`, `import` | what `verify.py` measures; seconds that the import adds to PEFT's |

In a round every arm takes the same step on the same batch, so that whatever else the machine is doing meets them
alike, and what is reported is the median, over the rounds, of an arm's seconds over stock LoRA's. Corrected steps of
the online projection are told apart and counted at the share that they have by default. The probe batch is half of the
training batch, as the default of 2 is of a batch of 4: the online projection costs about
(probe batch / batch) / probe_every.

    python -m benchmarks.overhead                                      # the whole grid
    python -m benchmarks.overhead --cells 'steps/sd15/r16/*' 'import'  # some of it
    python -m benchmarks.overhead_page                                 # docs/overhead.md, of what is measured so far
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.overhead_page import QUICK_RESULTS, RESULTS, ratios
from benchmarks.revision import revision
from peft_gradproj import (
    ConceptBasis,
    ConceptProbes,
    GradProjConfig,
    LayerBasis,
    collect_concept_probes,
    fit_concept_basis,
    online,
)
from peft_gradproj.demo.precision import autocast, autocast_dtype
from peft_gradproj.files import write_atomically
from peft_gradproj.layers import projected_weights
from peft_gradproj.observation import find_layers
from peft_gradproj.projection import dtype_name, orthonormal_basis

ROOT = Path(__file__).parent.parent
RANKS = (16, 4, 64)
BASIS_RANKS = (16, 0, 8, 64)
PROBE_EVERY = GradProjConfig.probe_every
FIT_PAIRS = 8


# Models


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    inputs: Callable[[int, int], dict[str, Tensor]]
    """`inputs(batch, seed)`: a random batch."""
    loss: Callable[[Any, dict[str, Tensor]], Tensor]
    """`loss(output, inputs)`."""
    batch: int
    store_targets: bool
    """Whether the probes hold the base model's outputs, or have them computed anew."""
    described: str

    @property
    def probe_batch(self) -> int:
        """Probes of a correction."""
        return max(1, self.batch // 2)


def unet(width: int, side: int, batch: int, text: tuple[int, int], levels: int = 4, layers: int = 2) -> Workload:
    """Stable Diffusion's UNet with `width` channels at its largest resolution, on latents of `side` by `side`."""
    tokens, text_width = text

    def build() -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=tuple(width * factor for factor in (1, 2, 4, 4)[:levels]),
            down_block_types=(*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * (levels - 1)),
            layers_per_block=layers,
            cross_attention_dim=text_width,
        )

    def inputs(n: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "sample": torch.randn(n, 4, side, side, generator=generator),
            "timestep": torch.randint(1000, (n,), generator=generator),
            "encoder_hidden_states": torch.randn(n, tokens, text_width, generator=generator),
        }

    def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(output.sample.float(), batch["sample"])

    described = f"batch {batch} of {side}x{side} latents and {tokens} text tokens"
    return Workload(build, ("to_q", "to_k", "to_v", "to_out.0"), inputs, loss, batch, True, described)


def llama(width: int, inner: int, vocabulary: int, tokens: int, batch: int, layers: int = 16) -> Workload:
    """A causal language model with the layers of Llama 3.2 1B."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def inputs(n: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(vocabulary, (n, tokens), generator=generator)}

    def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = output.logits[:, :-1].float().flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Workload(build, targets, inputs, loss, batch, False, f"batch {batch} of {tokens} tokens")


MODELS = {
    "sd15": unet(320, 16, batch=8, text=(77, 768)),
    "llama1b": llama(2048, 8192, 128_256, tokens=64, batch=2),
}
AT_512_PIXELS = unet(320, 64, batch=2, text=(77, 768))
"""The latents that Stable Diffusion 1.5 was made for; a step takes two cores the better part of a minute."""
NARROW = {
    "sd15": unet(32, 8, batch=2, text=(4, 16)),
    "llama1b": llama(64, 128, 64, tokens=8, batch=2),
}
"""As deep, with as many layers to adapt, but narrow: for counting operators."""
QUICK = {
    "sd15": unet(32, 8, batch=2, text=(4, 16), levels=2, layers=1),
    "llama1b": llama(64, 128, 64, tokens=8, batch=2, layers=2),
}
"""For `--quick`."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in `dtype` meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(work: Workload) -> nn.Module:
    """The base model, with random weights in the precision that it is trained in."""
    torch.manual_seed(0)
    with default_dtype(autocast_dtype() or torch.float32):
        return work.build().requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """A model of its own with the same tensors, so that arms share the base and nothing else."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


# Arms

ALL_ARMS = ("stock", "subspace", "online", "both", "dora")


def adapt(base: nn.Module, arm: str, work: Workload, r: int, k: int, *, probe_every: int = PROBE_EVERY) -> nn.Module:
    """The base with the adapter of an arm: stock, dora, osf, subspace, online or both."""
    model, targets = twin(base), list(work.targets)
    if arm == "osf":
        return get_peft_model(model, OSFConfig(target_modules=targets))
    lora: dict[str, Any] = {"r": r, "lora_alpha": r, "target_modules": targets}
    if arm in ("stock", "dora"):
        return get_peft_model(model, LoraConfig(use_dora=arm == "dora", **lora))
    config = GradProjConfig(
        concept_basis=random_basis(model, work, k) if arm in ("subspace", "both") else None,
        concept_probes=random_probes(model, work) if arm in ("online", "both") else None,
        probe_batch_size=work.probe_batch,
        probe_every=probe_every,
        **lora,
    )
    return get_peft_model(model, config)


def arms_of(k: int) -> tuple[str, ...]:
    """What is compared at a rank of the basis; without a basis, what does not depend on it."""
    return ("stock", "subspace", "both") if k else ("stock", "online", "dora")


def random_basis(model: nn.Module, work: Workload, k: int) -> ConceptBasis:
    """An input and an output basis for every adapted layer; what they span does not matter for their cost."""
    layers = find_layers(model, list(work.targets))
    spans = {d: orthonormal_basis(torch.randn(d, min(k, d // 2))) for x in layers for d in (x.d_in, x.d_out)}
    return ConceptBasis({x.name: LayerBasis(input=spans[x.d_in], output=spans[x.d_out]) for x in layers})


def random_probes(model: nn.Module, work: Workload) -> ConceptProbes:
    """Probes for four corrections."""
    batches = ((work.inputs(work.probe_batch, 10_000 + i), None) for i in range(4))
    with autocast():
        return collect_concept_probes(model, batches, store_targets=work.store_targets)


def make_step(model: nn.Module, work: Workload) -> Callable[[int], None]:
    """A function that takes the optimizer step of a number."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step(number: int) -> None:
        inputs = work.inputs(work.batch, number)
        with autocast():
            output = model(**inputs)
        work.loss(output, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# Step time


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that a call takes by the clock, and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - processor


@contextmanager
def floor_of_one_batch(work: Workload) -> Iterator[None]:
    """Let the first correction, which is not counted, measure the floor: it is done once in a training."""
    before = online.FLOOR_PROBES
    online.FLOOR_PROBES = work.probe_batch
    try:
        yield
    finally:
        online.FLOOR_PROBES = before


def time_steps(work: Workload, arms: tuple[str, ...], r: int, k: int, blocks: int, minutes: float) -> dict[str, Any]:
    """Seconds of each step, interleaved. Steps 1 to `probe_every` are a block, of which the last is corrected.

    After the block in which `minutes` are over there is no further one.
    """
    deadline = time.monotonic() + 60 * minutes
    base = build(work)
    steps = {arm: make_step(adapt(base, arm, work, r, k), work) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    processor: dict[str, list[float]] = {arm: [] for arm in arms}
    loads = []
    with floor_of_one_batch(work):
        for number in range(1 + blocks * PROBE_EVERY):
            if number % PROBE_EVERY == 1 and number > 1 and time.monotonic() > deadline:
                break
            loads.append(os.getloadavg()[0])
            turn = number % len(arms)
            for arm in (*arms[turn:], *arms[:turn]):
                clock, spent = timed(lambda arm=arm, number=number: steps[arm](number))
                if number:
                    seconds[arm].append(clock)
                    processor[arm].append(spent)
    return {
        "workload": work.described,
        "batch": work.batch,
        "probe_batch": work.probe_batch,
        "probe_every": PROBE_EVERY,
        "seconds": seconds,
        "processor_seconds": processor,
        "load": loads,
    }


# Memory


class TrackTensors(TorchDispatchMode):
    """Adds up the storages of all tensors that are made meanwhile, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def measure_memory(name: str, arms: tuple[str, ...], r: int, k: int, quick: bool) -> dict[str, Any]:
    """Peak memory in bytes, of processes that build one arm and take two steps, each of which is corrected.

    `tensors` is what a GPU would have to hold, and the same in every run; `process` is what the system gave, which also
    depends on how the allocator fills its gaps.
    """
    peaks: dict[str, dict[str, int]] = {"tensors": {}, "process": {}}
    for arm in arms:
        command = [sys.executable, "-m", "benchmarks.overhead", "--train-one", name, arm, str(r), str(k)]
        command += ["--quick"] if quick else []
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        for kind, peak in json.loads(done.stdout.splitlines()[-1]).items():
            peaks[kind][arm] = peak
    return {"peak_bytes": peaks}


def train_one(work: Workload, arm: str, r: int, k: int) -> None:
    """What such a process does; it prints its peaks."""
    with TrackTensors() as tracker:
        step = make_step(adapt(build(work), arm, work, r, k, probe_every=1), work)
        for number in range(2):
            step(number)
    print(json.dumps({"tensors": tracker.peak, "process": peak_memory()}))


def peak_memory() -> int:
    """Largest resident set of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the maximum that rusage knows is at least that of the parent
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM")) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Operators


class CountOperators(TorchDispatchMode):
    """Counts the operators that compute; views and detached aliases launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())


def count_operators(work: Workload, arms: tuple[str, ...], r: int, k: int) -> dict[str, Any]:
    """Operators per step, the mean over one that is corrected and those that are not.

    On a GPU each is a launch, which is what small products cost there.
    """
    base, found = build(work), {}
    with floor_of_one_batch(work):
        for arm in arms:
            step = make_step(adapt(base, arm, work, r, k), work)
            step(0)
            with CountOperators() as counter:
                for number in range(1, 1 + PROBE_EVERY):
                    step(number)
            found[arm] = counter.total / PROBE_EVERY
    return {"per_step": found}


# Parts


def time_parts(work: Workload, r: int, k: int, repeats: int) -> dict[str, Any]:
    """Seconds of what the projections add to a step, each part by itself: clock and processor, medians."""
    model = adapt(build(work), "both", work, r, k, probe_every=1)
    with floor_of_one_batch(work):
        make_step(model, work)(0)
    modules = [module for _, module in projected_weights(model, "default")]
    weights = [module.weight for module in modules]
    directions = [torch.randn_like(weight) for weight in weights]
    (correction,) = online.online_projections(model).values()

    def project() -> None:
        with autocast():
            projected = [module.project(module.weight) for module in modules]
        torch.autograd.grad(projected, weights, directions)

    def retract() -> None:
        for module in modules:
            module.retract()

    parts: dict[str, list[tuple[float, float]]] = {
        "projecting": [timed(project) for _ in range(repeats)],
        "retraction": [timed(retract) for _ in range(repeats)],
        "probe pass, at corrected steps": [],
        "correction, at corrected steps": [],
        "stock step": [],
    }
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    for weight, direction in zip(weights, directions, strict=True):
        weight.grad = direction * 1e-3
    optimizer.step()
    with floor_of_one_batch(work):
        for _ in range(repeats):
            parts["probe pass, at corrected steps"].append(timed(lambda: correction.before_step(optimizer)))
            with torch.no_grad():
                torch._foreach_add_(weights, directions, alpha=1e-4)
            parts["correction, at corrected steps"].append(timed(lambda: correction.after_step(optimizer)))
    stock = make_step(adapt(build(work), "stock", work, r, k), work)
    stock(0)
    parts["stock step"] = [timed(lambda n=n: stock(n)) for n in range(1, 1 + repeats)]
    return {
        "workload": work.described,
        "seconds": {part: statistics.median(clock for clock, _ in runs) for part, runs in parts.items()},
        "processor_seconds": {part: statistics.median(spent for _, spent in runs) for part, runs in parts.items()},
    }


# Fit, import, verify


def time_fit(work: Workload) -> dict[str, Any]:
    """Seconds to fit input and output bases from pairs of batches, and of stock steps before and after."""
    base = build(work)
    stock = make_step(adapt(base, "stock", work, 16, 0), work)
    halves = [[work.inputs(work.batch, offset + i) for i in range(FIT_PAIRS)] for offset in (0, 100)]

    def fit() -> None:
        with autocast():
            # The overlap of random batches says nothing, and must not refuse the basis.
            options: dict[str, Any] = {"max_reference_overlap": 1.0, "unfit": "skip", "progress": False}
            fit_concept_basis(base, *halves, target_modules=list(work.targets), rank=16, **options)

    stock(0)
    before = [timed(lambda n=n: stock(n))[0] for n in (1, 2)]
    seconds, processor = timed(fit)
    after = [timed(lambda n=n: stock(n))[0] for n in (3, 4)]
    return {
        "workload": f"{FIT_PAIRS} pairs of a {work.described}",
        "seconds": seconds,
        "processor_seconds": processor,
        "stock_step_seconds": [*before, *after],
    }


def time_import(repeats: int) -> dict[str, Any]:
    """Seconds that importing this package and its config adds to `import peft`."""
    program = (
        "import time, peft; start = time.perf_counter(); import peft_gradproj; "
        "peft_gradproj.GradProjConfig; print(time.perf_counter() - start)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], check=True, capture_output=True) for _ in range(repeats)]
    return {"seconds": [float(run.stdout) for run in runs]}


def run_verify(repeats: int) -> dict[str, Any]:
    """What `verify.py` measures."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "verify.json")
        script = Path(__file__).with_name("verify.py")
        command = [sys.executable, str(script), "--runs", str(repeats), "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


# Cells


def cells(quick: bool, blocks: int, minutes: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every cell with the function that measures it, the most telling first."""
    models, narrow = (QUICK, QUICK) if quick else (MODELS, NARROW)
    ranks, basis_ranks = ((4,), (2, 0)) if quick else (RANKS, BASIS_RANKS)
    middle, *grid = [(r, k) for r in ranks for k in basis_ranks]
    repeats = 1 if quick else 5
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, function: Callable[..., dict[str, Any]], *args: Any) -> None:
        found[name] = lambda: function(*args)

    r, k = middle
    for name, work in models.items():
        add(f"steps/{name}/r{r}/k{k}", time_steps, work, ALL_ARMS, r, k, blocks, 3 * minutes)
    for name, work in models.items():
        add(f"memory/{name}/r{r}/k{k}", measure_memory, name, ("stock", "both") if quick else ALL_ARMS, r, k, quick)
        add(f"operators/{name}/r{r}/k{k}", count_operators, narrow[name], ALL_ARMS, r, k)
        add(f"parts/{name}/r{r}/k{k}", time_parts, work, r, k, repeats)
    if not quick:
        add(f"parts/sd15-512px/r{r}/k{k}", time_parts, AT_512_PIXELS, r, k, 3)
    add("import", time_import, repeats)
    add("verify", run_verify, repeats)
    for name, work in models.items():
        add(f"fit/{name}", time_fit, work)
    for r, k in grid:
        for name, work in models.items():
            add(f"steps/{name}/r{r}/k{k}", time_steps, work, arms_of(k), r, k, blocks, minutes)
    for r, k in grid:
        # The basis rank that is the default, and the largest, of which a basis is as large as the adapter.
        if r == ranks[-1] and k in (middle[1], basis_ranks[-1]):
            for name in models:
                add(f"memory/{name}/r{r}/k{k}", measure_memory, name, arms_of(k), r, k, quick)
    for name, work in models.items():
        attention = replace(work, targets=work.targets[:4])
        add(f"osf/{name}", time_steps, attention, ("stock", "osf"), ranks[0], 0, 1, minutes)
    return found


def versions() -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import version

    packages = ("torch", "peft", "diffusers", "transformers", "peft-gradproj")
    precision = dtype_name(autocast_dtype() or torch.float32)
    machine = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "precision": precision,
    }
    return {**machine, "threads": torch.get_num_threads(), **{package: version(package) for package in packages}}


def measure(wanted: list[str], output: Path, known: dict[str, Callable[[], dict[str, Any]]], *, again: bool) -> None:
    """Measure the cells that match a pattern and are not in the file yet, and write each as it comes."""
    results = json.loads(output.read_text()) if output.exists() else {"command": "make bench-overhead", "cells": {}}
    results["planned"] = list(known)
    todo = {
        key: function
        for key, function in known.items()
        if any(fnmatch.fnmatch(key, pattern) for pattern in wanted) and (again or key not in results["cells"])
    }
    for number, (key, function) in enumerate(todo.items(), 1):
        print(f"[{number}/{len(todo)}] {key}", flush=True)
        load, start, commit = os.getloadavg(), time.time(), revision()
        cell = function()
        about = {
            "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
            "took_seconds": round(time.time() - start, 1),
            "load_average": {"before": load, "after": os.getloadavg()},
            "revision": commit,
            "versions": versions(),
        }
        results["cells"][key] = {**cell, **about}
        write_atomically(output, (json.dumps(results, indent=1) + "\n").encode())
        if "probe_every" in cell:
            print("  " + ", ".join(f"{arm} {x['ratio']:.3f}" for arm, x in ratios(cell).items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Where the cells are kept as JSON.")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="PATTERN", help="Which; all by default.")
    parser.add_argument("--blocks", type=int, default=4, help="How often each arm takes `probe_every` steps.")
    parser.add_argument("--minutes", type=float, default=3, help="After these, a cell of step times is cut short.")
    parser.add_argument("--threads", type=int, help="Threads of PyTorch; by default its own choice.")
    parser.add_argument("--again", action="store_true", help="Measure anew what the file holds.")
    parser.add_argument("--quick", action="store_true", help="Narrow models and few cells: does everything run?")
    parser.add_argument("--list", action="store_true", help="Print the cells, and measure nothing.")
    parser.add_argument("--train-one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    known = cells(args.quick, args.blocks, args.minutes)
    if args.train_one:
        name, arm, r, k = args.train_one
        train_one((QUICK if args.quick else MODELS)[name], arm, int(r), int(k))
    elif args.list:
        print("\n".join(known))
    else:
        # Cells of narrow models must never be taken for those of whole ones.
        measure(args.cells, args.output or (QUICK_RESULTS if args.quick else RESULTS), known, again=args.again)


if __name__ == "__main__":
    main()
