"""In which precision the demo's networks run: the fastest of those that the processor multiplies itself."""

from __future__ import annotations

import torch

__all__ = ["autocast", "autocast_dtype"]


def autocast_dtype() -> torch.dtype | None:
    """bfloat16 on x86 processors with AVX-512, else None, for no autocast.

    Without AVX-512 there are no convolutions in bfloat16 to speak of: on an AMD EPYC of the third generation, a step of
    the demo's training took eleven times as long as in float32.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.bfloat16 if capability.startswith(("AVX512", "AVX10")) else None


def autocast() -> torch.autocast:
    """A fresh context in `autocast_dtype`."""
    dtype = autocast_dtype()
    return torch.autocast("cpu", dtype, enabled=dtype is not None)
