"""A plan as jobs, each with the key that names its result."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from streamline_bench.runs.jobs.job import Job
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob, TextJob
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import (
    Evaluation,
    NoisePlan,
    Plan,
    PlanRow,
    TextPlan,
    digest,
)


def plan_jobs(plan: Plan, *, until: str = "report", trunk: bool = True) -> list[Job]:
    """Return the jobs of a plan, each after those it needs; not yet the one that measures.

    Args:
        until: ``compress`` leaves the scoring out.
        trunk: rows may be scored together.
    """
    compressed = [row for row in plan.rows if not row.dense]
    jobs: list[Job] = [_compress(plan, row) for row in compressed]
    if until == "compress":
        return jobs
    jobs += [_score(plan, row, plan.evaluation, shareable=trunk) for row in plan.rows]
    if plan.text is not None:
        jobs += [_text(plan, plan.text, row) for row in compressed]
    dense = next(row for row in plan.rows if row.label == plan.reference)
    jobs += [_noise(plan, noise, dense) for noise in plan.noise]
    return jobs


def measure_job(plan: Plan, labels: Collection[str], threads: int) -> MeasureJob:
    """Return the job that measures the speed of these rows, side by side in one go.

    Args:
        threads: CPU threads of each model's process, where the plan does not say.
    """
    threads = plan.threads or threads
    rows = [row for row in plan.rows if row.label in labels]
    keys = [plan.weights_sha256, [[row.label, row.key] for row in rows]]
    asked = [plan.throughput, plan.workload, plan.device, plan.evaluation.dtype, plan.versions]
    common = _common(plan)
    common["environment"] |= {"OMP_NUM_THREADS": str(threads)}
    return MeasureJob(
        **common,
        key=digest(["measure", keys, asked, threads]),
        rows={row.label: not row.dense for row in rows},
        dense=plan.reference,
        engine="vllm" if plan.throughput == "vllm" else "hf",
        workload=plan.workload,
        dtype=plan.evaluation.dtype,
        threads=threads,
    )


def _common(plan: Plan) -> dict[str, Any]:
    threads = {} if plan.threads is None else {"OMP_NUM_THREADS": str(plan.threads)}
    return {
        "model": plan.model,
        "revision": plan.revision,
        "device": plan.device,
        "trust_remote_code": plan.trust_remote_code,
        "environment": {**threads, **plan.environment},
    }


def _compress(plan: Plan, row: PlanRow) -> CompressJob:
    return CompressJob(
        **_common(plan),
        key=digest(["compress", row.key, plan.versions]),
        label=row.label,
        weights_sha256=plan.weights_sha256,
        recipe=row.recipe,
        dtype=plan.dtype,
    )


def _score(plan: Plan, row: PlanRow, evaluation: Evaluation, **more: Any) -> ScoreJob:
    # Where the task folder lies changes nothing; its files' hash is part of the evaluation.
    asked = evaluation.model_dump(mode="json", exclude={"include_path"})
    model = [plan.weights_sha256] if row.dense else [row.key]
    return ScoreJob(
        **_common(plan),
        key=digest(["score", model, asked, plan.device.split(":")[0], plan.versions]),
        label=row.label,
        dense=row.dense,
        evaluation=evaluation,
        **more,
    )


def _noise(plan: Plan, noise: NoisePlan, row: PlanRow) -> ScoreJob:
    changed = {"batch_size": noise.batch_size, "dtype": noise.dtype}
    evaluation = plan.evaluation.model_copy(update=changed)
    job = _score(plan, row, evaluation, noise=noise.name, engine=noise.engine)
    engine = [noise.engine] if noise.engine else []
    return job.model_copy(update={"key": digest([job.key, *engine])})


def _text(plan: Plan, text: TextPlan, row: PlanRow) -> TextJob:
    dtype = plan.evaluation.dtype or "float32"
    asked = [text.model_dump(mode="json", exclude={"file"}), dtype]
    where = [plan.device.split(":")[0], plan.versions]
    return TextJob(
        **_common(plan),
        key=digest(["text", plan.weights_sha256, row.key, asked, where]),
        label=row.label,
        text=text,
        dtype=dtype,
    )
