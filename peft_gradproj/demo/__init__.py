"""The main job, end to end on real pictures: fine-tune with a logo forbidden, save a plain LoRA, verify it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import DemoReport
    from .run import run_demo
    from .settings import DemoSettings

# PEFT imports it where it is installed, and it then tells of kernels that are not needed here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = ["DemoReport", "DemoSettings", "run_demo"]

_MODULES = {"DemoReport": "report", "DemoSettings": "settings", "run_demo": "run"}


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import; `gradproj --help` should not.
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
