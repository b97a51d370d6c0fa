"""Files that take long to make, and that several processes need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

__all__ = ["make_once"]


def make_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Make a file if it is not there yet; whoever else needs it waits.

    Args:
        path: The file.
        make: Writes it to the path that it is called with, from which it is renamed when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_name(f"part-{path.name}")
            make(part)
            part.replace(path)
    return path
