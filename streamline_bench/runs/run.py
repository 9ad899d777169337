"""``compare``: one model, many recipes, some tasks, one leaderboard."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from streamline_bench.errors import OutputError, RecipeError
from streamline_bench.runs.execution.options import STAGES, Execution
from streamline_bench.runs.execution.processes import Executor, LocalExecutor
from streamline_bench.runs.execution.progress import watching
from streamline_bench.runs.execution.scheduler import Scheduler
from streamline_bench.runs.finish import Results, write_report_once
from streamline_bench.runs.folder import RunPaths, check_output, claim, locked
from streamline_bench.runs.jobs.job import Job
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob
from streamline_bench.runs.jobs.planned import measure_jobs, plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob, forget_answers
from streamline_bench.runs.planning.checks import check_before, memory_per_job
from streamline_bench.runs.planning.growth import grown
from streamline_bench.runs.planning.plan import Plan, PlanRow, read_plan
from streamline_bench.runs.planning.request import Request, RowRequest, make_request
from streamline_bench.runs.planning.resolve import resolve_plan

if TYPE_CHECKING:
    import pandas as pd


class Terminated(BaseException):
    """The process was asked to end (SIGTERM); no ``except Exception`` may hold it up."""


@dataclass(frozen=True)
class CompareResult:
    """How a comparison ended.

    Attributes:
        run: the run folder.
        report: the page to open; None where no report was asked for, or the dense row failed.
        failures: label -> reason, of the rows that have no result.
        reasons: job -> reason, of other jobs that failed: noise floor, text, speed.
        alone: label -> why it was scored by itself, where others were scored together.
        left_out: task -> why no row was asked it.
        ignored_options: a sentence for each option that the harness did not follow.
        jobs: job -> ``done``, ``kept`` (from an earlier run), ``failed`` or ``skipped``.
    """

    run: Path
    report: Path | None
    failures: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    alone: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    ignored_options: Sequence[str] = ()
    jobs: Mapping[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 when everything that was asked for is there, else 1."""
        failed = any(status in ("failed", "skipped") for status in self.jobs.values())
        return int(bool(self.failures) or failed)

    def results(self) -> pd.DataFrame:
        """Return the results as a tidy table: one line per row, scope and metric.

        Raises:
            SamplesError: the comparison has no report.
        """
        from streamline_bench.report.frame import results

        return results(self.run)

    def ranking(self) -> pd.DataFrame:
        """Return the ranking as a table, one line per row (SamplesError: as :meth:`results`)."""
        from streamline_bench.report.frame import ranking

        return ranking(self.run)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        if self.report is None:
            return f"<p>{escape(str(self.run))} has no report yet.</p>"
        from streamline_bench.report.frame import html_table

        return html_table(self.run)

    def summary(self) -> dict[str, Any]:
        """Return the same as JSON-ready values, with the ranking where there is a report."""
        report = str(self.report) if self.report else None
        found = {**asdict(self), "run": str(self.run), "report": report}
        data = self.run / "leaderboard.json"
        if self.report is None or not data.is_file():
            return found
        from streamline_bench.report.frame import ranking_records
        from streamline_bench.report.leaderboard import read_leaderboard

        board = read_leaderboard(data)
        return {**found, "results": ranking_records(board)}


def compare(
    model: str | Path,
    recipes: Sequence[str | RowRequest],
    tasks: Sequence[str],
    output: Path | str,
    *,
    execution: Execution | None = None,
    until: str = "report",
    progress: bool = True,
    **options: Any,
) -> CompareResult:
    """Compress a model by every recipe, score all of them, and write a leaderboard.

    Running again with the same arguments continues an interrupted run: what is done is kept, what
    failed is tried again.

    Args:
        recipes: names, paths, groups or :class:`RowRequest`; ``dense`` is added if missing.
        until: last stage to run: ``compress``, ``evaluate`` or ``report``.
        options: other keys of :class:`Request`, such as ``limit=100``.

    Raises:
        StreamlineBenchError: nothing could be run. A row that fails raises nothing: see
            :attr:`CompareResult.failures`.
    """
    payload = {"model": str(model), "recipes": list(recipes), "tasks": list(tasks), **options}
    return compare_request(
        make_request(payload), Path(output), execution=execution, until=until, progress=progress
    )


