"""The measuring side's handle of a model's process: ask, wait no longer than allowed, end it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from streamline_bench.core.machine.environment import printable
from streamline_bench.core.machine.processes import GRACE, LeashedProcess
from streamline_bench.throughput.meters import process_tree
from streamline_bench.throughput.worker import is_out_of_memory

_LOG_TAIL = 1 << 16
_LONGEST_WAIT = 3600.0  # the system takes no wait of more than some weeks
_POINTS_TO_LOG = re.compile(r"engine ?core|ended with exit code", re.IGNORECASE)
_NAMES_ERROR = re.compile(r"\b[A-Za-z]*(Error|Exception)\b: ")


class WorkerError(Exception):
    """A model's process failed: it becomes a row of the record, not the end of the run."""

    def __init__(self, reason: str, *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.out_of_memory = out_of_memory


class ModelProcess(LeashedProcess):
    """A worker in a process group of its own (see :mod:`.worker`).

    Args:
        job: ``module:Class`` of what the worker does.
        environment: variables set on top of this process's.
        log: file that receives all its output.
        python: interpreter; None: that of this process.
    """

    def __init__(
        self, job: str, environment: Mapping[str, str], log: Path, python: str | None = None
    ) -> None:
        self._log = log
        self._kills = kernel_kills()
        command = [python or sys.executable, "-m", "streamline_bench.throughput.worker", job]
        with log.open("ab") as output:
            self._log_start = output.tell()
            super().__init__(command, output, piped=True, environment=environment)
        self._buffer = b""
        self._children: list[psutil.Process] = []
        self._closed = False

    def ask(self, call: str, doing: str, timeout: float, **arguments: Any) -> Any:
        """Have the worker do something and return its answer.

        Args:
            call: method of the worker's job.
            doing: for the reason of a failure: "loading".
            timeout: seconds.

        Raises:
            WorkerError: it raised, ended, or did not answer in time. The process is gone then.
        """
        try:
            reply = self._exchange({"call": call, "arguments": arguments}, timeout)
        except TimeoutError:
            self.close(at_once=True)
            raise WorkerError(
                f"no answer within {timeout:g} s while {doing}; the process was ended"
            ) from None
        except BaseException:  # such as Ctrl-C
            self.close(at_once=True)
            raise
        if reply is None:
            raise self._ended(doing)
        if "error" in reply:
            self.close()
            raise self._failed(reply, doing)
        return reply["answer"]

    def hang_up(self) -> None:
        """Tell the process to end, and do not wait for it."""
        if self._closed:
            return
        self._children += process_tree(self.pid)[1:]  # while it can still be asked for them
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def close(self, *, at_once: bool = False) -> None:
        """End the process and everything it started, once: its id may be another's later."""
        self.hang_up()
        if self._closed:
            return
        self._closed = True
        try:
            if not at_once:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE)
        finally:  # such as Ctrl-C
            self._clear()
            for child in self._children:  # those that left the group
                with contextlib.suppress(psutil.Error):
                    child.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    def _exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """Send one line, return the answer to it; None if the process ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError:
            return None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if not selector.select(min(max(0.0, left), _LONGEST_WAIT)):
                    if left > _LONGEST_WAIT:
                        continue
                    raise TimeoutError
                received = os.read(stdout.fileno(), 1 << 16)
                if not received:
                    return None
                self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failed(self, reply: dict[str, Any], doing: str) -> WorkerError:
        """What the worker said; where that only points to a process of its own, the log's word."""
        reason, ran_out = f"{reply['error']} (while {doing})", bool(reply["out_of_memory"])
        if _POINTS_TO_LOG.search(reply["error"]):
            log = self.log_tail()
            ran_out = ran_out or is_out_of_memory(log)
            reason += f": {_last_error(log, but=reply['error'])}"
        return WorkerError(reason, out_of_memory=ran_out)

    def _ended(self, doing: str) -> WorkerError:
        self.close()
        code = self._process.returncode
        if code >= 0:
            log = self.log_tail()
            reason = f"the process ended with exit code {code} while {doing}: {_last_error(log)}"
            return WorkerError(reason, out_of_memory=is_out_of_memory(log))
        for_memory = code == -signal.SIGKILL and kernel_kills() != self._kills
        return WorkerError(
            f"the process was killed by signal {-code} ({signal.Signals(-code).name}) while {doing}"
            + (", because the system's memory ran out" if for_memory else ""),
            out_of_memory=for_memory,
        )

    def log_tail(self) -> str:
        """Return the end of what this process has printed."""
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _LOG_TAIL))
            return file.read().decode("utf-8", "replace")


def kernel_kills() -> int | None:
    """How many processes the kernel has ended for memory since it started; None if unknown."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _last_error(log: str, but: str | None = None) -> str:
    """The last line that names an error (another one than ``but``), else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if but is None or but not in line]
    errors = [line for line in lines if _NAMES_ERROR.search(line)]
    return printable((errors or lines or ["nothing was printed"])[-1])[:300]
