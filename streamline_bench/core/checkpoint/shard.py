"""Writes one safetensors file tensor by tensor, with a few megabytes in memory.

The bytes are those that the library's ``save_file`` writes, which wants all tensors of a file at
once. What is copied from another file never becomes a tensor.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from streamline_bench.core.checkpoint.folder import DTYPES, TensorEntry
from streamline_bench.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 23
"""Bytes that are held at a time."""
_RANK = {dtype: number for number, dtype in enumerate(DTYPES)}
_OF_TORCH = {name: dtype for dtype, (_, name) in DTYPES.items()}
_NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What ``copy_file_range`` says where two files, or this system, do not have it."""


@dataclass(frozen=True)
class Part:
    """A tensor to be written, and where its bytes are: in a file, or in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorEntry | torch.Tensor

    @classmethod
    def of(
        cls, name: str, source: TensorEntry | torch.Tensor, dtype: torch.dtype | None = None
    ) -> Part:
        """Return a tensor under a name.

        Args:
            dtype: that a tensor in memory is written in; None: its own.

        Raises:
            OutputError: files cannot hold its dtype.
        """
        if isinstance(source, TensorEntry):
            return cls(name, source.dtype, source.shape, source)
        kind = str(dtype or source.dtype).removeprefix("torch.")
        if kind not in _OF_TORCH:
            raise OutputError(
                f"Tensor '{name}' has dtype {kind}, which a checkpoint cannot hold; convert it to "
                "float32."
            )
        return cls(name, _OF_TORCH[kind], tuple(source.shape), source)

    @property
    def nbytes(self) -> int:
        """Size in bytes, as it is written."""
        if isinstance(self.source, TensorEntry):
            return self.source.nbytes
        return self.source.numel() * DTYPES[self.dtype][0]


def write_shard(
    path: Path,
    parts: Sequence[Part],
    *,
    metadata: Mapping[str, str] | None = None,
    hashed: bool = False,
    advance: Callable[[int], object] = lambda _: None,
) -> str:
    """Write a file.

    Args:
        metadata: text in its header.
        hashed: compute the hash of the file as it is written.
        advance: called with the number of bytes written each time.

    Returns:
        SHA-256 (hex) of the file, empty if it was not asked for.

    Raises:
        OSError: the file cannot be written.
        CheckpointError: a file that is copied from cannot be read.
    """
    # As the library does, so that every tensor starts at a multiple of its elements' size.
    ordered = sorted(parts, key=lambda part: (-_RANK[part.dtype], part.name.encode()))
    header, digest = _header(ordered, metadata or {}), hashlib.sha256()
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb", buffering=0))
        _write(file, header)
        digest.update(header)
        hasher = stack.enter_context(ThreadPoolExecutor(1, "hash")) if hashed else None
        for part in ordered:
            if hasher is None and _copied_by_system(part, file, advance):
                continue
            for piece in _pieces(part):
                hashing = hasher.submit(digest.update, piece) if hasher else None
                _write(file, piece)
                if hashing is not None:
                    hashing.result()  # the next piece takes this one's memory
                advance(len(piece))
    return digest.hexdigest() if hashed else ""


def append_tensor(path: Path, part: Part) -> None:
    """Append the bytes of a tensor to a file."""
    with path.open("ab", buffering=0) as file:
        for piece in _pieces(part):
            _write(file, piece)


def file_pieces(entry: TensorEntry) -> Iterator[memoryview]:
    """Yield the bytes of a stored tensor; each piece is valid until the next one.

    All but the last hold whole elements.

    Raises:
        CheckpointError: its file cannot be read, or ends before the tensor does.
    """
    left = entry.nbytes
    buffer = memoryview(bytearray(min(_PIECE, left)))
    try:
        with entry.shard.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            while left:
                piece = buffer[: min(left, len(buffer))]
                done = 0
                while done < len(piece):
                    if not (count := file.readinto(piece[done:])):
                        raise _cut_off(entry)
                    done += count
                yield piece
                left -= len(piece)
    except OSError as error:
        raise CheckpointError(
            f"{entry.shard}: tensor '{entry.name}' cannot be read ({error.strerror or error}); "
            "check the disk, or download the file again."
        ) from error


def _cut_off(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{entry.shard} changed while it was read: it ends inside tensor '{entry.name}'; start "
        "again with files that nobody changes."
    )


def _header(parts: Sequence[Part], metadata: Mapping[str, str]) -> bytes:
    rows: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for part in parts:
        end = place + part.nbytes
        rows[part.name] = {
            "dtype": part.dtype, "shape": list(part.shape), "data_offsets": [place, end]
        }  # fmt: skip
        place = end
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(part: Part) -> Iterator[memoryview]:
    if isinstance(part.source, TensorEntry):
        yield from file_pieces(part.source)
        return
    import torch

    size, kind = DTYPES[part.dtype]
    for piece in torch.split(part.source.detach().reshape(-1), max(1, _PIECE // size)):
        written = piece.to("cpu", getattr(torch, kind)).view(torch.uint8)
        data: memoryview = written.numpy().data
        yield data


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _copied_by_system(part: Part, file: Any, advance: Callable[[int], object]) -> bool:
    """Copy a tensor from file to file inside the system; False where that cannot be."""
    entry = part.source
    if not isinstance(entry, TensorEntry) or not hasattr(os, "copy_file_range"):
        return False
    done = 0
    with entry.shard.open("rb", buffering=0) as source:
        while done < entry.nbytes:
            try:
                count = os.copy_file_range(
                    source.fileno(), file.fileno(), min(entry.nbytes - done, 8 * _PIECE),
                    entry.offset + done,
                )  # fmt: skip
            except OSError as error:
                if done or error.errno not in _NOT_HERE:
                    raise
                return False
            if not count:
                if done:
                    raise _cut_off(entry)
                return False  # some file systems say so where they cannot
            done += count
            advance(count)
    return True
