"""Signals of all calibration batches at one boundary: in memory, on disk where there are many."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["SignalStore"]


class SignalStore:
    """Tensors by batch number; each may be replaced by one of another width.

    Args:
        folder: where files go; made when needed.
        size: bytes that all tensors together will take.
        budget: bytes that may be held in memory; beyond it every tensor goes to disk.
    """

    def __init__(self, folder: Path, size: int, budget: int) -> None:
        self.on_disk = size > budget
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        self._layout: dict[int, tuple[torch.dtype, torch.Size]] = {}
        if self.on_disk:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __setitem__(self, number: int, signal: Tensor) -> None:
        signal = signal.detach().to("cpu").contiguous()
        if not self.on_disk:
            self._held[number] = signal
            return
        self._layout[number] = (signal.dtype, signal.shape)
        signal.view(torch.uint8).numpy().tofile(self._file(number))

    def __getitem__(self, number: int) -> Tensor:
        """Return the signal of a batch, on the CPU."""
        if not self.on_disk:
            return self._held[number]
        dtype, shape = self._layout[number]
        # Each pass runs over all files once, so nothing is gained by mapping them.
        data = bytearray(self._file(number).read_bytes())
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def close(self) -> None:
        """Drop all signals and the files that held them."""
        self._held.clear()
        if self.on_disk:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.bin"
