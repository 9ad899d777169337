"""Jobs of a comparison with as little in them as tests of the machinery need."""

from __future__ import annotations

from typing import Any

from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import Evaluation

MODEL: dict[str, Any] = {"model": "m", "device": "cpu"}


def compress_job(label: str, **more: Any) -> CompressJob:
    """Return the job ``compress-<label>`` with the key ``c<label>``."""
    given = {"key": f"c{label}", **MODEL, **more}
    return CompressJob(label=label, weights_sha256="w", recipe={}, **given)


def score_job(label: str, **more: Any) -> ScoreJob:
    """Return the job ``score-<label>`` with the key ``s<label>``."""
    evaluation = Evaluation(tasks=("t",), tasks_sha256="", batch_size="1")
    given = {"key": f"s{label}", "dense": label == "dense", **MODEL, **more}
    return ScoreJob(label=label, evaluation=evaluation, **given)


def measure_job() -> MeasureJob:
    """Return the job ``throughput``."""
    rows = {"dense": False}
    return MeasureJob(
        key="k", rows=rows, dense="dense", engine="hf", workload={}, threads=1, **MODEL
    )
