"""From a plan to its jobs: of what was asked, everything that has no answer in the run folder."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from streamline_bench.core.recipe.schema import parse_recipe
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job, done_key
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob, TextJob
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import Evaluation, NoisePlan, Plan, PlanRow, digest

Maker = Callable[[Evaluation], ScoreJob]
"""Makes the job that asks a row, or the noise floor, a set of questions."""


def plan_jobs(
    plan: Plan, run: RunPaths | None = None, *, until: str = "report", trunk: bool = True
) -> list[Job]:
    """Return the jobs of a plan, each after those it needs; not yet those that measure.

    Args:
        run: whose answers count; None: there are none.
        until: ``compress`` leaves the scoring out.
        trunk: rows may be scored together.
    """
    jobs: list[Job] = [*_compressing(plan)]
    if until == "compress":
        return jobs
    for row in plan.rows:
        jobs += _questions(plan, run, _scoring(plan, row, shareable=trunk))
    if plan.text is not None:
        rows = [row for row in plan.rows if not row.dense and same_tokens(plan, row)]
        jobs += [_text(plan, row, shareable=trunk) for row in rows]
    for noise in plan.noise:
        again = _questions(plan, run, _repeating(plan, noise))
        jobs += [job for job in again if noise.only_engine in (None, job.evaluation.engine)]
    return jobs


def same_tokens(plan: Plan, row: PlanRow) -> bool:
    """Whether a row and the row it is compared with make the same tokens of a text."""
    own, other = (_tokenizer(plan, each) for each in (row, plan.reference_of(row)))
    return own == other or not (own and other)


def _tokenizer(plan: Plan, row: PlanRow) -> str:
    return row.model.tokenizer_sha256 if row.model else plan.tokenizer_sha256


def _questions(plan: Plan, run: RunPaths | None, make: Maker) -> list[ScoreJob]:
    """Return the jobs that have answers, and those that ask what is left.

    What is left is asked in the sets in which other rows were asked, so that rows can share
    layers.
    """
    found = []
    for wanted in plan.evaluations:
        left = set(wanted.tasks)
        for evaluation in _answered(plan, wanted, run, make):
            if left & set(evaluation.tasks):
                unread = tuple(task for task in evaluation.tasks if task not in left)
                found.append(make(evaluation).model_copy(update={"unread": unread}))
                left -= set(evaluation.tasks)
        for asked in plan.questions:
            part = [task for task in asked.tasks if task in left]
            if part and asked.settings == wanted.settings:
                found.append(make(asked.only(part)))
                left -= set(part)
    return found


def _answered(
    plan: Plan, wanted: Evaluation, run: RunPaths | None, make: Maker
) -> Iterator[Evaluation]:
    """The sets of questions to which there are answers under these settings."""
    if run is None:
        return
    name = make(plan.questions[0].only(plan.questions[0].tasks)).name
    for path in sorted(run.root.glob(f"jobs/{glob.escape(name)}*/job.json")):
        asked = _read(path).get("evaluation")
        if not isinstance(asked, dict) or not isinstance(asked.get("tasks"), list):
            continue
        evaluation = wanted.model_copy(
            update={"tasks": tuple(asked["tasks"]), "tasks_sha256": asked.get("tasks_sha256")}
        )
        job = make(evaluation)
        if job.name == path.parent.name and done_key(run, job.name) == job.key:
            yield evaluation


def _read(path: Path) -> dict[str, Any]:
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return payload if isinstance(payload, dict) else {}


def _question(plan: Plan, evaluation: Evaluation) -> str:
    """Name a set of questions; the first of a run folder has none."""
    asked, first = (each.decisive for each in (evaluation, plan.questions[0]))
    return "" if asked == first else digest(asked)[:8]


def _of_row(plan: Plan, row: PlanRow) -> dict[str, Any]:
    source = plan.source(row)
    return {
        **_common(plan),
        "model": source.name,
        "revision": source.revision,
        "trust_remote_code": source.trust_remote_code,
        "label": row.label,
        "row_folder": row.folder,
    }


def _common(plan: Plan) -> dict[str, Any]:
    threads = {} if plan.threads is None else {"OMP_NUM_THREADS": str(plan.threads)}
    return {"device": plan.device, "environment": {**threads, **plan.environment}}


def _compressing(plan: Plan) -> list[CompressJob]:
    """Return the jobs that compress; those that may train on the same hidden states name them."""
    jobs = [_compress(plan, row) for row in plan.rows if row.made_here]
    names = [_trained_on(job) for job in jobs]
    shared = {name for name, count in Counter(names).items() if name is not None and count > 1}
    return [
        job.model_copy(update={"states": name}) if name in shared else job
        for job, name in zip(jobs, names, strict=True)
    ]


def _trained_on(job: CompressJob) -> str | None:
    """Name what decides, beside the block that is found, the hidden states of a training."""
    recipe = parse_recipe(job.recipe, "The row's recipe")
    training = recipe.training
    if not recipe.trains_replacement or training.objective in ("lm", "kd"):
        return None
    chosen = recipe.calibration.model_dump(mode="json"), recipe.parameters
    text = training.data.model_dump(mode="json"), training.validation_share, recipe.seed
    size = recipe.sparsity, recipe.n_layers
    source = job.weights_sha256, job.dtype, job.device.partition(":")[0]
    return digest([source, recipe.method, chosen, size, text])[:16]


def _compress(plan: Plan, row: PlanRow) -> CompressJob:
    return CompressJob(
        **_of_row(plan, row),
        key=digest(["compress", row.key, plan.versions]),
        weights_sha256=plan.source(row).weights_sha256,
        recipe=row.recipe,
        dtype=plan.dtype,
    )


def _scoring(plan: Plan, row: PlanRow, *, shareable: bool) -> Maker:
    source = plan.source(row)
    own = source if row.checkpoint else None

    def make(evaluation: Evaluation) -> ScoreJob:
        question = _question(plan, evaluation)
        where: dict[str, Any] = {"include_path": plan.evaluation.include_path}
        if own is not None and own.dtype:
            where["dtype"] = own.dtype
        evaluation = evaluation.model_copy(update=where)
        return ScoreJob(
            **_of_row(plan, row),
            key=_score_key(plan, row, evaluation),
            dense=not row.made_here,
            evaluation=evaluation,
            question=question,
            tokenizer=own.tokenizer if own else None,
            model_args=own.model_args if own else {},
            weights=source.weights_sha256 + _tokenizer(plan, row) if not row.made_here else None,
            shareable=shareable and evaluation.shareable and (own is None or own.loaded_plainly),
        )

    return make


def _score_key(plan: Plan, row: PlanRow, evaluation: Evaluation) -> str:
    model = [plan.source(row).weights_sha256] if row.dense else [row.key]
    asked = evaluation.decisive
    return digest(["score", model, asked, plan.device.split(":")[0], plan.versions])


_OF_BOTH_ENGINES = frozenset(
    "add_bos_token chat_template_args enable_thinking max_length prefix_token_id "
    "think_end_token".split()
)
"""Arguments of the harness's models that both engines know."""


