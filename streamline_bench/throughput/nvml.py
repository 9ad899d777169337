"""Energy and memory of an NVIDIA device through NVML, where its Python binding is installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from streamline_bench.errors import ThroughputError

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
    """Return the entry of ``CUDA_VISIBLE_DEVICES`` that torch's ``cuda`` or ``cuda:N`` means.

    Where the variable is not set, every device is visible. CUDA reads its list up to the first
    entry that names none, such as ``-1``; an empty list shows no device at all.

    Raises:
        ThroughputError: the list is shorter.
    """
    number = int(device.partition(":")[2] or 0)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return str(number)
    listed = list(takewhile(_names_device, (entry.strip() for entry in given.split(","))))
    if number >= len(listed):
        raise ThroughputError(
            f"There is no device '{device}' in CUDA_VISIBLE_DEVICES='{given}', which shows "
            f"{len(listed)}; give a device below that, or another list."
            if listed
            else f"CUDA_VISIBLE_DEVICES='{given}' shows no device, and '{device}' was asked for; "
            "give device 'cpu', or name a device there."
        )
    return listed[number]


def _names_device(entry: str) -> bool:
    return bool(entry) and entry != "-1"
