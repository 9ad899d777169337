"""A plan as jobs: what each makes, what it needs first, and the key that names its result.

A key covers everything that decides the result of a job, through the keys of the jobs before it;
where and with how many workers it ran does not enter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamline_bench.runs.planning.plan import (
    Evaluation,
    NoisePlan,
    Plan,
    PlanRow,
    TextPlan,
    digest,
)

__all__ = ["Job", "JobKind", "measure_job", "plan_jobs"]

JobKind = Literal["compress", "score", "text", "measure"]


@dataclass(frozen=True)
class Job:
    """One unit of work, done by a process of its own.

    Attributes:
        name: unique in the run, and the name of its folder.
        labels: rows it works for; a failure is theirs.
        key: content key of its result.
        payload: what its process needs to know (JSON).
        needs: jobs that must have succeeded.
        shareable: it may be done in one process with others, layers in common run once.
        environment: variables of its process.
    """

    name: str
    kind: JobKind
    labels: tuple[str, ...]
    key: str
    payload: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    shareable: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_jobs(plan: Plan, *, until: str = "report", trunk: bool = True) -> list[Job]:
    """Return the jobs of a plan, each after those it needs; not yet the one that measures.

    Args:
        until: ``compress`` leaves the scoring out.
        trunk: rows may be scored together.
    """
    jobs = [_compress(plan, row) for row in plan.rows if not row.dense]
    if until == "compress":
        return jobs
    compressing = {job.labels[0]: job.name for job in jobs}
    by_label = {row.label: row for row in plan.rows}
    jobs += [_score(plan, row, compressing, trunk) for row in plan.rows]
    if plan.text is not None:
        jobs += [_text(plan, plan.text, row, compressing) for row in plan.rows if not row.dense]
    jobs += [_noise(plan, noise, by_label[plan.reference]) for noise in plan.noise]
    return jobs


def measure_job(plan: Plan, labels: Collection[str], threads: int) -> Job:
    """Return the job that measures the speed of these rows, side by side in one go.

    Args:
        threads: CPU threads of each model's process, where the plan does not say.
    """
    threads = plan.threads or threads
    rows = [row for row in plan.rows if row.label in labels]
    payload = {
        "models": {row.label: None if row.dense else f"{row.label}/checkpoint" for row in rows},
        "pretrained": plan.model,
        "revision": plan.revision,
        "dense": plan.reference,
        "engine": plan.throughput,
        "workload": plan.workload,
        "device": plan.device,
        "dtype": plan.evaluation.dtype,
        "threads": threads,
        "trust_remote_code": plan.trust_remote_code,
        "output": "throughput",
    }
    keys = [plan.weights_sha256, [[row.label, row.key] for row in rows]]
    asked = [plan.throughput, plan.workload, plan.device, plan.evaluation.dtype, plan.versions]
    key = digest(["measure", keys, asked, threads])
    environment = {**_environment(plan), "OMP_NUM_THREADS": str(threads)}
    return Job("throughput", "measure", (), key, payload, environment=environment)


def _compress(plan: Plan, row: PlanRow) -> Job:
    payload = {
        "pretrained": plan.model,
        "revision": plan.revision,
        "weights_sha256": plan.weights_sha256,
        "recipe": row.recipe,
        "output": f"{row.label}/checkpoint",
        "device": plan.device,
        "dtype": plan.dtype,
        "trust_remote_code": plan.trust_remote_code,
    }
    key = digest(["compress", row.key, plan.versions])
    name = f"compress-{row.label}"
    return Job(name, "compress", (row.label,), key, payload, environment=_environment(plan))


def _score(plan: Plan, row: PlanRow, compressing: Mapping[str, str], trunk: bool) -> Job:
    return Job(
        name=f"score-{row.label}",
        kind="score",
        labels=(row.label,),
        key=_score_key(plan, row, plan.evaluation),
        payload=_score_payload(plan, row, plan.evaluation, f"{row.label}/eval"),
        needs=tuple(compressing[label] for label in (row.label,) if label in compressing),
        shareable=trunk,
        environment=_environment(plan),
    )


def _text(plan: Plan, text: TextPlan, row: PlanRow, compressing: Mapping[str, str]) -> Job:
    payload = {
        "pretrained": plan.model,
        "revision": plan.revision,
        "checkpoint": f"{row.label}/checkpoint",
        "text": text.model_dump(mode="json"),
        "device": plan.device,
        "dtype": plan.evaluation.dtype or "float32",
        "trust_remote_code": plan.trust_remote_code,
        "output": f"{row.label}/divergence.json",
    }
    asked = [text.model_dump(mode="json", exclude={"file"}), payload["dtype"]]
    where = [plan.device.split(":")[0], plan.versions]
    return Job(
        name=f"text-{row.label}",
        kind="text",
        labels=(row.label,),
        key=digest(["text", plan.weights_sha256, row.key, asked, where]),
        payload=payload,
        needs=(compressing[row.label],),
        environment=_environment(plan),
    )


def _noise(plan: Plan, noise: NoisePlan, row: PlanRow) -> Job:
    evaluation = plan.evaluation.model_copy(
        update={"batch_size": noise.batch_size, "dtype": noise.dtype}
    )
    payload = _score_payload(plan, row, evaluation, f"noise/{noise.name}/eval")
    return Job(
        name=f"noise-{noise.name}",
        kind="score",
        labels=(),
        key=digest([_score_key(plan, row, evaluation), *([noise.engine] if noise.engine else [])]),
        payload={**payload, "engine": noise.engine},
        environment=_environment(plan),
    )


def _score_key(plan: Plan, row: PlanRow, evaluation: Evaluation) -> str:
    # Where the task folder lies changes nothing; its files' hash is part of the evaluation.
    asked = evaluation.model_dump(mode="json", exclude={"include_path"})
    model = [plan.weights_sha256] if row.dense else [row.key]
    return digest(["score", model, asked, plan.device.split(":")[0], plan.versions])


def _score_payload(plan: Plan, row: PlanRow, evaluation: Evaluation, output: str) -> dict[str, Any]:
    return {
        "pretrained": plan.model if row.dense else None,
        "checkpoint": None if row.dense else f"{row.label}/checkpoint",
        "revision": plan.revision if row.dense else None,
        "evaluation": evaluation.model_dump(mode="json"),
        "device": plan.device,
        "trust_remote_code": plan.trust_remote_code,
        "output": output,
    }


def _environment(plan: Plan) -> dict[str, str]:
    threads = {} if plan.threads is None else {"OMP_NUM_THREADS": str(plan.threads)}
    return {**threads, **plan.environment}
