"""Energy and memory of an NVIDIA device through NVML, where its Python binding is installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from typing import Any

__all__ = ["Device", "open_device", "visible_device"]


class Device:
    """One device. Every reading is None where the device or the driver cannot give it."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle

    def energy_joules(self) -> float | None:
        """Energy drawn since the driver was loaded."""
        try:
            return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._library.NVMLError:
            return None

    def memory_bytes(self, processes: Iterable[int]) -> int | None:
        """Memory that the given processes hold together; None if NVML sees none of them.

        In a container with process numbers of its own, NVML does not know them.
        """
        wanted = set(processes)
        try:
            running = self._library.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._library.NVMLError:
            return None
        held = [p.usedGpuMemory for p in running if p.pid in wanted and p.usedGpuMemory]
        return sum(held) or None


def open_device(visible: str) -> tuple[Device | None, str]:
    """Return the device of an entry of ``CUDA_VISIBLE_DEVICES``, or None, and a remark on it."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None, "not read: pynvml is not installed (pip install nvidia-ml-py)"
    try:
        library.nvmlInit()
        by_index = visible.isdigit()
        handle = (
            library.nvmlDeviceGetHandleByIndex(int(visible))
            if by_index
            else library.nvmlDeviceGetHandleByUUID(visible)
        )
    except library.NVMLError as error:
        return None, f"not read: NVML: {error}"
    return Device(library, handle), "NVML"


def visible_device(device: str) -> str:
    """Return the entry of ``CUDA_VISIBLE_DEVICES`` that torch's ``cuda`` or ``cuda:N`` means."""
    number = int(device.partition(":")[2] or 0)
    listed = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return listed[number] if number < len(listed) else str(number)
