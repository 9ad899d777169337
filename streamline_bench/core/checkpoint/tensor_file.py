"""Reads the header of a safetensors file and trusts nothing in it.

Layout of the format: 8 bytes with the header's length (little endian), the header (JSON: name ->
dtype, shape, data_offsets; optional ``__metadata__``), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from streamline_bench.errors import CheckpointError

__all__ = ["DTYPE_BITS", "TensorEntry", "read_header"]

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""Bits per element of the dtypes that are read; packed four- and six-bit ones are refused."""

_MAX_HEADER = 100_000_000  # the reference implementation's own cap
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes lie: ``[begin, end)`` of file ``shard``, row-major."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file, by name, in the order of their bytes.

    Raises:
        CheckpointError: the file is truncated, its header is damaged, or its tensors overlap,
            leave the file or have a dtype that is not supported.
    """
    size = path.stat().st_size
    header, start = _parse(path, size)
    header.pop("__metadata__", None)
    entries = [_entry(path, name, value, start) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_extent(path, entries, start, size)
    return {entry.name: entry for entry in entries}


def _parse(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else 0
        start = _LENGTH_BYTES + length
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path} claims a header of {length} bytes, more than the {_MAX_HEADER} allowed; "
                "it is no safetensors file or is damaged: download it again."
            )
        if length < 2 or size < start:
            raise CheckpointError(
                f"{path} is truncated: its header needs at least {max(start, 10)} bytes, the file "
                f"has {size}; download it again."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header (not JSON); download it again.")
    return header, start


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
        sound = all(type(number) is int and number >= 0 for number in numbers)
        sound = sound and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path} describes tensor '{name}' in a damaged way ({value!r:.120}); "
            "download it again."
        )
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{path}: tensor '{name}' has dtype {dtype!r}, which is not supported; convert it to "
            "one of " + ", ".join(DTYPE_BITS) + "."
        )
    expected = prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor '{name}' ({dtype} {list(shape)}) needs {expected} bytes and is given "
            f"{end - begin}; the file is damaged: download it again."
        )
    return TensorEntry(name, path, dtype, tuple(shape), start + begin, start + end)


def _check_extent(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    expected = max((entry.end for entry in entries), default=start)
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: its header describes {expected} bytes, the file has {size}; "
            "download it again."
        )
    previous = start
    for entry in entries:
        if entry.begin < previous:
            raise CheckpointError(
                f"{path}: the bytes of tensor '{entry.name}' overlap with another tensor's; the "
                "file is damaged: download it again."
            )
        previous = max(previous, entry.end)
