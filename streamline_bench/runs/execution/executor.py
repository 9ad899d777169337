"""What the scheduler asks of an executor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from streamline_bench.runs.jobs.graph import Job

__all__ = ["Ended", "Executor", "Unit"]


@dataclass(frozen=True)
class Unit:
    """What one process does: a job, or several that are scored together.

    Attributes:
        name: names its folder below ``jobs``; for a single job, the job's name.
    """

    name: str
    jobs: tuple[Job, ...]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the process."""
        return dict(self.jobs[0].environment)

    def limit(self, timeout: float | None) -> float | None:
        """Seconds it may take, where one job may take ``timeout``."""
        return None if timeout is None else timeout * len(self.jobs)


@dataclass(frozen=True)
class Ended:
    """How the process of a unit ended.

    Attributes:
        name: the unit's.
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
    """Runs units of one run folder."""

    def has_room(self) -> bool:
        """Whether a unit that is submitted now can start."""

    def submit(self, run: Path, unit: Unit) -> None:
        """Start a unit, or hand it to the cluster."""

    def ended(self, timeout: float) -> list[Ended]:
        """Wait at most ``timeout`` seconds for units to end; return those that did."""

    def stop(self) -> None:
        """End everything that runs."""
