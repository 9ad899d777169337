"""The handle of a model's process."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from streamline_bench.throughput.process import ModelProcess, WorkerError

JOB = f"{__name__}:Job"


class Job:
    """Serves the test below."""

    def answer(self, number: int) -> int:
        if number < 0:
            raise ValueError("no such number")
        return number + 1


def test_a_process_that_has_ended_is_not_signalled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    process = ModelProcess(JOB, {}, tmp_path / "log.txt")
    assert process.ask("answer", "asking", 60, number=4) == 5
    assert process.ask("answer", "as long as it takes", 1e12, number=5) == 6
    with pytest.raises(WorkerError, match="no such number"):
        process.ask("answer", "asking", 60, number=-1)
    assert not psutil.pid_exists(process.pid)

    def refuse(*_: object) -> None:
        raise AssertionError("the id may be another process's by now")

    monkeypatch.setattr(os, "killpg", refuse)
    monkeypatch.setattr(psutil, "Process", refuse)
    process.hang_up()
    process.close()
    process.close(at_once=True)
