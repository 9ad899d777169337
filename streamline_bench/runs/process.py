"""The process of a job: a group of its own, on a leash, so that none outlives who started it.

The leash is a pipe. The starter holds one end for as long as it lives, the job waits at the other;
when the starter ends in any way, ``kill -9`` included, the system closes the pipe and the job
kills its whole process group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from streamline_bench.errors import OutputError
from streamline_bench.runs.folder import job_folder

__all__ = ["JobProcess", "hold_leash"]

_LEASH = "STREAMLINE_BENCH_LEASH"
GRACE = 5.0
"""Seconds between asking a process to end and killing it."""


class JobProcess:
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
        command: Sequence[str] = ("-m", "streamline_bench.runs.work"),
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
        self._let_go = False
        log_file = job_folder(run, name) / "log.txt"
        try:
            with log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *command, str(run), name],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    cwd=folder,
                    env={**os.environ, **environment, _LEASH: "1"},
                )
        except OSError as error:
            raise OutputError(
                f"{log_file} cannot be written ({error.strerror or error}); run again when it can."
            ) from None

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its group."""
        return self._process.pid

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the start."""
        return time.monotonic() - self._started

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        code = self._process.poll()
        if code is not None and not self._let_go:
            # A job that was killed may leave the harness behind in its group.
            self._clear()
        return code

    def end(self) -> None:
        """Ask the process group to end, and kill it when it does not."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._clear()
        self._process.wait()

    def _signal(self, number: int) -> None:
        # Not found: the whole group is gone.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _clear(self) -> None:
        """Kill what is left of the group; once, because its id may be another's later."""
        self._signal(signal.SIGKILL)
        self._let_go = True
        if self._process.stdin is not None:
            self._process.stdin.close()


def hold_leash() -> None:
    """In the job's process: end with everything it started once its starter is gone."""
    if not os.environ.pop(_LEASH, None):
        return  # started by hand

    def wait() -> None:
        # os.read, not sys.stdin: a thread inside the buffered reader upsets Python's shutdown.
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
