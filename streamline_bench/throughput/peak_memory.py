"""Peak memory of a process and its children while something runs, sampled from outside."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

from streamline_bench.throughput.nvml import Device

__all__ = ["PeakMemory", "resident_bytes"]

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            last = self._done.wait(INTERVAL_SECONDS if self.bytes is not None else 0)
            self._sample()
            if last:
                return

    def _sample(self) -> None:
        found = _tree(self._pid)
        if self._device is not None:
            held = self._device.memory_bytes(process.pid for process in found)
        else:
            held = resident_bytes(found) or None
        if held is not None:
            self.bytes = max(self.bytes or 0, held)


def resident_bytes(processes: list[psutil.Process]) -> int:
    """Resident memory of some processes; pages they share count for each."""
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # it ended meanwhile
    return total


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
