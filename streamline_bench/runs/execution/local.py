"""Jobs as processes of this machine, each with a GPU of its own."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from streamline_bench.runs.execution.executor import Ended, Unit
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.execution.process import JobProcess

__all__ = ["LocalExecutor"]

_POLL = 0.05
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class _Running:
    process: JobProcess
    gpu: str | None
    limit: float | None


class LocalExecutor:
    """A pool of job processes.

    Attributes:
        execution: number of workers, GPUs, time limit.
    """

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._free = list(execution.gpus)
        self._running: dict[str, _Running] = {}

    def has_room(self) -> bool:
        """Whether a worker, and its GPU, are free."""
        return len(self._running) < self.execution.job_slots

    def submit(self, run: Path, unit: Unit) -> None:
        """Start the unit's process.

        Raises:
            OutputError: its log cannot be written.
        """
        gpu = self._free.pop(0) if self._free else None
        environment = {"OMP_NUM_THREADS": str(self.execution.threads_per_job)}
        environment |= {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"}
        environment |= unit.environment
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        elif self.execution.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        process = JobProcess(run, unit.name, environment)
        limit = unit.limit(self.execution.timeout)
        self._running[unit.name] = _Running(process, gpu, limit)

    def ended(self, timeout: float) -> list[Ended]:
        """See :class:`~streamline_bench.runs.execution.executor.Executor`."""
        until = time.monotonic() + timeout
        while True:
            found = [ended for name in list(self._running) if (ended := self._look(name))]
            if found or not self._running or time.monotonic() >= until:
                return found
            time.sleep(_POLL)

    def stop(self) -> None:
        """End every job and what it started."""
        for name in list(self._running):
            self._running.pop(name).process.end()

    def _look(self, name: str) -> Ended | None:
        running = self._running[name]
        code = running.process.poll()
        limit = running.limit
        reason = None
        if code is None:
            if limit is None or running.process.seconds < limit:
                return None
            running.process.end()
            code, reason = 1, f"It ran longer than {limit:g} s (--timeout)."
        del self._running[name]
        if running.gpu is not None:
            self._free.append(running.gpu)
        return Ended(name, code, reason)
