"""Replacing a folder as a whole, so that whoever looks finds the former state or the new one.

The new state is prepared in a sibling. Where there is no folder yet, a rename puts it in place. Where there is one, the
kernel exchanges the two names (Linux `renameat2`, macOS `renamex_np`), in one step; what was there is removed
afterwards. Two that do it at the same time exchange one after the other, whole states both, and need no lock.

Where the kernel or the file system cannot exchange (Windows, some network file systems), the former folder is renamed
first. A kill between the two renames leaves no folder under the name, and the former one beside it: nothing to load,
but nothing torn.

A folder that is a mount point, such as a container's volume, or this process's working directory, or one in a folder
that may not be written to, has to stay where it is. There the new state is prepared within it, and takes its place
entry by entry; a kill meanwhile leaves a part of either, and what is missing beside it in folders of ours.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import sync

__all__ = ["entries", "exchange", "replaced_folder"]

_SUFFIX = ".gradproj-swap"
_STALE_SECONDS = 3600
"""Siblings that were last changed longer ago than a save takes are those of processes that were killed."""

_AT_FDCWD = -100
_EXCHANGE = 2


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into, which takes its place when the block ends without an error.

    What was written is kept, and the error says where, if it cannot be put in place.

    Args:
        folder: What is to be replaced; it need not exist.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    stays = folder.is_dir() and (
        os.path.ismount(folder) or os.path.samefile(folder, os.curdir) or not os.access(folder.parent, os.W_OK)
    )
    where = folder if stays else folder.parent
    _remove_stale(folder, where)
    stage = _new_name(folder, where)
    stage.mkdir()
    try:
        yield stage
        _sync(stage)
        if not stays and folder.is_dir():
            shutil.copymode(folder, stage)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    try:
        (_move_in if stays else _swap_in)(stage, folder)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was to be there is in {stage}", str(folder)) from error
    # After an exchange it is the former folder.
    shutil.rmtree(stage, ignore_errors=True)
    # Where there was no folder before, only now is there another state than what killed processes left.
    _remove_stale(folder, where)


def entries(folder: Path) -> list[str]:
    """The names in a folder, without those of folders that a replacement of it needs, or left when it was killed."""
    return [name for name in os.listdir(folder) if not name.endswith(_SUFFIX)] if folder.is_dir() else []


def _new_name(folder: Path, where: Path) -> Path:
    return where / f".{folder.name}.{secrets.token_hex(8)}{_SUFFIX}"


def _move_in(stage: Path, folder: Path) -> None:
    """Put what is in `stage`, which lies in `folder`, in the place of all else there."""
    former = _new_name(folder, folder)
    former.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in ((folder, former), (stage, folder)):
            for name in entries(source):
                os.rename(source / name, target / name)
                moved.append((source / name, target / name))
    except OSError:
        for before, after in reversed(moved):
            os.rename(after, before)
        former.rmdir()
        raise
    sync(folder)
    for path in (former, stage):
        shutil.rmtree(path, ignore_errors=True)


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
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            # A mount of the same file system, which shows only now.
            _move_in(Path(shutil.copytree(stage, _new_name(folder, folder))), folder)
            break
    sync(folder.parent)
    for path in former:
        shutil.rmtree(path, ignore_errors=True)


def _moved_away(folder: Path) -> Path:
    former = _new_name(folder, folder.parent)
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


def _remove_stale(folder: Path, where: Path) -> None:
    """Remove what killed processes left. While there is no folder, it may be the only state that there is."""
    if not folder.exists():
        return
    for path in where.glob(f".{_escaped(folder.name)}.*{_SUFFIX}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync(folder: Path) -> None:
    """Make what is in the folder last; not every file system can."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
