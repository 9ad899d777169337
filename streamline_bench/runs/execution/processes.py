"""Jobs as processes: what an executor is, and the one that runs them on this machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from streamline_bench.core.machine.processes import LeashedProcess
from streamline_bench.errors import OutputError
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job

_POLL = 0.05
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Ended:
    """How the process of a job ended.

    Attributes:
        name: the job's.
        code: exit code, negative for a signal; None: process or machine was lost.
        reason: why, where the executor knows it.
    """

    name: str
    code: int | None
    reason: str | None = None

    @property
    def lost(self) -> bool:
        """The job did not end by itself, so that another attempt may succeed."""
        return self.code is None or self.code < 0


class Executor(Protocol):
    """Runs jobs of one run folder."""

    def has_room(self, kind: str) -> bool:
        """Whether a job of this kind can start if it is submitted now."""

    def at_once(self, kind: str) -> int:
        """Jobs of this kind that run at the same time without slowing each other, as far as known.

        At least one. Processes that share a machine's CPUs do slow each other.
        """

    def submit(self, run: RunPaths, job: Job) -> None:
        """Start a job, or hand it to the cluster."""

    def ended(self, timeout: float) -> list[Ended]:
        """Wait at most ``timeout`` seconds for jobs to end; return those that did."""

    def stop(self) -> None:
        """End everything that runs."""


def time_limit(job: Job, timeout: float | None) -> float | None:
    """Seconds that a process may take, where one job may take ``timeout``."""
    return None if timeout is None else timeout * len(job.parts)


class JobProcess(LeashedProcess):
    """A running job, which does not outlive who started it.

    Attributes:
        name: the job's.
        seconds: monotonic time since it was started.
    """

    def __init__(
        self,
        run: RunPaths,
        name: str,
        environment: Mapping[str, str],
        folder: Path | None = None,
        command: Sequence[str] = ("-m", "streamline_bench.runs.jobs.worker"),
    ) -> None:
        """Start the process; the job's log keeps its output (OutputError: it cannot be written).

        Args:
            folder: where it starts; None: where this process is.
            command: what Python is to run, with the run folder and the name behind it.
        """
        self.name = name
        # Of progress bars, a line now and then is enough for a log.
        environment = {"TQDM_MININTERVAL": "15", **environment}
        self._started = time.monotonic()
        log_file = run.log(name)
        asked = [sys.executable, *command, str(run.root), name]
        try:
            with log_file.open("ab") as log:
                super().__init__(asked, log, environment=environment, folder=folder)
        except OSError as error:
            raise OutputError(
                f"{log_file} cannot be written ({error.strerror or error}); remove the cause and "
                "run again."
            ) from None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the start."""
        return time.monotonic() - self._started


def outcome(process: JobProcess, limit: float | None) -> tuple[int, str | None] | None:
    """Return exit code and, where it is ended here after ``limit`` seconds, the reason."""
    if (code := process.poll()) is not None:
        return code, None
    if limit is None or process.seconds < limit:
        return None
    process.end()
    return 1, f"It ran longer than {limit:g} s (--timeout)."


def environment_of(job: Job, cpus: int) -> dict[str, str]:
    """Return the variables of a job on another machine: threads, and settings of data and caches.

    Args:
        cpus: that the job asks for.
    """
    named = ("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    own = {
        key: value
        for key, value in os.environ.items()
        if key.startswith("STREAMLINE_BENCH_") or key in named
    }
    threads = max(1, cpus // job.processes)
    return {"OMP_NUM_THREADS": str(threads), **own, **job.environment}


def run_job_here(
    run: str, name: str, environment: dict[str, str], timeout: float | None, folder: str
) -> tuple[int, str | None]:
    """On a worker: do one job in a process that ends with the worker.

    Args:
        folder: where the comparison was started; relative paths in recipes start there.

    Returns:
        Its exit code, and the reason where it was stopped here.
    """
    process = JobProcess(RunPaths(Path(run)), name, environment, Path(folder))
    try:
        while (found := outcome(process, timeout)) is None:
            time.sleep(_POLL)
    except BaseException:
        process.end()
        raise
    return found


class _Running(NamedTuple):
    process: JobProcess
    gpus: list[str]
    limit: float | None


class LocalExecutor:
    """A pool of job processes on this machine, each with GPUs of its own.

    Attributes:
        execution: number of workers, GPUs, time limit.
    """

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._free = list(execution.gpus)
        self._running: dict[str, _Running] = {}

    def has_room(self, kind: str) -> bool:
        """Whether a worker, and its GPUs, are free."""
        free = len(self._free) >= self.execution.gpus_of(kind)
        return free and len(self._running) < self.execution.job_slots

    def at_once(self, kind: str) -> int:
        """As many as there are groups of GPUs for."""
        return self.execution.job_slots if self.execution.gpus else 1

    def submit(self, run: RunPaths, job: Job) -> None:
        """Start the job's process (OutputError: its log cannot be written)."""
        number = self.execution.gpus_of(job.parts[0].kind)
        gpus, self._free = self._free[:number], self._free[number:]
        share = max(1, self.execution.threads_per_job // job.processes)
        threads = os.environ.get("OMP_NUM_THREADS", str(share))
        environment = {"OMP_NUM_THREADS": threads, **job.environment}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        elif self.execution.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        process = JobProcess(run, job.name, environment)
        limit = time_limit(job, self.execution.timeout)
        self._running[job.name] = _Running(process, gpus, limit)

    def ended(self, timeout: float) -> list[Ended]:
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
        process, gpus, limit = self._running[name]
        if (found := outcome(process, limit)) is None:
            return None
        del self._running[name]
        self._free += gpus
        return Ended(name, *found)
