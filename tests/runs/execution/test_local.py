"""Processes of jobs: their GPUs, their time limit, and that none outlives its starter."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from run_jobs import compress_job, score_job

from streamline_bench.errors import OutputError, RecipeError
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.execution.processes import Ended, JobProcess, LocalExecutor
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job
from streamline_bench.runs.jobs.score import score_together_job

# Stands for a job: it holds the leash, starts a child as the harness would be, and waits.
SLEEPER = """
import subprocess, sys, time
from pathlib import Path
from streamline_bench.core.machine.processes import hold_leash
hold_leash()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1], "child").write_text(f"{child.pid}.")
time.sleep(600)
"""

STARTER = """
import sys, time
from pathlib import Path
from streamline_bench.runs.execution.processes import JobProcess
from streamline_bench.runs.folder import RunPaths
process = JobProcess(RunPaths(Path(sys.argv[1])), "j", {}, command=("-c", sys.argv[2]))
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with room for the job 'j'."""
    RunPaths(tmp_path).make_job("j")
    return tmp_path


def _wait_for(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _child(run: Path) -> int:
    told = run / "child"
    assert _wait_for(lambda: told.exists() and told.read_text().endswith("."))
    return int(told.read_text()[:-1])


def test_a_killed_starter_takes_the_job_and_its_children_along(run: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(run), SLEEPER])
    child = _child(run)
    job = psutil.Process(child).ppid()
    assert job != starter.pid
    starter.kill()
    starter.wait()
    assert _wait_for(lambda: _is_gone(job) and _is_gone(child))


def test_ending_a_job_ends_its_children(run: Path) -> None:
    process = JobProcess(RunPaths(run), "j", {}, command=("-c", SLEEPER))
    child = _child(run)
    assert process.poll() is None
    process.end()
    assert process.poll() == -signal.SIGTERM
    assert _wait_for(lambda: _is_gone(child))


def test_a_killed_job_leaves_no_child_behind(run: Path) -> None:
    process = JobProcess(RunPaths(run), "j", {}, command=("-c", SLEEPER))
    child = _child(run)
    os.kill(process.pid, signal.SIGKILL)
    assert _wait_for(lambda: process.poll() is not None)
    assert process.poll() == -signal.SIGKILL
    assert _wait_for(lambda: _is_gone(child))


def test_a_job_that_ignores_the_request_to_end_is_killed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamline_bench.core.machine.processes.GRACE", 0.2)
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER
    process = JobProcess(RunPaths(run), "j", {}, command=("-c", deaf))
    _child(run)
    process.end()
    assert process.poll() == -signal.SIGKILL


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"log\.txt cannot be written"):
        JobProcess(RunPaths(tmp_path), "no-such-job", {})


class Recorded:
    """Stands for a job's process: ends when told, or never."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self, run: RunPaths, name: str, environment: Mapping[str, str]) -> None:
        self.name, self.environment = name, dict(environment)
        self.code: int | None = None
        self.seconds = 0.0
        self.was_ended = False
        self.made.append(self)

    def poll(self) -> int | None:
        return self.code

    def end(self) -> None:
        self.was_ended = True


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Job processes are only recorded; the list of them."""
    monkeypatch.setattr("streamline_bench.runs.execution.processes.JobProcess", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def _job(label: str, **environment: str) -> Job:
    return compress_job(label, environment=environment)


def test_gpus_are_shared_out_and_given_back(processes: list[Recorded], tmp_path: Path) -> None:
    executor = LocalExecutor(Execution(gpus=("4", "GPU-6f3a")))
    for name in "ab":
        assert executor.has_room("compress")
        executor.submit(RunPaths(tmp_path), _job(name))
    assert not executor.has_room("compress")
    visible = [process.environment["CUDA_VISIBLE_DEVICES"] for process in Recorded.made]
    assert visible == ["4", "GPU-6f3a"]
    Recorded.made[1].code = 0
    assert executor.ended(0) == [Ended("compress-b", 0)]
    executor.submit(RunPaths(tmp_path), _job("c"))
    assert Recorded.made[2].environment["CUDA_VISIBLE_DEVICES"] == "GPU-6f3a"


def test_jobs_of_several_gpus_wait_until_so_many_are_free(
    processes: list[Recorded], tmp_path: Path
) -> None:
    executor = LocalExecutor(Execution(gpus=tuple("0123"), gpus_by_kind={"compress": 3}))
    executor.submit(RunPaths(tmp_path), _job("a"))
    assert Recorded.made[0].environment["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert not executor.has_room("compress") and executor.has_room("score")
    Recorded.made[0].code = 0
    assert executor.ended(0) and executor.has_room("compress")


TELLER = """
import os, sys
from pathlib import Path
from streamline_bench.core.machine.processes import hold_leash
hold_leash()
Path(sys.argv[1], sys.argv[2]).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))
"""


@pytest.mark.parametrize(
    ("execution", "seen"),
    [
        (Execution(gpus=("1", "0")), {"a": "1", "b": "0"}),
        (Execution(gpus=("3",)), {"a": "3", "b": "3"}),
        (Execution(gpus_per_job=0, workers=2), {"a": "", "b": ""}),
        (Execution(workers=2), {"a": "7", "b": "7"}),  # as it was outside
    ],
)
def test_what_a_real_process_sees(
    execution: Execution, seen: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    process = functools.partial(JobProcess, command=("-c", TELLER))
    monkeypatch.setattr("streamline_bench.runs.execution.processes.JobProcess", process)
    executor = LocalExecutor(execution)
    waiting, ended = list("ab"), 0
    while ended < 2:
        while waiting and executor.has_room("compress"):
            name = waiting.pop(0)
            RunPaths(tmp_path).make_job(f"compress-{name}")
            executor.submit(RunPaths(tmp_path), _job(name))
        ended += len(executor.ended(60))
    assert {name: (tmp_path / f"compress-{name}").read_text() for name in "ab"} == seen


def test_without_gpus_the_environment_is_left_as_it_is(
    processes: list[Recorded], tmp_path: Path
) -> None:
    LocalExecutor(Execution()).submit(RunPaths(tmp_path), _job("a"))
    assert "CUDA_VISIBLE_DEVICES" not in Recorded.made[0].environment


def test_threads_come_from_the_plan_else_the_environment_else_the_cores(
    processes: list[Recorded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads(job: Job, workers: int) -> str:
        LocalExecutor(Execution(workers=workers)).submit(RunPaths(tmp_path), job)
        return Recorded.made[-1].environment["OMP_NUM_THREADS"]

    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads(_job("a"), 3) == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(_job("a"), 3) == "5"
    assert threads(_job("a", OMP_NUM_THREADS="7"), 3) == "7"


def test_a_time_limit_counts_for_each_job_of_a_process(
    processes: list[Recorded], tmp_path: Path
) -> None:
    executor = LocalExecutor(Execution(timeout=10))
    executor.submit(RunPaths(tmp_path), score_together_job([score_job("dense"), score_job("a")]))
    Recorded.made[0].seconds = 19.0
    assert executor.ended(0) == []
    Recorded.made[0].seconds = 20.0
    (ended,) = executor.ended(0)
    assert Recorded.made[0].was_ended
    assert not ended.lost
    assert ended.reason == "It ran longer than 20 s (--timeout)."


def test_stopping_ends_every_process(processes: list[Recorded], tmp_path: Path) -> None:
    executor = LocalExecutor(Execution(workers=2))
    for name in "ab":
        executor.submit(RunPaths(tmp_path), _job(name))
    executor.stop()
    assert [process.was_ended for process in Recorded.made] == [True, True]
    assert executor.has_room("compress")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"executor": "pbs"}, "Unknown executor 'pbs'; known: local, ray, slurm"),
        ({"gpus_per_job": 1}, "--gpus-per-job is 1 for compress jobs and --gpus names 0"),
        ({"gpus": ("0", "1"), "gpus_by_kind": {"score": 4}}, "is 4 for score jobs and .* names 2"),
        ({"gpus": ("0",), "gpus_by_kind": {"noise": 1}}, "'noise'; known: compress, "),
        ({"executor": "ray", "gpus_by_kind": {"score": 1}}, "score jobs 1 GPUs and compress jobs "),
        ({"gpus": ("0", "1"), "gpus_by_kind": {"text": 2}}, "give text=1"),
        ({"gpus": ("0",), "gpus_per_job": 0, "workers": 2}, "--gpus-per-job 0"),
        ({"gpus": ("0", "1", "0")}, "names GPU 0 twice"),
    ],
)
def test_executions_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Execution(**options)


@pytest.mark.parametrize(
    ("execution", "device", "sentence"),
    [
        (Execution(gpus=("0", "1")), "cuda:1", "give --device cuda"),
        (Execution(gpus=("0",)), "cpu", "--device is cpu"),
        (Execution(workers=4), "cuda", "4 jobs at a time would share one GPU"),
        (Execution(gpus_per_job=0), "cuda", "jobs get no GPU"),
        (Execution(executor="ray"), "cuda", "give --gpus-per-job 1"),
    ],
)
def test_devices_that_jobs_could_not_have(execution: Execution, device: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        execution.check_device(device)


@pytest.mark.parametrize(
    ("execution", "device"),
    [
        (Execution(gpus=("0", "1")), "cuda"),
        (Execution(), "cuda"),
        (Execution(), "cuda:1"),
        (Execution(workers=4), "cpu"),
        (Execution(workers=4), "cuda:0"),
        (Execution(executor="ray"), "cpu"),
        (Execution(executor="ray", gpus_per_job=1), "cuda"),
    ],
)
def test_devices_that_jobs_have(
    monkeypatch: pytest.MonkeyPatch, execution: Execution, device: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    execution.check_device(device)
    with pytest.raises(RecipeError, match="cud"):  # so it did look
        execution.check_device("cud")


@pytest.mark.parametrize(
    ("execution", "device", "sentence"),
    [
        (Execution(), "cuda:9", "--device is cuda:9 and this process sees 2 cuda devices"),
        (Execution(), "cud", "'cud' is not a device"),
        (Execution(), "meta", "'meta' is not a device"),
        (Execution(executor="ray"), "cud", "'cud' is not a device"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, execution: Execution, device: str, sentence: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(RecipeError, match=sentence):
        execution.check_device(device)


def test_gpus_of_a_machine_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(RecipeError, match=r"^--gpus names 0, and .* sees no cuda device;"):
        Execution(gpus=("0",)).check_device("cuda")


@pytest.mark.parametrize(
    ("execution", "gpus", "slots", "device"),
    [
        (Execution(), 0, 1, None),
        (Execution(workers=4), 0, 4, None),
        (Execution(gpus=("0", "1", "2")), 1, 3, "cuda"),
        (Execution(gpus=("0", "1", "2"), workers=2), 1, 2, "cuda"),
        (Execution(gpus=("0",), workers=2), 1, 1, "cuda"),
        (Execution(gpus=tuple("0123"), gpus_by_kind={"compress": 4}), 1, 4, "cuda"),
        (Execution(executor="slurm", gpus_per_job=2), 2, 1, "cuda"),
        (Execution(gpus_per_job=0), 0, 1, "cpu"),
        (Execution(executor="ray"), 0, 1, "cpu"),
        (Execution(executor="ray", gpus_per_job=1), 1, 1, "cuda"),
    ],
)
def test_slots_gpus_and_device_of_a_job(
    execution: Execution, gpus: int, slots: int, device: str | None
) -> None:
    assert (execution.gpus_of("score"), execution.job_slots) == (gpus, slots)
    assert execution.device == device


def test_a_job_beside_which_none_runs_has_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Execution(workers=4).threads_alone == 12
    assert Execution(executor="ray", cpus_per_job=3).threads_alone == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Execution(workers=4).threads_alone == 5