def _repeating(plan: Plan, noise: NoisePlan) -> Maker:
    row = next(row for row in plan.rows if row.label == plan.reference)
    score = _scoring(plan, row, shareable=False)
    usual = {"batch_size": plan.evaluation.batch_size, "dtype": plan.evaluation.dtype}
    changed = {key: now for key, old in usual.items() if (now := getattr(noise, key)) != old}
    engine = [noise.engine] if noise.engine else []

    def make(evaluation: Evaluation) -> ScoreJob:
        job = score(evaluation)
        asked = job.evaluation.model_copy(update=changed)
        if noise.engine not in (None, asked.engine):
            shared = {k: v for k, v in asked.model_args.items() if k in _OF_BOTH_ENGINES}
            asked = asked.model_copy(update={"model_args": shared})
        update = {
            "key": digest([_score_key(plan, row, asked), *engine]),
            "evaluation": asked,
            "noise": noise.name,
            "engine": noise.engine,
        }
        return job.model_copy(update=update)

    return make


def _text(plan: Plan, row: PlanRow, *, shareable: bool) -> TextJob:
    text, dtype = plan.text, plan.evaluation.dtype or "float32"
    assert text is not None
    asked = [text.model_dump(mode="json", exclude={"file"}), dtype]
    where = [plan.device.split(":")[0], plan.versions]
    dense = plan.source(plan.reference_of(row))
    return TextJob(
        **{
            **_of_row(plan, row),
            "model": dense.name,
            "revision": dense.revision,
            "trust_remote_code": dense.trust_remote_code,
        },
        key=digest(["text", dense.weights_sha256, row.key, asked, where]),
        text=text,
        dtype=dtype,
        other=row.model if row.checkpoint else None,
        shareable=shareable,
    )


