"""Where hidden states are kept: in memory, or in memory-mapped files where they are many.

Files are reserved before they are filled, so that a full disk is an error and not a crash.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamline_bench.core.machine.environment import free_memory
from streamline_bench.errors import OutputError

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Share of the free memory that states may take before they go to files."""


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
    """Tensors by batch number, or boundary and batch number: in memory, or on disk if many.

    Each may be replaced by one of another width.

    Args:
        folder: of the files; made when needed.
        size: bytes that all tensors together will take.
        budget: bytes that may be held in memory; beyond it every tensor is on disk.
        device: from which tensors come and to which they go; for CUDA memory is pinned.

    Raises:
        OutputError: the disk has no room for them.
    """

    def __init__(
        self, folder: Path, size: int, budget: int, device: torch.device | None = None
    ) -> None:
        self.on_disk = size > budget
        self._folder = folder
        self._pinned = device is not None and device.type == "cuda" and not self.on_disk
        self._held: dict[Any, Tensor] = {}
        if self.on_disk:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
            if free < size:
                raise OutputError(
                    f"The hidden states need {size / 1e9:.3g} GB, which exceeds the "
                    f"{budget / 1e9:.3g} GB of memory for them, and the disk of {folder.parent} "
                    f"has {free / 1e9:.3g} GB free; free space, or give fewer or shorter sequences."
                )

    def __setitem__(self, key: Any, tensor: Tensor) -> None:
        tensor = tensor.detach()
        if self._pinned:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            # In the stream's order: whoever loads it to the device later need not wait here.
            self._held[key] = held.copy_(tensor, non_blocking=True)
            return
        tensor = tensor.to("cpu").contiguous()
        if self.on_disk:
            # Held is a view of the file: its pages count as the file's.
            mapped = create_mapped(self._file(key), tensor.shape, tensor.dtype)
            tensor = mapped.copy_(tensor)
        self._held[key] = tensor

    def __getitem__(self, key: Any) -> Tensor:
        """Return a tensor on the CPU; treat it as read-only."""
        if self._pinned:
            torch.cuda.synchronize()
        return self._held[key]

    def load(self, key: Any, device: torch.device | str) -> Tensor:
        """Return a tensor on a device; treat it as read-only."""
        return self._held[key].to(device, non_blocking=self._pinned)

    def drop(self, key: Any) -> None:
        """Forget a tensor."""
        del self._held[key]
        if self.on_disk:
            self._file(key).unlink()

    def close(self) -> None:
        """Drop all tensors and the files that held them."""
        self._held.clear()
        if self.on_disk:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, key: Any) -> Path:
        parts = key if isinstance(key, tuple) else (key,)
        return self._folder / f"{'-'.join(map(str, parts))}.bin"


def states_bytes(model: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Return the bytes of the states of all batches at one boundary."""
    values = sum(ids.numel() for ids, _ in batches) * int(model.config.hidden_size)
    return values * int(model.get_input_embeddings().weight.element_size())


@contextmanager
def state_store(model: Any, size: int, folder: Path | None = None) -> Iterator[BatchStore]:
    """Give a store for ``size`` bytes of states: in memory up to a quarter of what is free.

    Beyond that they lie in files.

    Args:
        folder: where a folder for them is made, of this process alone: what killed processes left
            there is deleted. None: that of temporary files.

    Raises:
        OutputError: the disk has no room for the files.
    """
    prefix = f"states-{os.getpid()}-"
    for left in folder.glob("states-*") if folder is not None else ():
        if not left.name.startswith(prefix):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as place:
        device = model.get_input_embeddings().weight.device
        budget = int(free_memory("cpu") * MEMORY_SHARE)
        store = BatchStore(Path(place) / "states", size, budget, device)
        where = f"in files in {place}" if store.on_disk else "in memory"
        log.info("hidden states: %.3g GB, kept %s", size / 1e9, where)
        try:
            yield store
        finally:
            store.close()
