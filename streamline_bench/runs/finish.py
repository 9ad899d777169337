"""From finished jobs to ``run.json`` and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.manifest import Manifest, read_manifest
from streamline_bench.errors import CheckpointError, ComparisonError
from streamline_bench.report.run_file import NoiseRun, RunFile, RunRow, write_run_file
from streamline_bench.runs.execution.grouping import groups_of
from streamline_bench.runs.execution.scheduler import JobState
from streamline_bench.runs.folder import make_job_folder
from streamline_bench.runs.planning.plan import Plan, PlanRow, digest

__all__ = [
    "describe_run",
    "row_failures",
    "scored_alone",
    "side_failures",
    "tasks_left_out",
    "write_report_once",
]

_OWN = ("compress", "score")
"""Kinds of jobs without which a row has no result."""


def row_failures(run: Path, plan: Plan, states: Mapping[str, JobState]) -> dict[str, str]:
    """Return label -> reason, for the rows that have no result.

    A row whose text could not be compared has one: what it answers.
    """
    failures: dict[str, str] = {}
    for row in plan.rows:
        for state in states.values():
            theirs = row.label in state.job.labels and state.job.kind in _OWN
            if theirs and state.status in ("failed", "skipped"):
                failures.setdefault(row.label, state.reason or "It failed.")
    _, damaged = _manifests(run, plan, states)
    return {**damaged, **failures}


def side_failures(states: Mapping[str, JobState]) -> dict[str, str]:
    """Return job -> reason, for failed jobs without which every row still has its result."""
    return {
        name: state.reason or "It failed."
        for name, state in states.items()
        if state.status == "failed" and not (state.job.labels and state.job.kind in _OWN)
    }


def tasks_left_out(states: Mapping[str, JobState]) -> dict[str, str]:
    """Return task -> why it was not scored although it was asked for."""
    found: dict[str, str] = {}
    for state in states.values():
        if state.done is not None and state.job.labels:
            found |= state.done.facts.get("not_compared") or {}
    return found


def scored_alone(plan: Plan, states: Mapping[str, JobState]) -> dict[str, str]:
    """Return label -> why it was scored by itself, where others were scored together."""
    found: dict[str, str] = {}
    for row in plan.rows:
        state = states.get(f"score-{row.label}")
        if state is not None and state.done is not None and state.done.facts.get("alone"):
            found[row.label] = str(state.done.facts["alone"])
    return found


def describe_run(run: Path, plan: Plan, states: Mapping[str, JobState]) -> RunFile:
    """Return what ``run.json`` will hold."""
    failures = row_failures(run, plan, states)
    manifests, _ = _manifests(run, plan, states)
    company, strangers = _shared_layers(run, plan, states, failures)
    measured = states.get("throughput")
    commands = [state.done.command for state in states.values() if state.done]
    return RunFile(
        title=plan.title,
        dense=plan.reference,
        rows=[
            RunRow(
                **_results(row, states, manifests.get(row.label)),
                failed=failures.get(row.label),
                scored_with=company.get(row.label, []),
                scored_alone=strangers.get(row.label),
            )
            for row in plan.rows
        ],
        commands=[command for command in commands if command],
        versions=plan.versions,
        throughput="throughput/throughput.json" if measured and measured.succeeded else None,
        noise=[
            NoiseRun(label=noise.label, eval=f"noise/{noise.name}/eval")
            for noise in plan.noise
            if states[f"noise-{noise.name}"].succeeded
        ],
        failed_jobs=side_failures(states),
        not_compared=tasks_left_out(states),
    )


def write_report_once(run: Path, description: RunFile, *, progress: bool) -> Path:
    """Write ``run.json``, the report and a model card into every checkpoint of the run.

    Those there are kept if they were made from the same results.

    Raises:
        StreamlineBenchError: what building a report raises.
    """
    from streamline_bench.report.build import build_report
    from streamline_bench.report.run_file import read_run_file
    from streamline_bench.report.views.model_card import write_checkpoint_cards
    from streamline_bench.runs.jobs.marker import read_done, write_done

    make_job_folder(run, "report")
    key = digest(description.model_dump(mode="json"))
    done = read_done(run, "report", key)
    if done is not None and (run / done.facts["page"]).is_file():
        return run / str(done.facts["page"])
    write_run_file(run, description)
    read_run_file(run)
    try:
        page = build_report(run, progress=progress)
    except ComparisonError as error:
        # What a task's own code reads is not in the keys of the jobs.
        raise ComparisonError(
            f"{error} If a task's data changed since the first row was scored, delete the 'eval' "
            f"folders in {run}: the same command then scores every row again."
        ) from None
    names = sorted(path.name for path in run.glob("leaderboard.*") if path.is_file())
    names += [card.relative_to(run).as_posix() for card in write_checkpoint_cards(run)]
    write_done(
        run, "report", key=key, seconds=0, products=["run.json", *names],
        facts={"page": page.relative_to(run).as_posix()},
    )  # fmt: skip
    return page


def _manifests(
    run: Path, plan: Plan, states: Mapping[str, JobState]
) -> tuple[dict[str, Manifest], dict[str, str]]:
    """The manifests of the checkpoints that were made, and why others cannot be read, by label."""
    found: dict[str, Manifest] = {}
    damaged: dict[str, str] = {}
    for row in plan.rows:
        made = states.get(f"compress-{row.label}")
        if made is None or not made.succeeded:
            continue
        try:
            manifest = read_manifest(run / row.label / "checkpoint")
        except CheckpointError as error:
            damaged[row.label] = str(error)
            continue
        if manifest is not None:
            found[row.label] = manifest
    return found, damaged


def _shared_layers(
    run: Path, plan: Plan, states: Mapping[str, JobState], failures: Mapping[str, str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Label -> rows that begin with the same layers, and label -> why a row shares none.

    Read from the checkpoints: which rows were in fact scored by one process may have been decided
    by an interruption, and a report does not depend on that.
    """
    rows = sorted(plan.rows, key=lambda row: row.label != plan.reference)
    jobs = [states[f"score-{row.label}"].job for row in rows if row.label not in failures]
    found = groups_of(run, [job for job in jobs if job.shareable], one_process=False)
    groups = [[job.labels[0] for job in group] for group in found.groups]
    company = {label: group for group in groups if len(group) > 1 for label in group}
    return company, {
        job.labels[0]: found.alone[job.name] for job in jobs if job.name in found.alone
    }


def _results(
    row: PlanRow, states: Mapping[str, JobState], manifest: Manifest | None
) -> dict[str, Any]:
    """What a row's own jobs made, as keys of :class:`RunRow`."""
    made = states.get(f"compress-{row.label}")
    scored = states[f"score-{row.label}"]
    compared = states.get(f"text-{row.label}")
    seconds = dict(manifest.seconds) if manifest else {}
    if scored.done:
        seconds["evaluate"] = scored.done.seconds
    planned = None if row.dense else row.recipe
    return {
        "label": row.label,
        "eval": f"{row.label}/eval" if scored.succeeded else None,
        "checkpoint": f"{row.label}/checkpoint" if made and made.succeeded else None,
        "recipe": manifest.recipe if manifest else planned,
        "divergence": f"{row.label}/divergence.json" if compared and compared.succeeded else None,
        "seconds": seconds,
    }
