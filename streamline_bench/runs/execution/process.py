"""The process of a job: on a leash, so that it does not outlive who started it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamline_bench.core.machine.processes import LeashedProcess
from streamline_bench.errors import OutputError
from streamline_bench.runs.folder import job_folder

__all__ = ["JobProcess"]


class JobProcess(LeashedProcess):
    """A running job.

    Attributes:
        name: the job's.
        seconds: monotonic time since it was started.
    """

    def __init__(
        self,
        run: Path,
        name: str,
        environment: Mapping[str, str],
        folder: Path | None = None,
        command: Sequence[str] = ("-m", "streamline_bench.runs.jobs.worker"),
    ) -> None:
        """Start the process; its output goes to the job's log.

        Args:
            folder: where it starts; None: where this process is.
            command: what Python is to run, with the run folder and the name behind it.

        Raises:
            OutputError: the log cannot be written.
        """
        self.name = name
        self._started = time.monotonic()
        log_file = job_folder(run, name) / "log.txt"
        asked = [sys.executable, *command, str(run), name]
        try:
            with log_file.open("ab") as log:
                super().__init__(asked, log, environment=environment, folder=folder)
        except OSError as error:
            raise OutputError(
                f"{log_file} cannot be written ({error.strerror or error}); run again when it can."
            ) from None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the start."""
        return time.monotonic() - self._started
