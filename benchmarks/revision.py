"""Of which commit a figure is, and on which processor it was measured."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def revision() -> str | None:
    """Commit of the working tree that this runs from, `-dirty` behind it where files differ; `None` outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def processor() -> str:
    """The processor's name; what Python calls it where Linux does not tell."""
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    return told.group(1).strip() if told else platform.processor()
