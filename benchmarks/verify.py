"""What it takes to verify an adapter: time and peak memory of a process that does nothing else.

The adapter is on Stable Diffusion 1.5's 128 attention projections, with random factors that are orthogonal to a random
basis in the input and the output space. Every run is a process of its own; what it imports is reported apart.

    python benchmarks/verify.py
    python benchmarks/verify.py --rank 16 --directions 16 --dtype float16 --output verify.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peft_gradproj import ConceptBasis, LayerBasis
from peft_gradproj.adapter_folder import write_sidecars
from peft_gradproj.projection import orthonormal_basis, remove_component

BLOCKS = {
    320: ("down_blocks.0", 2, "up_blocks.3", 3),
    640: ("down_blocks.1", 2, "up_blocks.2", 3),
    1280: ("down_blocks.2", 2, "up_blocks.1", 3),
}
"""By width: blocks with attention, and how many transformers they have; the middle block has one more of 1280."""

TEXT_WIDTH = 768

MEASURED = """
import json, resource, sys, time
from pathlib import Path
start = time.perf_counter()
from peft_gradproj import verify_adapter
import peft_gradproj.verification
imported, spent = time.perf_counter(), time.process_time()
report = verify_adapter(sys.argv[1])
done, spent = time.perf_counter(), time.process_time() - spent
status = Path("/proc/self/status")
if status.exists():  # the maximum that rusage knows is at least that of the parent, from which this was started
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
seconds = {"import": imported - start, "verify": done - imported, "processor": spent}
print(json.dumps({"status": report.status, **seconds, "peak": peak}))
"""


def layers() -> Iterator[tuple[str, int, int]]:
    """Name, d_in and d_out of the attention projections of Stable Diffusion 1.5's UNet."""
    attentions = [("mid_block.attentions.0", 1280)]
    for width, (down, downs, up, ups) in BLOCKS.items():
        attentions += [(f"{down}.attentions.{i}", width) for i in range(downs)]
        attentions += [(f"{up}.attentions.{i}", width) for i in range(ups)]
    for name, width in attentions:
        for attention in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                text = attention == "attn2" and projection in ("to_k", "to_v")
                module = f"{name}.transformer_blocks.0.{attention}.{projection}"
                yield module, TEXT_WIDTH if text else width, width


def publish(folder: Path, rank: int, directions: int, dtype: torch.dtype) -> int:
    """Write the adapter with its sidecars; the number of its layers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors, bases = {}, {}
    for name, d_in, d_out in layers():
        u, o = (orthonormal_basis(normal(d, directions)) for d in (d_in, d_out))
        bases[name] = LayerBasis(input=u, output=o)
        tensors[f"unet.{name}.lora_A.weight"] = remove_component(normal(rank, d_in), u, side="right").to(dtype)
        tensors[f"unet.{name}.lora_B.weight"] = remove_component(normal(d_out, rank), o, side="left").to(dtype)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "pytorch_lora_weights.safetensors"
    )
    write_sidecars(folder, ConceptBasis(bases, "random"), settings={"strength": 1.0}, base_model=None)
    return len(bases)


def measure(folder: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURED, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--directions", type=int, default=16, help="of each basis: one in the input space, one in the output space"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        count = publish(Path(temporary), args.rank, args.directions, getattr(torch, args.dtype))
        size = sum(path.stat().st_size for path in Path(temporary).iterdir())
        runs = [measure(Path(temporary)) for _ in range(args.runs)]
    figures = {
        "layers": count,
        "bytes": size,
        "rank": args.rank,
        "directions": args.directions,
        "dtype": args.dtype,
        "status": sorted({run["status"] for run in runs}),
        "runs": runs,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    seconds, spent, imports, peaks = ([r[key] for r in runs] for key in ("verify", "processor", "import", "peak"))
    print(
        f"{count} layers of rank {args.rank} in {args.dtype}, {args.directions} directions twice, {size / 1e6:.0f} MB"
    )
    print(f"status: {', '.join(figures['status'])}")
    print(
        f"verify: {statistics.median(seconds):.2f} s (median of {args.runs}; {min(seconds):.2f} to {max(seconds):.2f})"
    )
    print(f"processor time of that: {statistics.median(spent):.2f} s")
    print(f"import: {statistics.median(imports):.2f} s")
    print(f"peak memory of the process: {max(peaks) / 1e6:.0f} MB")
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
