"""Trains in two gloo processes: DDP, DDP seeded apart, FSDP2, and FSDP2 with probes. Usage: two_processes.py FOLDER.

One program for all, since its imports take longer than its training. Each rank writes what it ended with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_case import PROBE_OPTIONS, adapted_net, picture_batches, small_probes
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_gradproj.errors import OnlineProjectionError

WORLD_SIZE = 2


def train(model: nn.Module, rank: int, wrapped: Any) -> None:
    """The steps of `distributed_case.train_alone`, with a half of each batch on each rank."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for pictures, labels in picture_batches():
        half = slice(rank * len(labels) // WORLD_SIZE, (rank + 1) * len(labels) // WORLD_SIZE)
        nn.functional.cross_entropy(wrapped(pictures[half]), labels[half]).backward()
        optimizer.step()
        optimizer.zero_grad()


def raw_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def train_ddp(rank: int, folder: Path) -> None:
    model = adapted_net(concept_probes=small_probes(), **PROBE_OPTIONS)
    train(model, rank, DistributedDataParallel(model))
    save_file(raw_weights(model), folder / f"ddp-{rank}.safetensors")
    if rank == 0:
        model.save_pretrained(folder / "ddp")


def train_ddp_seeded_apart(rank: int, folder: Path) -> None:
    for name, spaces, options in (
        ("apart", ("input", "rank", "output", "gradient"), {}),
        ("unsent", ("input", "output", "gradient"), {"broadcast_buffers": False}),
    ):
        model = adapted_net(spaces, seed=rank)
        save_file(raw_weights(model), folder / f"{name}-start-{rank}.safetensors")
        train(model, rank, DistributedDataParallel(model, **options))
        save_file(raw_weights(model), folder / f"{name}-{rank}.safetensors")


def sharded(model: nn.Module) -> nn.Module:
    for layer in ("query", "key"):
        fully_shard(model.get_submodule(f"base_model.model.{layer}"))
    return fully_shard(model)


def train_fsdp(rank: int, folder: Path) -> None:
    model = sharded(adapted_net(("input", "output", "rank")))
    train(model, rank, model)
    assert all(hasattr(p, "full_tensor") for p in model.parameters()), "nothing was sharded"
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        raw = {name: whole[name] for name, p in model.named_parameters() if p.requires_grad}
        save_file(raw, folder / "fsdp-raw.safetensors")
        save_file(get_peft_model_state_dict(model, state_dict=whole), folder / "fsdp-saved.safetensors")


def refuse_probes_with_fsdp(rank: int, folder: Path) -> None:
    model = sharded(adapted_net(concept_probes=small_probes(), **PROBE_OPTIONS))
    try:
        train(model, rank, model)
    except OnlineProjectionError as error:
        (folder / f"refusal-{rank}.txt").write_text(str(error))


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    for part in (train_ddp, train_ddp_seeded_apart, train_fsdp, refuse_probes_with_fsdp):
        part(rank, folder)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that torch and PEFT are imported once.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    mp.start_processes(run, args=(Path(sys.argv[1]),), nprocs=WORLD_SIZE, start_method="fork")
