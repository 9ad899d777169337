"""Activations on disk: tensors in memory-mapped files that are reserved before they are filled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from streamline_bench.errors import OutputError


def create_mapped(path: Path, shape: Sequence[int], dtype: torch.dtype, remedy: str = "") -> Tensor:
    """Return a tensor of a new file; what is written to it is written to the file.

    Args:
        remedy: what else helps where the file does not fit (``lower training.cache_gb``).

    Raises:
        OutputError: the file cannot be written, or the disk is too full for it.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        path.unlink(missing_ok=True)  # left by an attempt that was killed
        with path.open("xb") as file:
            # Reserved at once, so that a full disk is an error now and not a SIGBUS later.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(
            f"The activations in {path} ({size / 1e9:.1f} GB) cannot be written "
            f"({error.strerror}); free space{remedy and ' or '}{remedy}."
        ) from error
    return open_mapped(path, shape, dtype)


def open_mapped(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor of a file that :func:`create_mapped` made."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


class BatchStore:
    """Tensors by batch number: in memory, or on disk where there are many.

    Each may be replaced by one of another width.

    Args:
        folder: where files go; made when needed.
        size: bytes that all tensors together will take.
        budget: bytes that may be held in memory; beyond it every tensor goes to disk.
    """

    def __init__(self, folder: Path, size: int, budget: int) -> None:
        self.on_disk = size > budget
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        if self.on_disk:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        if self.on_disk:
            # Held is a view of the file: its pages count as the file's.
            mapped = create_mapped(self._folder / f"{number}.bin", tensor.shape, tensor.dtype)
            tensor = mapped.copy_(tensor)
        self._held[number] = tensor

    def __getitem__(self, number: int) -> Tensor:
        """Return the tensor of a batch, on the CPU; treat it as read-only."""
        return self._held[number]

    def close(self) -> None:
        """Drop all tensors and the files that held them."""
        self._held.clear()
        if self.on_disk:
            shutil.rmtree(self._folder, ignore_errors=True)