def measure_jobs(
    plan: Plan, labels: Collection[str], threads: int, run: RunPaths | None = None
) -> list[MeasureJob]:
    """Return the jobs that measure these rows' speed, each beside the dense row it is compared
    with, and those that did so before; the plan's threads count first.
    """
    threads = plan.threads or threads
    jobs: list[MeasureJob] = []
    for dense in (row for row in plan.rows if row.dense and row.label in labels):
        rows = [
            row
            for row in plan.rows
            if row.label in labels and plan.reference_of(row).label == dense.label
        ]
        before = list(_measured(plan, dense, threads, run))
        known = {key for job in before for key in job.keys.values()}
        jobs += before
        new = [row for row in rows if row.key not in known and row is not dense]
        if new or dense.key not in known:
            jobs.append(_measure(plan, dense, [dense, *new], threads, jobs, run))
    return jobs


def _measure(
    plan: Plan,
    dense: PlanRow,
    rows: Sequence[PlanRow],
    threads: int,
    others: Sequence[MeasureJob],
    run: RunPaths | None,
) -> MeasureJob:
    among = [row for row in plan.rows if row in rows]
    key = _measure_key(plan, dense, [[row.label, row.key] for row in among], threads)
    first = done_key(run, "throughput") if run is not None else None
    plain = first in (None, key) and not any(not job.question for job in others)
    common = _of_row(plan, dense)
    common["environment"] = common["environment"] | {"OMP_NUM_THREADS": str(threads)}
    return MeasureJob(
        **{**common, "label": None, "row_folder": None},
        key=key,
        rows={row.label: row.made_here for row in among},
        places={row.label: row.place for row in among if row.place != row.label},
        models={r.label: r.model for r in among if r.checkpoint and r.model is not None},
        keys={row.label: row.key for row in among},
        question="" if plain else key[:8],
        dense=dense.label,
        engine="hf" if plan.throughput == "hf" else "vllm",
        workload=plan.workload,
        load=plan.load,
        dtype=plan.evaluation.dtype,
        threads=threads,
    )


def _measure_key(plan: Plan, dense: PlanRow, pairs: list[list[str]], threads: int) -> str:
    keys = [plan.source(dense).weights_sha256, pairs]
    asked = [plan.throughput, plan.workload, plan.device, plan.evaluation.dtype, plan.versions]
    served = [plan.load, plan.prompts_sha256] if plan.load else []
    return digest(["measure", keys, asked, threads, *served])


def _measured(
    plan: Plan, dense: PlanRow, threads: int, run: RunPaths | None
) -> Iterator[MeasureJob]:
    """The measurements of rows beside this dense one, with the plan's settings."""
    if run is None:
        return
    rows = {row.label: row.key for row in (*plan.rows, *plan.others)}
    for path in sorted(run.root.glob("jobs/throughput*/job.json")):
        payload = _read(path)
        try:
            job = MeasureJob.model_validate(payload)
        except ValueError:
            continue
        # Jobs of earlier versions do not hold the keys of their rows.
        keys = job.keys or {label: rows.get(label, "") for label in job.rows}
        key = _measure_key(plan, dense, [[label, keys.get(label, "")] for label in job.rows],
                           threads)  # fmt: skip
        if key == done_key(run, path.parent.name) and keys.get(job.dense) == dense.key:
            yield job.model_copy(update={"keys": keys, "key": key})
