"""Reading files from strangers: bytes, JSON and safetensors, nothing taken on trust.

Everything that is read of a published folder passes through this module. Sizes are checked before memory is taken,
links may not lead out of the folder, JSON may not repeat keys, nest deeply or hold huge numbers, and a safetensors
header must describe the file exactly. Nothing is ever unpickled or executed. Whatever is refused is refused with an
`AdapterFolderError` that says what, where, what was expected and what to do.

Tensors are views of the very bytes that were hashed, so that what is checked cannot differ from what is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterFolderError

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_JSON_BYTES",
    "SAFETENSORS_DTYPES",
    "FileBytes",
    "TensorFile",
    "TensorInfo",
    "check_format_version",
    "parse_json",
    "parse_json_object",
    "parse_safetensors",
    "printable",
    "read_file",
    "shown",
]

MAX_FILE_BYTES = 2 * 2**30
"""A file of tensors beyond this is refused before memory is taken; a LoRA of rank 128 for SDXL takes about 1 GB."""

MAX_JSON_BYTES = 8 * 2**20
"""The limit of a JSON file, or of a safetensors header; a manifest of 1,000 layers takes less than 1 MB."""

MAX_DEPTH = 32
MAX_NUMBER_DIGITS = 64
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 8

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def printable(text: str) -> str:
    """Text without what a terminal would obey: line breaks, escape sequences and the like are spelt out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object, limit: int = 60) -> str:
    """What a stranger put in a place, for a message: `printable`, and at most `limit` characters of it."""
    text = repr(value)
    return printable(text if len(text) <= limit else text[: limit - 3] + "...")


def check_format_version(found: object, expected: str | int, where: str, *, writer: str = "peft-gradproj") -> None:
    """Refuse a file of another format, or of none.

    Args:
        found: What the file says.
        expected: What is read; of the same type, since JSON has a truth that is equal to 1.
        where: The file.
        writer: What writes such files.

    Raises:
        AdapterFolderError: If they differ.
    """
    if type(found) is not type(expected) or found != expected:
        advice = f"It was not written by {writer}." if found is None else "Update peft-gradproj."
        raise AdapterFolderError(
            f"{where} has format version {shown(found)}; this release reads {expected!r}. {advice}"
        )


# Bytes


@dataclass(frozen=True, eq=False)
class FileBytes:
    """A file, read once."""

    name: str
    data: bytearray = field(repr=False)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.data)

    @property
    def sha256(self) -> str:
        """Digest of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def read_file(folder: Path, name: str, *, limit: int) -> FileBytes:
    """The bytes of `folder/name`, which must be a regular file of the folder, of at most `limit` bytes.

    A symbolic link is followed where it stays within the folder, and from a snapshot of the Hub's cache into the
    blobs of the same repository.

    Raises:
        AdapterFolderError: If there is no such file, it is no regular file, it lies elsewhere, or it is too large.
    """
    path = _resolved(folder, name)
    # O_NONBLOCK: a named pipe would keep us waiting for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterFolderError(f"{folder / name} is not a regular file; refused.")
            if status.st_size > limit:
                raise AdapterFolderError(
                    f"{folder / name} has {status.st_size:,} bytes; at most {limit:,} are read. It is not what this "
                    "package publishes under that name."
                )
            return FileBytes(name, _read_exactly(file, status.st_size, folder / name))
    except OSError as error:
        raise AdapterFolderError(f"{folder / name} cannot be read: {error.strerror or error}.") from error


def _read_exactly(file: Any, size: int, where: Path) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = file.readinto(view[done : done + 2**24])
        if not count:
            raise AdapterFolderError(f"{where} changed while it was read; try again when nobody writes to it.")
        done += count
    return data


def _resolved(folder: Path, name: str) -> Path:
    """The real path of `folder/name`, within the folder or among the blobs of the same Hub repository."""
    if name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise AdapterFolderError(f"{name!r} is no plain file name; refused, since it may lead out of {folder}.")
    try:
        root = folder.resolve(strict=True)
        target = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise AdapterFolderError(f"{folder} holds no readable {name}; publish it or check the path.") from error
    if target.parent != root and target.parent != _hub_blobs(root):
        raise AdapterFolderError(
            f"{folder / name} is a link out of the folder, to {target}; refused. Copy the file into the folder."
        )
    return target


def _hub_blobs(root: Path) -> Path | None:
    """Where the Hub's cache keeps the files of the snapshot that `root` is, or lies in."""
    for parent in root.parents:
        if parent.name == "snapshots":
            # Not resolved: a link in place of the folder must not widen what is allowed.
            return parent.parent / "blobs"
    return None


# JSON

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\(?:.|\Z)[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)


