"""Wall time, processor time and energy of a stretch of work, read in the process that does it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

from streamline_bench.throughput.nvml import Device

__all__ = ["Reading", "Stopwatch"]


@dataclass(frozen=True)
class Reading:
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
