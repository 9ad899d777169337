"""Time, energy and memory of a stretch of work, and the NVIDIA device they are read from."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NamedTuple

import psutil

from streamline_bench.errors import ThroughputError


class Device:
    """One device, or those of one model. Every reading is None where it cannot be given."""

    def __init__(self, library: Any, *handles: Any) -> None:
        self._library = library
        self._handles = handles

    def energy_joules(self) -> float | None:
        """Energy drawn since the driver was loaded."""
        read = self._library.nvmlDeviceGetTotalEnergyConsumption
        try:
            return sum(float(read(handle)) for handle in self._handles) / 1000
        except self._library.NVMLError:
            return None

    def memory_bytes(self, processes: Iterable[int]) -> int | None:
        """Memory that the given processes hold together; None if NVML sees none of them.

        NVML does not know the process ids inside a container.
        """
        wanted = set(processes)
        try:
            running = [
                process
                for handle in self._handles
                for process in self._library.nvmlDeviceGetComputeRunningProcesses(handle)
            ]
        except self._library.NVMLError:
            return None
        held = [p.usedGpuMemory for p in running if p.pid in wanted and p.usedGpuMemory]
        return sum(held) or None

    def free_bytes(self) -> int | None:
        """Free memory, of several the least."""
        read = self._library.nvmlDeviceGetMemoryInfo
        try:
            return min(int(read(handle).free) for handle in self._handles)
        except self._library.NVMLError:
            return None


def open_device(visible: str) -> tuple[Device | None, str]:
    """Return the devices of ``CUDA_VISIBLE_DEVICES``, or None, and a remark on them."""
    library = importlib.import_module("pynvml")
    handles = []
    try:
        library.nvmlInit()
        for entry in visible.split(","):
            if entry.isdigit():
                handles.append(library.nvmlDeviceGetHandleByIndex(int(entry)))
            else:
                handles.append(library.nvmlDeviceGetHandleByUUID(entry))
    except library.NVMLError as error:
        return None, f"not read: NVML: {error}"
    return Device(library, *handles), "NVML"


def visible_device(device: str) -> str:
    """Return the entry of ``CUDA_VISIBLE_DEVICES`` that torch's ``cuda`` or ``cuda:N`` means.

    Without the variable every device is visible. CUDA reads the list up to the first entry that
    names no device, such as ``-1``.

    Raises:
        ThroughputError: the variable lists fewer devices.
    """
    number = int(device.partition(":")[2] or 0)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return str(number)
    entries = (entry.strip() for entry in given.split(","))
    listed = list(takewhile(lambda entry: entry not in ("", "-1"), entries))
    if number >= len(listed):
        raise ThroughputError(
            f"Device '{device}' is not visible: CUDA_VISIBLE_DEVICES='{given}' lists "
            f"{len(listed)} device{'' if len(listed) == 1 else 's'}. Give another device, or "
            "change the variable."
        )
    return listed[number]


class Reading(NamedTuple):
    """Seconds of wall and processor time, and joules where a device counts them."""

    seconds: float
    cpu_seconds: float
    energy_joules: float | None


class Stopwatch:
    """Runs from when it is made until it is read."""

    def __init__(self, device: Device | None = None) -> None:
        self._device = device
        self._energy = device.energy_joules() if device is not None else None
        self._cpu = _cpu_seconds()
        self._wall = time.perf_counter()

    def read(self) -> Reading:
        """Return what has passed since the start."""
        seconds = time.perf_counter() - self._wall
        cpu_seconds = _cpu_seconds() - self._cpu
        energy = self._device.energy_joules() if self._device is not None else None
        drawn = None if energy is None or self._energy is None else energy - self._energy
        return Reading(seconds, cpu_seconds, drawn)


def _cpu_seconds() -> float:
    """Processor time of this process, all its threads, and its children that still run."""
    spent = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue  # it ended between the two calls
        spent += times.user + times.system
    return spent


INTERVAL_SECONDS = 0.2


class PeakMemory:
    """``with PeakMemory(pid) as peak: ...; peak.bytes``: the largest of many samples.

    Without a device it is resident memory of the process tree, else what the tree holds on the
    device. A spike shorter than 0.2 s can be missed.
    """

    def __init__(self, pid: int, device: Device | None = None) -> None:
        self.bytes: int | None = None
        self._pid = pid
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._done.wait(INTERVAL_SECONDS if self.bytes is not None else 0)
            found = process_tree(self._pid)
            if self._device is not None:
                held = self._device.memory_bytes(process.pid for process in found)
            else:
                held = _resident_bytes(found) or None
            if held is not None:
                self.bytes = max(self.bytes or 0, held)


def _resident_bytes(processes: list[psutil.Process]) -> int:
    """Resident memory of some processes; pages they share count for each."""
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # it ended meanwhile
    return total


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it; none if it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
