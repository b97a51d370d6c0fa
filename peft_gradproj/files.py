"""Files of tensors and of JSON, written whole, found by path or Hub id, read without trust; folders of checkpoints."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AdapterFolderError, GradProjError
from .untrusted import (
    MAX_FILE_BYTES,
    MAX_JSON_BYTES,
    TensorFile,
    check_format_version,
    parse_json,
    parse_json_object,
    parse_safetensors,
    read_file,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_can_hold",
    "checkpoint_step",
    "is_hub_id",
    "is_repository",
    "locate_file",
    "read_header_json",
    "read_json_object",
    "read_tensor_file",
    "saved_checkpoints",
    "sync",
    "write_atomically",
    "write_tensor_file",
]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file such that its name never names a part of it: beside it first, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{secrets.token_hex(6)}.{path.name}.tmp")
    try:
        with open(staged, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def check_can_hold(folder: str | os.PathLike[str], error: type[GradProjError]) -> None:
    """Refuse a folder that cannot be made, or written to, before the work whose result it is to hold.

    Args:
        folder: It need not exist, and is not made.
        error: What is raised if it cannot be.
    """
    whole = Path(os.path.realpath(folder))
    nearest = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    try:
        # Modes do not say all: a file system may be read-only.
        with tempfile.TemporaryDirectory(prefix=".", dir=nearest):
            pass
    except OSError as cause:
        raise error(
            f"nothing can be written to the folder {folder}: {nearest} is no folder, or not to be written to "
            f"({cause.strerror}). Give another."
        ) from cause


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, last; not every file system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def saved_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The `checkpoint-N` of a training, the oldest first; other folders, such as `checkpoint-best`, are none."""
    return sorted(filter(_is_checkpoint, Path(output_dir).glob("checkpoint-*")), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """After which step it was written."""
    return int(checkpoint.name.partition("-")[2])


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch("checkpoint-[0-9]+", path.name) is not None


def is_hub_id(name: str) -> bool:
    """Whether it has the form of a repository's id on the Hub: `owner/name`, or `name` alone as the oldest models."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_repository(path_or_repo: str | os.PathLike[str]) -> bool:
    """Whether it is no path that exists, but may be the id of a repository of the Hub."""
    # Not by methods of a path, which raise where a name is too long or a folder may not be entered.
    name = str(path_or_repo)
    return not os.path.exists(path_or_repo) and "/" in name and is_hub_id(name)


def locate_file(
    path_or_repo_id: str | os.PathLike[str], name: str, *, revision: str | None, error: type[GradProjError]
) -> Path:
    """The file at a path, the file `name` in a folder, or that file of a repository of the Hub, downloaded.

    Args:
        path_or_repo_id: What exists on disk is taken from there; else it is taken as a Hub id.
        name: Name of the file in a folder or repository.
        revision: Branch, tag or commit of the repository; without meaning for a path.
        error: What is raised if there is no such file.
    """
    path = Path(path_or_repo_id)
    # Not by methods of the path, which raise where a name is too long or a folder may not be entered.
    if os.path.isdir(path):
        path = path / name
        if not os.path.isfile(path):
            raise error(f"the folder {path.parent} holds no {name}; give the file, or a folder that holds it.")
    if os.path.isfile(path):
        return path
    repo_id = str(path_or_repo_id)
    if path.suffix == ".safetensors" or not is_repository(repo_id):
        raise error(f"{repo_id} does not exist; expected a file, a folder, or a Hub id (user/name).")
    return _downloaded(repo_id, name, revision, error)


def _downloaded(repo_id: str, name: str, revision: str | None, error: type[GradProjError]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

    try:
        return Path(hf_hub_download(repo_id, name, revision=revision))
    except (OSError, HTTPError, EntryNotFoundError, HFValidationError) as cause:
        raise error(
            f"{repo_id} is neither a path, nor a repository with a {name} that can be reached "
            f"({type(cause).__name__}). Check the name, the revision, your login and the connection."
        ) from cause


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a stranger's folder, as `untrusted` reads it.

    Raises:
        AdapterFolderError: If it is none, or refused.
    """
    return parse_json_object(read_file(path.parent, path.name, limit=MAX_JSON_BYTES).data, str(path))


def write_tensor_file(
    path: str | os.PathLike[str], name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str | None]
) -> Path:
    """Write a safetensors file, which appears under its name when it is complete.

    Args:
        path: The file, or an existing folder.
        name: Name of the file in a folder.
        tensors: What it holds.
        header: Its metadata; what is `None` is left out.

    Returns:
        The file that was written.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.is_dir():
        path = path / name
    metadata = {key: value for key, value in header.items() if value is not None}
    write_atomically(path, save(_unshared(tensors), metadata=metadata))
    return path


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, of those that lie in the same memory all but the first copied: safetensors refuses them."""
    storages: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return unshared


def read_tensor_file(path: Path, error: type[GradProjError], *, version: str, writer: str) -> TensorFile:
    """The tensors of a safetensors file, as `untrusted` reads them; what it refuses is raised as `error`.

    Args:
        path: The file.
        error: What is raised if it is malformed, or of another format.
        version: The `format_version` that its header must have.
        writer: What writes such files, for the message.
    """
    # A link of the user's own, or into the Hub's cache, is followed: he named the file himself.
    real = path.resolve()
    with _raised_as(error):
        file = parse_safetensors(read_file(real.parent, real.name, limit=MAX_FILE_BYTES), str(path))
        check_format_version(file.metadata.get("format_version"), version, str(path), writer=writer)
    return file


def read_header_json(header: Mapping[str, str], key: str, where: str, error: type[GradProjError]) -> Any:
    """The JSON value under a key of a safetensors header, `None` without it; what is no JSON raises `error`."""
    with _raised_as(error):
        return parse_json(header.get(key, "null"), where)


@contextmanager
def _raised_as(error: type[GradProjError]) -> Iterator[None]:
    try:
        yield
    except AdapterFolderError as cause:
        raise error(str(cause)) from cause
