"""From finished jobs to ``run.json`` and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.manifest import read_manifest
from streamline_bench.errors import CheckpointError, OutputError
from streamline_bench.report.run_folder import NoiseRun, RunFile, RunRow, write_run_file
from streamline_bench.runs.folder import job_folder
from streamline_bench.runs.plan import Plan, PlanRow, digest
from streamline_bench.runs.scheduler import JobState

__all__ = ["describe_run", "row_failures", "scored_alone", "side_failures", "write_report_once"]

_OWN = ("compress", "score")
"""Kinds of jobs without which a row has no result."""


def row_failures(plan: Plan, states: Mapping[str, JobState]) -> dict[str, str]:
    """Return label -> reason, for the rows that have no result.

    A row whose text could not be compared has one: what it answers.
    """
    failures: dict[str, str] = {}
    for row in plan.rows:
        for state in states.values():
            theirs = row.label in state.job.labels and state.job.kind in _OWN
            if theirs and state.status in ("failed", "skipped"):
                failures.setdefault(row.label, state.reason or "It failed.")
    return failures


def side_failures(states: Mapping[str, JobState]) -> dict[str, str]:
    """Return job -> reason, for failed jobs without which every row still has its result."""
    return {
        name: state.reason or "It failed."
        for name, state in states.items()
        if state.status == "failed" and not (state.job.labels and state.job.kind in _OWN)
    }


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
    failures = row_failures(plan, states)
    measured = states.get("throughput")
    commands = [state.done.command for state in states.values() if state.done]
    return RunFile(
        title=plan.title,
        dense=plan.reference,
        rows=[_row(run, row, states, failures.get(row.label)) for row in plan.rows],
        commands=[command for command in commands if command],
        versions=plan.versions,
        throughput="throughput/throughput.json" if measured and measured.succeeded else None,
        noise=[
            NoiseRun(label=noise.label, eval=f"noise/{noise.name}/eval")
            for noise in plan.noise
            if states[f"noise-{noise.name}"].succeeded
        ],
        failed_jobs=side_failures(states),
    )


def write_report_once(run: Path, description: RunFile, *, progress: bool) -> Path:
    """Write ``run.json``, the report and a model card into every checkpoint of the run.

    Those there are kept if they were made from the same results.

    Raises:
        StreamlineBenchError: what building a report raises.
    """
    from streamline_bench.report.model_card import write_checkpoint_cards
    from streamline_bench.report.run_folder import build_report, read_run_file
    from streamline_bench.runs.marker import read_done, write_done

    folder = job_folder(run, "report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made ({error.strerror}).") from None
    key = digest(description.model_dump(mode="json"))
    done = read_done(run, "report", key)
    if done is not None and (run / done.facts["page"]).is_file():
        return run / str(done.facts["page"])
    write_run_file(run, description)
    read_run_file(run)
    page = build_report(run, progress=progress)
    names = sorted(path.name for path in run.glob("leaderboard.*") if path.is_file())
    names += [card.relative_to(run).as_posix() for card in write_checkpoint_cards(run)]
    write_done(
        run, "report", key=key, seconds=0, products=["run.json", *names],
        facts={"page": page.relative_to(run).as_posix()},
    )  # fmt: skip
    return page


def _row(run: Path, row: PlanRow, states: Mapping[str, JobState], failure: str | None) -> RunRow:
    checkpoint = None if row.dense else f"{row.label}/checkpoint"
    seconds: dict[str, float] = {}
    recipe: dict[str, Any] | None = None if row.dense else row.recipe
    made = states.get(f"compress-{row.label}")
    if checkpoint and made and made.succeeded:
        try:
            manifest = read_manifest(run / checkpoint)
        except CheckpointError:
            manifest = None
        if manifest is not None:
            seconds |= manifest.seconds
            recipe = manifest.recipe
    else:
        checkpoint = None
    scored = states.get(f"score-{row.label}")
    if scored and scored.done:
        seconds["evaluate"] = scored.done.seconds
    facts = scored.done.facts if scored and scored.done else {}
    compared = states.get(f"text-{row.label}")
    return RunRow(
        label=row.label,
        eval=f"{row.label}/eval" if scored and scored.succeeded else None,
        checkpoint=checkpoint,
        recipe=recipe,
        divergence=f"{row.label}/divergence.json" if compared and compared.succeeded else None,
        seconds=seconds,
        failed=failure,
        scored_with=facts.get("together") or [],
        scored_alone=facts.get("alone"),
    )
