"""Slurm's queue, stood in for by submitit's own executor of local processes."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.errors import ClusterError
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.execution.slurm_executor import SlurmExecutor
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.run import compare_request

pytest.importorskip("submitit", reason="submitit is not installed (streamline-bench[slurm])")


def test_a_machine_without_slurm_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ClusterError, match="no Slurm here"):
        SlurmExecutor(Execution(executor="slurm"))


def test_jobs_at_once_are_those_that_may_be_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlurmExecutor, "cluster", "local")
    found = [
        SlurmExecutor(Execution(executor="slurm", workers=workers)).at_once("score")
        for workers in (None, 8)
    ]
    assert found == [1, 8]


@pytest.mark.slow
def test_a_job_that_slurm_killed_is_submitted_again(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlurmExecutor, "cluster", "local")
    run = tmp_path / "run"
    killed: list[int] = []

    def kill_the_first() -> None:
        while not killed:
            time.sleep(0.05)
            for path in run.glob("jobs/compress-last_layers/slurm/*_submitted.pkl"):
                number = int(path.name.partition("_")[0])  # a local job's id is its process
                os.kill(number, signal.SIGKILL)
                killed.append(number)

    thread = threading.Thread(target=kill_the_first)
    thread.start()
    result = compare_request(
        make(recipes=["last_layers"]),
        run,
        execution=Execution(executor="slurm", workers=1, timeout=300),
        until="compress",
        progress=False,
    )
    thread.join()
    assert result.exit_code == 0, result
    assert result.jobs["compress-last_layers"] == "done"
    submitted = list(run.glob("jobs/compress-last_layers/slurm/*_submitted.pkl"))
    assert len(submitted) == 2
    assert (run / "last_layers" / "checkpoint" / "streamline.json").is_file()
