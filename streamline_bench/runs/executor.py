"""What the scheduler asks of an executor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from streamline_bench.runs.jobs import Job

__all__ = ["Ended", "Executor"]


@dataclass(frozen=True)
class Ended:
    """How a job's process ended.

    Attributes:
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

    def has_room(self) -> bool:
        """Whether a job that is submitted now can start."""

    def submit(self, run: Path, job: Job) -> None:
        """Start a job, or hand it to the cluster."""

    def ended(self, timeout: float) -> list[Ended]:
        """Wait at most ``timeout`` seconds for jobs to end; return those that did."""

    def stop(self) -> None:
        """End every job that runs."""
