"""Forks of a process that has its imports done are processes like others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamline_bench.core.machine.processes import LeashedProcess

VARIABLES = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"env": VARIABLES, "capture_output": True, "text": True, **options}
    return subprocess.run([sys.executable, "-m", *words], **given)


def test_output_exit_code_folder_and_variables_are_its_own(warm: Any, tmp_path: Path) -> None:
    before = warm.forks
    assert run("streamline_bench", "--version").stdout.startswith("streamline-bench")
    wrong = run("streamline_bench", "recipes", "--nope")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--nope" in wrong.stderr
    (tmp_path / "broken.yaml").write_text("method: nowhere\n", encoding="utf-8")
    shown = run("streamline_bench", "compress", "bundled", "--recipe", "broken.yaml", "-o", "out",
                cwd=tmp_path)  # fmt: skip
    assert shown.returncode == 2
    assert "'nowhere'" in shown.stderr
    assert warm.forks == before + 3


def test_variables_that_libraries_set_change_nothing(
    warm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp")
    monkeypatch.setenv("PYTHONBREAKPOINT", "ray.util.rpdb.set_trace")
    before = warm.forks
    assert run("streamline_bench", "--version", env=None).returncode == 0
    assert warm.forks == before + 1


def test_programs_of_tests(warm: Any, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'found'", encoding="utf-8")
    program = "import sys, __main__\nprint(sys.argv, __name__, __main__.sys is sys)\n"
    (tmp_path / "program.py").write_text(f"from beside import WORD\n{program}print(WORD)")
    words = [str(tmp_path / "program.py"), "a"]
    for given, shown in (["-c", program, "a"], ["-c", "a"]), (words, words):
        done = subprocess.run([sys.executable, *given], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[0] == f"{shown} __main__ True"
    assert done.stdout.endswith("found\n")


def test_it_has_as_many_threads_as_its_variable_says(warm: Any) -> None:
    for threads in ("1", "3"):
        program = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
        given = {**VARIABLES, "OMP_NUM_THREADS": threads}
        done = subprocess.run(program, env=given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == threads


def test_a_job_on_its_leash_is_killed_and_ended(warm: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamline_bench", "lm-eval", "ls", "tasks"]
    before = warm.forks
    with (tmp_path / "log").open("wb") as log:
        killed, asked = (LeashedProcess(command, log, environment=VARIABLES) for _ in range(2))
        assert os.getpgid(killed.pid) == killed.pid != os.getpgid(0)
        os.kill(killed.pid, signal.SIGKILL)
        until = time.monotonic() + 60
        while killed.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert killed.poll() == -signal.SIGKILL
        asked.end()
        assert asked.poll() == -signal.SIGTERM
    assert warm.forks == before + 2
    assert not psutil.pid_exists(killed.pid)


def test_lists_of_processes_show_its_command(warm: Any) -> None:
    command = [sys.executable, "-m", "streamline_bench", "lm-eval", "ls", "tasks"]
    process = subprocess.Popen(command, env=VARIABLES, stdout=subprocess.PIPE)
    line = " ".join(psutil.Process(process.pid).cmdline())
    process.kill()
    process.communicate()
    assert line.rstrip() == "python -m streamline_bench lm-eval ls tasks"


def test_what_is_read_when_libraries_are_imported_starts_python(warm: Any) -> None:
    before = warm.forks
    assert run("streamline_bench", "--version", env={**VARIABLES, "HF_HOME": "7"}).returncode == 0
    assert run("platform").returncode == 0
    assert warm.forks == before