def compare_request(
    request: Request,
    output: Path,
    *,
    execution: Execution | None = None,
    until: str = "report",
    progress: bool = True,
    overwrite: bool = False,
    asked: Collection[str] = (),
) -> CompareResult:
    """Do what :func:`compare` does, for a request.

    Args:
        overwrite: first remove what an earlier run of the same model made in the folder.
        asked: see :func:`.resolve_rows`.
    """
    if until not in STAGES:
        raise RecipeError(f"Unknown stage '{until}'; known: {', '.join(STAGES)}.")
    if request.search and until != STAGES[-1]:
        raise RecipeError(
            f"A search for {request.search} more sizes reads the report, and the run ends at "
            f"'{until}'; leave --search or --until out."
        )
    execution = execution or Execution()
    try:
        output = output.expanduser().absolute()
    except RuntimeError as error:
        raise OutputError(
            f"{output} has no home folder ({error}); give another --output."
        ) from None
    check_output(output)
    with _sigterm_raises():
        # What was mistyped is refused before a folder is made for it.
        there = None if overwrite else read_plan(output)
        plan = resolve_plan(
            request, device=execution.device, asked=asked, progress=progress, run=output,
            there=there,
        )  # fmt: skip
        execution.check_device(plan.device)
        execution.check_threads(plan.threads)
        execution.check_measured(plan.throughput)
        paths = RunPaths(output)
        executor = _executor(execution)
        try:
            check_before(grown(there, plan), paths, execution, until=until)
            with locked(output):
                plan = claim(output, plan, overwrite=overwrite)
                result = _run(paths, plan, execution, executor, until, progress)
                while rows := _more_rows(plan, result, execution):
                    plan = claim(output, plan.model_copy(update={"rows": (*plan.rows, *rows)}))
                    executor = _executor(execution)
                    result = _run(paths, plan, execution, executor, until, progress)
                return result
        finally:
            executor.stop()  # again: the folder may have been refused before any job


def _more_rows(plan: Plan, result: CompareResult, execution: Execution) -> list[PlanRow]:
    """The rows of the next sizes of a search, as many sizes as there are jobs at a time."""
    if not plan.search or result.report is None:
        return []
    from streamline_bench.modeling.loading import SourceModel
    from streamline_bench.report.leaderboard import read_leaderboard
    from streamline_bench.runs.search import more_rows

    board = read_leaderboard(result.report.with_suffix(".json"))
    source = SourceModel.find(plan.model, plan.revision, trust_remote_code=plan.trust_remote_code)
    at_once = execution.job_slots if execution.executor == "local" else plan.search
    return more_rows(plan, board, source, max(1, at_once))


def _run(
    run: RunPaths, plan: Plan, execution: Execution, executor: Executor, until: str, progress: bool
) -> CompareResult:
    try:
        with watching(run, quiet=not progress, title=plan.title) as watch:
            scheduler = Scheduler(
                run,
                executor,
                retries=execution.retries,
                one_process=execution.executor == "local" and execution.job_slots == 1,
                watch=watch,
            )
            jobs = plan_jobs(plan, run, until=until, trunk=execution.trunk)
            memory = memory_per_job(execution)
            scheduler.do([shared_out(job, execution, memory) for job in jobs])
            if plan.throughput != "none" and until != "compress":
                # When nothing else runs that would take its time.
                labels = Results(run, plan, scheduler.states).distinct()
                measured = measure_jobs(plan, labels, execution.threads_alone, run)
                scheduler.do([shared_out(job, execution) for job in measured])
    finally:
        executor.stop()
    results = Results(run, plan, scheduler.states)
    if until != "compress" and not results.failures():
        forget_answers(run)
    report = None
    if until == "report" and results.scored(plan.reference):
        report = write_report_once(run, results.describe(), progress=progress)
    return CompareResult(
        run=run.root,
        report=report,
        failures=results.failures(),
        reasons=results.side_failures(),
        alone=results.alone(),
        left_out=results.left_out(),
        ignored_options=results.ignored_options(),
        jobs={name: state.status for name, state in scheduler.states.items()},
    )


def _executor(execution: Execution) -> Executor:
    if execution.executor == "ray":
        from streamline_bench.runs.execution.ray_executor import RayExecutor

        return RayExecutor(execution)
    if execution.executor == "slurm":
        from streamline_bench.runs.execution.slurm_executor import SlurmExecutor

        return SlurmExecutor(execution)
    return LocalExecutor(execution)


def shared_out(job: Job, execution: Execution, memory: int | None = None) -> Job:
    """Return the job with as many processes as its kind has GPUs, and with what it shares.

    A walk through layers in common is one process: models that several share are scored apart.

    Args:
        memory: bytes of its machine's memory that each job may take; None: all that is free.
    """
    processes = max(1, execution.gpus_of(job.kind))
    if isinstance(job, MeasureJob) and job.engine == "hf":
        processes = 1
    update: dict[str, Any] = {"processes": processes}
    if isinstance(job, ScoreJob) and processes > 1:
        update["shareable"] = False
    if isinstance(job, CompressJob):
        update |= {"placement": execution.placement, "memory": memory}
    return job.model_copy(update=update)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that jobs are ended on the way out."""

    def stop(*_: object) -> NoReturn:
        # Once is enough: a second one must not interrupt the ending of jobs.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
