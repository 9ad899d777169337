"""Turns byte ranges of safetensors files into torch tensors, and looks for NaN in them."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from typing import Any

import torch
from tqdm import tqdm

from streamline_bench.core.checkpoint.tensor_file import DTYPE_BITS, TensorEntry
from streamline_bench.errors import CheckpointError, NumericsError

__all__ = ["TORCH_DTYPES", "check_finite", "described", "raw_bytes", "view"]

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip

# Older torch versions lack a few of them.
TORCH_DTYPES = {key: getattr(torch, name) for key, name in _NAMES.items() if hasattr(torch, name)}

_CHUNK = 1 << 24


def view(entry: TensorEntry, buffer: mmap.mmap) -> torch.Tensor:
    """Return the tensor of ``entry`` as a view of the mapped file (a copy where misaligned).

    Raises:
        CheckpointError: this torch version has no such dtype.
    """
    dtype = _dtype(entry)
    if entry.numel == 0:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.begin % (DTYPE_BITS[entry.dtype] // 8):
        copied = bytearray(buffer[entry.begin : entry.end])
        return torch.frombuffer(copied, dtype=dtype).reshape(entry.shape)
    flat = torch.frombuffer(buffer, dtype=dtype, count=entry.numel, offset=entry.begin)
    return flat.reshape(entry.shape)


def described(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...], int]:
    """Return (dtype as safetensors spells it, shape, size in bytes).

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    for spelled, dtype in TORCH_DTYPES.items():
        if dtype == tensor.dtype:
            return spelled, tuple(tensor.shape), tensor.numel() * tensor.element_size()
    raise CheckpointError(
        f"Tensor '{name}' has dtype {tensor.dtype}, which safetensors cannot hold; convert it."
    )


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements, row-major, as bytes (a view if it is contiguous on the CPU)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    elements: Any = flat.view(torch.uint8).numpy()
    return memoryview(elements)


def check_finite(entries: Collection[TensorEntry], progress: bool = True) -> None:
    """Read all floating-point tensors in pieces of 16 MiB.

    Raises:
        NumericsError: one holds NaN or infinity.
    """
    floating = [e for e in entries if _dtype(e).is_floating_point]
    total = sum(entry.nbytes for entry in floating)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="Checking weights", delay=2,
        disable=not progress,
    )  # fmt: skip
    with bar:
        for entry in floating:
            for piece in _pieces(entry):
                if not bool(torch.isfinite(piece).all()):
                    raise NumericsError(
                        f"Tensor '{entry.name}' in {entry.shard} holds NaN or infinity; use a "
                        "sound checkpoint."
                    )
                bar.update(piece.nbytes)


def _pieces(entry: TensorEntry) -> Iterator[torch.Tensor]:
    dtype = _dtype(entry)
    # One byte formats have no isfinite of their own.
    widened = torch.float32 if dtype.itemsize == 1 else dtype
    with entry.shard.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        left = entry.nbytes
        while left:
            data = bytearray(min(left, _CHUNK))
            count = file.readinto(data)
            if count != len(data):
                raise CheckpointError(f"{entry.shard} became shorter while it was read.")
            left -= count
            yield torch.frombuffer(data, dtype=dtype).to(widened)


def _dtype(entry: TensorEntry) -> torch.dtype:
    try:
        dtype: torch.dtype = TORCH_DTYPES[entry.dtype]
        return dtype
    except KeyError:
        raise CheckpointError(
            f"Tensor '{entry.name}' has dtype {entry.dtype}, which torch {torch.__version__} does "
            "not know; upgrade torch."
        ) from None
