"""A process on a leash: a group of its own, which does not outlive who started it.

The leash is a pipe. The starter holds one end for as long as it lives, the process waits at the
other; when the starter ends in any way, ``kill -9`` included, the system closes the pipe and the
process kills its whole group. ``python -m streamline_bench.core.machine.processes MODULE
ARGUMENT...`` puts any module on the leash, as ``python -m MODULE`` would run it.
"""

from __future__ import annotations

import atexit
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_LEASH = "STREAMLINE_BENCH_LEASH"
HOST = "127.0.0.1"
"""Where processes of this machine talk to each other."""
GRACE = 5.0
"""Seconds between asking a process to end and killing it."""


class LeashedProcess:
    """A running process that calls :func:`hold_leash` first, with everything it starts."""

    def __init__(
        self,
        command: Sequence[str],
        output: IO[bytes],
        *,
        piped: bool = False,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            output: file of what it prints, to stdout or stderr.
            piped: its stdin and stdout are pipes to this process; ``output`` gets its stderr.
            environment: variables on top of this process's.
            folder: where it starts; None: where this process is.

        Raises:
            OSError: it cannot be started.
        """
        self._let_go = False
        far_end, self._leash = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                stderr=output if piped else subprocess.STDOUT,
                start_new_session=True,
                cwd=folder,
                env={**os.environ, **(environment or {}), _LEASH: str(far_end)},
                pass_fds=(far_end,),
            )
        except BaseException:
            os.close(self._leash)
            raise
        finally:
            os.close(far_end)

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        code = self._process.poll()
        if code is not None and not self._let_go:
            # A process that was killed may leave what it started behind in its group.
            self._clear()
        return code

    def end(self) -> None:
        """Ask the process group to end, and kill it when it does not, or when asked again."""
        self._signal(signal.SIGTERM)
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        finally:  # such as a second Ctrl-C
            self._clear()
            self._process.wait()

    def _signal(self, number: int) -> None:
        # Not found: the whole group is gone.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _clear(self) -> None:
        """Kill what is left of the group; once, because its id may be another's later."""
        if not self._let_go:
            self._signal(signal.SIGKILL)
            self._let_go = True
            os.close(self._leash)


def hold_leash() -> None:
    """In the leashed process: end with everything it started once its starter is gone."""
    leash = os.environ.pop(_LEASH, None)
    if leash is None:
        return  # started by hand
    far_end = int(leash)
    os.set_inheritable(far_end, False)

    def wait() -> None:
        while os.read(far_end, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    def at_exit() -> None:
        # A process that ends because its starter is gone may be quicker than the thread.
        if select.select([far_end], [], [], 0.05)[0]:
            os.killpg(0, signal.SIGKILL)

    atexit.register(at_exit)
    threading.Thread(target=wait, daemon=True).start()


def free_port() -> int:
    """Return a port that was free a moment ago; another process may take it at any time."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def main(arguments: Sequence[str]) -> None:
    """Run a module on the leash, as ``python -m`` does."""
    hold_leash()
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
