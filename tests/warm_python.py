"""Processes of Python as forks of one that has its imports done.

Every job of a comparison is a process that imports torch, transformers and the harness: ten seconds
of processor time, and a test of a comparison starts five. Here one process imports and waits, and
:class:`WarmPopen` asks it for forks. Each is a process of its own, with the folder, variables,
files, session and exit code that it would have anyway, and it can be killed like any other.

Whatever a fork cannot take over is started as ever: other programs, and variables that libraries
read when they are imported.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import json
import logging
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

MODULES = (
    "lm_eval",
    "streamline_bench",
    "streamline_bench.runs.jobs.worker",
    "streamline_bench.throughput.worker",
)
"""What ``-m`` may name; a program of a test (``-c``, or a file) may also be what is forked."""

IMPORTED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "lm_eval._cli",
    "streamline_bench.cli.main",
    "streamline_bench.compression.pipeline",
    "streamline_bench.harness.lm",
    "streamline_bench.harness.trunk.score",
    "streamline_bench.report.build",
    "streamline_bench.runs.jobs.score",
    "streamline_bench.runs.run",
)

READ_EARLY = ("CUDA_", "HF_", "LD_", "MKL_", "OPENBLAS_", "PYTHON", "TORCH_", "TRANSFORMERS_")
"""Beginnings of variables that something reads when it is imported."""
READ_LATE = (
    "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_XET_HIGH_PERFORMANCE",
    "PYTHONBREAKPOINT", "PYTHONPATH", "TRANSFORMERS_VERBOSITY",
)  # fmt: skip
"""Of these, what a fork follows by itself, what transformers and Ray set, and what only spares
lines."""

_SIZE = 1 << 17
_LINE = 8000
"""Room for the command lines of forks, in bytes."""
_FREE = 200
"""File descriptors from here on are not in use."""


def _read_early(environment: dict[str, str]) -> dict[str, str]:
    late = READ_LATE if Path("/dev/nvidiactl").exists() else (*READ_LATE, "CUDA_VISIBLE_DEVICES")
    return {
        key: text
        for key, text in environment.items()
        if key.startswith(READ_EARLY) and key not in late
    }


class WarmPopen(subprocess.Popen[Any]):
    """A process that is a fork of the waiting one, where it can be.

    Attributes:
        address: of the waiting process; None: there is none.
        forks: number of processes that were forks.
    """

    address: ClassVar[str | None] = None
    at_import: ClassVar[dict[str, str]] = {}
    is_fork: ClassVar[bool] = False
    forks: ClassVar[int] = 0
    _connection: socket.socket | None = None

    @classmethod
    @contextmanager
    def used(cls) -> Iterator[None]:
        """Whoever starts a process in this context starts one of these."""
        before = subprocess.Popen
        subprocess.Popen = cls  # type: ignore[misc]
        try:
            yield
        finally:
            subprocess.Popen = before  # type: ignore[misc]

    def _execute_child(self, *given: Any) -> None:
        names = inspect.signature(super()._execute_child).parameters  # type: ignore[misc]
        asked = dict(zip(names, given, strict=True))
        request = self._request(asked)
        if request is None:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        files = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        files = [number if fd == -1 else fd for number, fd in enumerate(files)]
        type(self).forks += 1
        if self.is_fork and not asked["start_new_session"]:
            # In its starter's process group, as ever: what ends the group ends it.
            sys.stdout.flush()
            sys.stderr.flush()
            self.pid = os.fork()
            if self.pid == 0:
                _fork_of_work(request, [*files, *asked["pass_fds"]])
        else:
            self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._connection.connect(f"\0{self.address}")
            message = json.dumps(request).encode()
            socket.send_fds(self._connection, [message], [*files, *asked["pass_fds"]])
            self.pid = int(self._connection.recv(_SIZE))
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))  # type: ignore[attr-defined]

    def _request(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What the waiting process is sent; None: this is started as ever."""
        environment = dict(os.environ if asked["env"] is None else asked["env"])
        words = [str(word) for word in asked["args"]] if isinstance(asked["args"], list) else []
        plain = {"preexec_fn": None, "executable": None, "shell": False, "process_group": -1,
                 "gid": None, "gids": None, "uid": None, "umask": -1}  # fmt: skip
        if (
            self.address is None
            or not self._is_known(words)
            or any(asked.get(name, default) != default for name, default in plain.items())
            or _read_early(environment) != self.at_import
        ):
            return None
        return {
            "words": words[1:],
            "environment": environment,
            "folder": str(Path(asked["cwd"] or ".").absolute()),
            "session": asked["start_new_session"],
            "numbers": [0, 1, 2, *asked["pass_fds"]],
        }

    def _is_known(self, words: list[str]) -> bool:
        if len(words) < 2 or words[0] != sys.executable:
            return False
        if words[1] == "-m":
            return words[2] in MODULES
        return not self.is_fork and (words[1] == "-c" or words[1].endswith(".py"))

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._connection is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        if wait_flags and not select.select([self._connection], [], [], 0)[0]:
            return 0, 0
        told = self._connection.recv(_SIZE)
        self._connection.close()
        return self.pid, int(told or signal.SIGKILL)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if getattr(self, "_connection", None) is None:
            return super()._internal_poll(*_, **__)  # type: ignore[misc,no-any-return]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


