"""Jobs of several processes give what one process gives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from streamline_bench.core.machine import environment
from streamline_bench.core.machine.ranks import run_in_ranks
from streamline_bench.core.training.block import Teacher
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job
from streamline_bench.runs.jobs.kinds import CompressJob
from streamline_bench.runs.jobs.planned import plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.checks import memory_per_job
from streamline_bench.runs.planning.request import Request, RowRequest
from streamline_bench.runs.planning.resolve import resolve_plan
from streamline_bench.runs.run import shared_out

BRIEF = {
    "training.min_steps": 3, "training.batch_size": 4, "training.data.samples": 12,
    "training.data.sequence_length": 32, "calibration.sequence_length": 32,
}  # fmt: skip


@pytest.fixture
def jobs(make: Callable[..., Request], tasks: Path, text_file: Path) -> dict[str, Job]:
    row = RowRequest(recipe="streamline", set={"calibration": str(text_file), **BRIEF})
    request = make(recipes=[row], tasks=["words"], include_path=[str(tasks)])
    return {job.kind: job for job in plan_jobs(resolve_plan(request))}


def test_rows_that_train_on_the_same_states_run_the_model_for_them_once(
    make: Callable[..., Request], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path / "cache"))
    changes = {"calibration": str(text_file), **BRIEF}
    objective = {"training.objective": "relative_mse"}
    rows = [
        RowRequest(recipe="streamline", set=changes),
        RowRequest(recipe="streamline", label="relative", set={**changes, **objective}),
        RowRequest(recipe="streamline", label="seed", set={**changes, "seed": 1}),
        RowRequest(recipe="streamline_lm", set=changes),
    ]
    jobs = plan_jobs(resolve_plan(make(recipes=rows)), until="compress")
    names = {job.label: job.states for job in jobs if isinstance(job, CompressJob)}
    assert names == {
        "streamline": (shared := names["streamline"]),
        "relative": shared,
        "seed": None,
        "streamline_lm": None,
    }
    assert shared is not None
    passes: list[int] = []
    states = Teacher.states

    def counted(self: Teacher, batch: Any) -> Any:
        passes.append(len(batch.rows))
        return states(self, batch)

    monkeypatch.setattr(Teacher, "states", counted)
    run, done = RunPaths(tmp_path / "run"), []
    for job in jobs[:2]:
        job.write(run)
        job.work(run)
        done.append(sum(passes))
    assert done == [12, 12]  # each of the sequences once, for both
    assert len(list((run.states / shared).glob("*.bin"))) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_training_in_two_processes(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    weights = []
    for processes in (1, 2):
        monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path / f"cache-{processes}"))
        run = RunPaths(tmp_path / f"run-{processes}")
        job = jobs["compress"].model_copy(update={"processes": processes})
        job.write(run)
        job.work(run)
        weights.append(load_file(run.checkpoint("streamline") / "model.safetensors"))
    assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]) < 1e-6


@pytest.mark.parametrize(
    ("changes", "arguments", "ranks"),
    [
        ({}, "dtype=float32", 4),
        ({"model_args": {"parallelize": True}}, "parallelize=True", 1),
        ({"engine": "vllm"}, "tensor_parallel_size=4", 1),
        ({"engine": "vllm", "model_args": {"data_parallel_size": 4}}, "data_parallel_size=4", 1),
    ],
)
def test_how_a_score_job_uses_four_gpus(
    changes: dict[str, Any], arguments: str, ranks: int, jobs: dict[str, Job], tmp_path: Path
) -> None:
    job = shared_out(jobs["score"], Execution(executor="ray", gpus_per_job=4))
    assert isinstance(job, ScoreJob) and not job.shareable
    asked = job.evaluation.model_copy(update={"dtype": "float32", **changes})
    job = job.model_copy(update={"evaluation": asked})
    command = job.harness_command(RunPaths(tmp_path), tmp_path)
    (given,) = [word for word in command if word.startswith("pretrained=")]
    assert arguments in given.split(",") and job.ranks == ranks
    assert ("tensor_parallel_size" in given) == ("tensor" in arguments)


def test_a_compression_has_its_share_of_the_memory(
    jobs: dict[str, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "free_memory", lambda device: 1000)
    shares = [memory_per_job(Execution(workers=workers)) for workers in (None, 1, 4)]
    assert shares == [None, None, 250]
    assert memory_per_job(Execution(executor="slurm", workers=4)) is None
    job = shared_out(jobs["compress"], Execution(placement="streamed"), 250)
    assert isinstance(job, CompressJob)
    assert (job.memory, job.placement) == (250, "streamed")


def test_one_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "assert (os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK']) == ('2', os.environ['RANK'])\n"
        "sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(600)"
    )
    assert run_in_ranks([sys.executable, "-c", program], 2) == 7
