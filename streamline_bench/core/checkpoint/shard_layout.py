"""Decides where tensors go in new safetensors files, and writes the files' headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from streamline_bench.core.checkpoint.tensor_file import DTYPE_BITS, TensorEntry

__all__ = ["ByteRange", "NewTensor", "byte_ranges", "header_bytes", "shard_names", "split_shards"]

_ALIGNMENT = 8


@dataclass(frozen=True)
class NewTensor:
    """One tensor to be written: its new name, and where its bytes come from (None: memory)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: TensorEntry | None = None


@dataclass(frozen=True)
class ByteRange:
    """Consecutive bytes of one source file, or one tensor in memory (``source`` is None)."""

    source: TensorEntry | None
    name: str
    begin: int
    end: int


def split_shards(tensors: Iterable[NewTensor], max_bytes: float) -> list[list[NewTensor]]:
    """Fill shards in the given order; a tensor larger than ``max_bytes`` gets one of its own.

    Within a shard, wide dtypes come first (stable otherwise): every tensor then starts at a
    multiple of its element size, which readers that map the file rely on.
    """
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -DTYPE_BITS[tensor.dtype]) for shard in shards]


def shard_names(count: int) -> list[str]:
    """Return the file names that transformers expects for ``count`` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def header_bytes(tensors: Iterable[NewTensor]) -> bytes:
    """Return the head of a file that holds ``tensors`` in this order, padded to 8 bytes."""
    # transformers refuses files that do not say which framework's layout they have.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def byte_ranges(tensors: Iterable[NewTensor]) -> Iterator[ByteRange]:
    """Yield what to copy, in order; tensors that follow each other in a source file go together."""
    current: ByteRange | None = None
    for tensor in tensors:
        source = tensor.source
        if source is None:
            following = ByteRange(None, tensor.name, 0, tensor.nbytes)
        else:
            following = ByteRange(source, tensor.name, source.begin, source.end)
        if current is not None and _adjacent(current, following):
            current = ByteRange(current.source, current.name, current.begin, following.end)
            continue
        if current is not None:
            yield current
        current = following
    if current is not None:
        yield current


def _adjacent(first: ByteRange, second: ByteRange) -> bool:
    if first.source is None or second.source is None:
        return False
    return first.source.shard == second.source.shard and first.end == second.begin