@contextmanager
def waiting() -> Iterator[type[WarmPopen]]:
    """Start the waiting process; it ends with this context, or with this process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = f"warm-python-{os.getpid()}-{secrets.token_hex(8)}"
    listener.bind("\0" + address)
    listener.listen(64)
    # What an executor sets for a job on the CPU.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TQDM_MININTERVAL": "15"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno()), address, "." * _LINE],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True,
        pass_fds=[listener.fileno()],
    )  # fmt: skip
    listener.close()
    process.wait()  # what waits is no child of this process: tests look at their children
    assert process.stdin is not None
    with process.stdin:
        at_import = _read_early(environment)
        yield type("WarmPopenOf", (WarmPopen,), {"address": address, "at_import": at_import})


def main(arguments: list[str]) -> None:
    """Import, wait, fork; in a fork, run the module."""
    if os.fork():
        os._exit(0)
    listener = socket.socket(fileno=int(arguments[0]))
    WarmPopen.address, WarmPopen.at_import = arguments[1], _read_early(dict(os.environ))
    for name in IMPORTED:
        importlib.import_module(name)
    _look_at_the_machine()
    gc.collect()
    gc.freeze()  # what was imported stays in pages that all forks share
    request = _serve(listener)
    WarmPopen.is_fork = True
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    _run(request["words"])


def _look_at_the_machine() -> None:
    """Do what every evaluation in a fork ends with; it takes PyTorch one to three seconds."""
    from torch.utils import collect_env

    from streamline_bench.harness.trunk.evaluation import look_at_the_machine_once

    look_at_the_machine_once()
    collect_env.get_pretty_env_info()


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for every request; return it in the fork."""
    running: dict[int, socket.socket] = {}
    woken, wake = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([listener, 0, woken], [], [])
        if 0 in ready:  # closed: whoever started this is gone
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    _tell(running.pop(pid), status)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        message, files, _, _ = socket.recv_fds(connection, _SIZE, 64)
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer = _moved(connection.fileno())
            for number in (woken, wake):
                os.close(number)
            for other in (listener, connection, *running.values()):
                other.close()
            request: dict[str, Any] = json.loads(message)
            _take_over(request, files)
            for number in {*files} - {*request["numbers"]}:
                os.close(number)
            os.write(answer, str(os.getpid()).encode())
            os.close(answer)
            return request
        running[pid] = connection
        for number in files:
            os.close(number)


def _tell(connection: socket.socket, status: int) -> None:
    with connection, suppress(OSError):  # who asked may be gone
        connection.send(str(status).encode())


def _take_over(request: dict[str, Any], files: list[int]) -> None:
    """Become the process that was asked for, up to its first line of Python."""
    if request["session"]:
        os.setsid()
    # First out of the way of the numbers that they are to have.
    moved = [_moved(number) for number in files]
    for number, target in zip(moved, request["numbers"], strict=True):
        os.dup2(number, target, inheritable=True)
    for number in moved:
        os.close(number)
    _show(["python", *request["words"]])
    os.chdir(request["folder"])
    before = _folders(os.environ)
    os.environ.clear()
    os.environ.update(request["environment"])
    if before != (after := _folders(os.environ)):
        sys.path[1:] = [*after, *(folder for folder in sys.path[1:] if folder not in before)]
        importlib.invalidate_caches()


def _folders(environment: Mapping[str, str]) -> list[str]:
    return [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]


def _show(words: list[str]) -> None:
    """Write the words over this process's command line, which lists of processes show."""
    import ctypes

    # Behind the name, which is in brackets: from the third field on. See man proc.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[48 - 3]), int(fields[49 - 3])
    if start < end:  # else the system does not tell
        text = "\0".join(words).encode()[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def _moved(number: int) -> int:
    import fcntl

    return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _FREE)


def _run(words: list[str]) -> NoReturn:
    """Run what is behind ``python`` on its command line, and end."""
    import numpy as np
    import torch

    code = 1
    try:
        np.random.seed(None)
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        _run_main(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # Taking everything apart would copy every page of what was imported.
            os._exit(code)


def _run_main(words: list[str]) -> None:
    if words[0] == "-m":
        sys.path[0], sys.argv = str(Path.cwd()), words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        sys.modules["__main__"] = main_module = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main_module))
    else:
        sys.path[0], sys.argv = str(Path(words[0]).absolute().parent), list(words)
        runpy.run_path(words[0], run_name="__main__")


def _fork_of_work(request: dict[str, Any], files: list[int]) -> NoReturn:
    """In a fork of a process that is at work: run the module, with nothing of that process."""
    atexit._clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.root.handlers.clear()
    logging.getLogger("streamline_bench").setLevel(logging.NOTSET)
    _take_over(request, files)
    for number in [int(each.name) for each in Path("/proc/self/fd").iterdir()]:
        if number not in request["numbers"]:
            with suppress(OSError):  # the one of the listing itself
                os.close(number)
    _run(request["words"])


if __name__ == "__main__":
    # Not under the name of the program: forks ask, too.
    sys.path[0] = str(Path(__file__).parent)
    importlib.import_module("warm_python").main(sys.argv[1:])