def parse_json(data: bytes | bytearray | str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        AdapterFolderError: If it is too large, malformed, too deep, repeats a key, or holds a number that is huge or
            not finite.
    """
    if len(data) > MAX_JSON_BYTES:
        raise AdapterFolderError(f"{where} has {len(data):,} bytes of JSON; at most {MAX_JSON_BYTES:,} are read.")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        _check_depth(text, where)
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, where),
            parse_int=lambda digits: int(_short(digits, where)),
            parse_float=lambda digits: _finite(float(_short(digits, where)), where),
            parse_constant=lambda word: _finite(float(word), where),
        )
    except AdapterFolderError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterFolderError(f"{where} is not valid JSON ({error}); it is damaged, publish it again.") from error


def parse_json_object(data: bytes | bytearray | str, where: str) -> dict[str, Any]:
    """The JSON object of a text.

    Raises:
        AdapterFolderError: If `parse_json` refuses it, or it is no object.
    """
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise AdapterFolderError(f"{where} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _check_depth(text: str, where: str) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        bracket = match.group()
        depth += (bracket in "[{") - (bracket in "]}")
        if depth > MAX_DEPTH:
            raise AdapterFolderError(f"{where} nests more than {MAX_DEPTH} levels deep; refused.")


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise AdapterFolderError(
            f"{where} has the key {shown(repeated)} twice; readers may differ on which counts; refused."
        )
    return result


def _short(digits: str, where: str) -> str:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise AdapterFolderError(f"{where} holds a number of {len(digits)} digits; refused.")
    return digits


def _finite(number: float, where: str) -> float:
    if not isfinite(number):
        raise AdapterFolderError(f"{where} holds a number that is not finite; refused.")
    return number


# Safetensors

_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file as a mapping; each is a view that is made when it is asked for."""

    def __init__(self, source: FileBytes, start: int, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]):
        self.name = source.name
        self.infos = dict(infos)
        self.metadata = dict(metadata)
        self._data = source.data
        self._start = start

    def __getitem__(self, key: str) -> Tensor:
        info = self.infos[key]
        dtype = SAFETENSORS_DTYPES[info.dtype]
        begin, count = self._start + info.begin, prod(info.shape)
        if begin % dtype.itemsize:
            # Other writers do not align; vector instructions may need it.
            aligned = self._data[begin : self._start + info.end]
            return torch.frombuffer(aligned, dtype=dtype, count=count).reshape(info.shape)
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=begin).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    @property
    def source(self) -> bytearray:
        """The bytes of the whole file."""
        return self._data

    def __repr__(self) -> str:
        return f"TensorFile({self.name!r}, {len(self)} tensors)"


def parse_safetensors(source: FileBytes, where: str) -> TensorFile:
    """The tensors of a safetensors file whose header describes it exactly.

    The format is 8 bytes of header length, little-endian, the header in JSON, and the tensors' bytes, which the
    header's offsets must cover without gap or overlap.

    Raises:
        AdapterFolderError: If a byte is not as the format demands.
    """
    length = _header_length(source, where)
    header: dict[str, Any] = parse_json(source.data[8 : 8 + length], f"the header of {where}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise AdapterFolderError(f"the metadata in the header of {where} are not strings; expected text for each key.")
    infos = {name: _tensor_info(name, entry, where) for name, entry in header.items()}
    _check_offsets(infos, source.size - 8 - length, where)
    return TensorFile(source, 8 + length, infos, metadata)


def _is_text(value: Any) -> bool:
    """Whether other readers take it for text too: JSON of Python has halves of characters, which UTF-8 has not."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _header_length(source: FileBytes, where: str) -> int:
    if source.size == 0:
        raise AdapterFolderError(f"{where} is empty; publish it again.")
    length = int.from_bytes(source.data[:8], "little")
    if source.data[:2] in _PICKLE_STARTS and source.data[8:9] != b"{":
        raise AdapterFolderError(
            f"{where} is a pickle or a zip archive and not safetensors; it is not opened, since a pickle can run code."
        )
    if source.size < 8 or length > source.size - 8:
        raise AdapterFolderError(
            f"{where} is cut short, or no safetensors file: it announces a header of {length:,} bytes and has "
            f"{source.size:,} bytes in all. Download or publish it again."
        )
    if length > MAX_JSON_BYTES:
        raise AdapterFolderError(f"{where} has a header of {length:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
    if source.data[8:9] != b"{":
        raise AdapterFolderError(f"the header of {where} does not start with '{{'; it is no safetensors file.")
    return length


def _tensor_info(name: str, entry: Any, where: str) -> TensorInfo:
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise AdapterFolderError(
            f"{where} has a tensor named {shown(name)}; expected 1 to {MAX_NAME_LENGTH} printable characters."
        )
    what = f"the header's entry for {name} in {where}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFolderError(f"{what} is malformed; expected exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise AdapterFolderError(f"{what} has dtype {shown(dtype)}; expected one of {', '.join(SAFETENSORS_DTYPES)}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterFolderError(f"{what} has shape {shown(shape)}; expected up to {MAX_DIMENSIONS} sizes, 0 or more.")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterFolderError(f"{what} has offsets {shown(offsets)}; expected two positions, 0 or more.")
    if 0 in shape:
        raise AdapterFolderError(f"{what} has shape {shape}: a tensor without values; expected at least one.")
    begin, end = offsets
    if end - begin != prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
        raise AdapterFolderError(
            f"{what} gives {end - begin} bytes to shape {shape} of {dtype}; expected "
            f"{prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize}."
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**40 for v in values)


def _check_offsets(infos: Mapping[str, TensorInfo], size: int, where: str) -> None:
    position = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            fault = "overlaps another" if info.begin < position else "leaves a gap before it"
            raise AdapterFolderError(f"{name} in {where} {fault}: it begins at {info.begin}; expected {position}.")
        position = info.end
    if position != size:
        raise AdapterFolderError(
            f"the tensors of {where} end at byte {position} and its data at {size}; the file is cut short, or hides "
            "bytes. Download or publish it again."
        )
