"""Replacing a folder as a whole, so that whoever looks finds the former state or the new one.

The new state is prepared in a sibling. Where there is no folder yet, a rename puts it in place. Where there is one, the
kernel exchanges the two names (Linux `renameat2`, macOS `renamex_np`), in one step; what was there is removed
afterwards. Two that do it at the same time exchange one after the other, whole states both, and need no lock.

Where the kernel or the file system cannot exchange (Windows, some network file systems), the former folder is renamed
first. A kill between the two renames leaves no folder under the name, and the former one beside it: nothing to load,
but nothing torn.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import sync

__all__ = ["exchange", "replaced_folder"]

_SUFFIX = ".gradproj-swap"
_STALE_SECONDS = 3600
"""Siblings that were last changed longer ago than a save takes are those of processes that were killed."""

_AT_FDCWD = -100
_EXCHANGE = 2


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty sibling of `folder` to write into, which takes its place when the block ends without an error.

    Args:
        folder: What is to be replaced; it need not exist.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    stage = folder.parent / f".{folder.name}.{secrets.token_hex(8)}{_SUFFIX}"
    stage.mkdir()
    try:
        yield stage
        _sync(stage)
        _swap_in(stage, folder)
    finally:
        # After an exchange it is the former folder.
        shutil.rmtree(stage, ignore_errors=True)


def _swap_in(stage: Path, folder: Path) -> None:
    former: list[Path] = []
    while True:
        try:
            # Puts it in place if there is none, or an empty one.
            os.rename(stage, folder)
            break
        except OSError:
            if not folder.is_dir() or not stage.is_dir():
                raise
        try:
            if exchange(stage, folder):
                break
            former.append(_moved_away(folder))
        except FileNotFoundError:
            # Another process has just moved the folder away, and is about to put its own in place.
            continue
    sync(folder.parent)
    for path in former:
        shutil.rmtree(path, ignore_errors=True)


def _moved_away(folder: Path) -> Path:
    former = folder.parent / f".{folder.name}.{secrets.token_hex(8)}{_SUFFIX}"
    os.rename(folder, former)
    # Its age counts from here.
    os.utime(former)
    return former


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; `False` where the system cannot.

    Raises:
        FileNotFoundError: If one of them is missing.
    """
    names = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, ctypes.c_uint(_EXCHANGE))
        else:
            failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE))
    except (AttributeError, OSError, TypeError):
        return False
    if failed and ctypes.get_errno() == 2:
        raise FileNotFoundError(2, os.strerror(2), str(other))
    return not failed


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left. While there is no folder, it may be the only state that there is."""
    if not folder.exists():
        return
    for path in folder.parent.glob(f".{_escaped(folder.name)}.*{_SUFFIX}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync(folder: Path) -> None:
    """Make what is in the folder last; not every file system can."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
