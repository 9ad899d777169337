"""From finished jobs to ``run.json`` and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.errors import CheckpointError, ComparisonError
from streamline_bench.harness.used_settings import UsedSettings, ignored_options, used_settings
from streamline_bench.report.run_file import NoiseRun, RunFile, RunRow, write_run_file
from streamline_bench.runs.execution.scheduler import Grouping, JobState, groups_of
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job, read_done, write_done
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob, TextJob
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import Plan, PlanRow, digest


@dataclass(frozen=True)
class Results:
    """What the jobs of a plan made, and why the rest is missing."""

    run: RunPaths
    plan: Plan
    states: Mapping[str, JobState]

    def failures(self) -> dict[str, str]:
        """Return label -> reason, for the rows that have no result.

        A row whose text could not be compared has one: what it answers.
        """
        found: dict[str, str] = {}
        for row in self.plan.rows:
            for state in self._of(row.label, CompressJob, ScoreJob):
                if state.status in ("failed", "skipped"):
                    found.setdefault(row.label, state.reason or "It failed.")
        return {**self._manifests[1], **found}

    def side_failures(self) -> dict[str, str]:
        """Return job -> reason, for failed jobs without which every row still has its result."""
        return {
            name: state.reason or "It failed."
            for name, state in self.states.items()
            if state.status == "failed"
            and not (state.job.labels and isinstance(state.job, CompressJob | ScoreJob))
        }

    def left_out(self) -> dict[str, str]:
        """Return task -> why it was not scored although it was asked for."""
        found: dict[str, str] = {}
        for state in self.states.values():
            if state.done is not None and state.job.labels:
                found |= state.done.facts.not_compared
        return found

    def alone(self) -> dict[str, str]:
        """Return label -> why it was scored by itself, where others were scored together."""
        return {
            row.label: state.done.facts.alone
            for row in self.plan.rows
            for state in self._of(row.label, ScoreJob)
            if state.done is not None and state.done.facts.alone
        }

    def scored(self, label: str) -> bool:
        """Whether a row has its evaluation."""
        return self._has(label, ScoreJob)

    def describe(self) -> RunFile:
        """Return what ``run.json`` will hold."""
        jobs = [state.job for state in self.states.values() if state.succeeded]
        again = {job.noise: job for job in jobs if isinstance(job, ScoreJob) and job.noise}
        measured = any(isinstance(job, MeasureJob) for job in jobs)
        commands = [state.done.command for state in self.states.values() if state.done]
        together = self._shared_layers()
        return RunFile(
            title=self.plan.title,
            dense=self.plan.reference,
            rows=[self._row(row, together) for row in self.plan.rows],
            commands=[command for command in commands if command],
            versions=self.plan.versions,
            throughput=self._named(self.run.throughput / "throughput.json", measured),
            noise=[
                NoiseRun(label=each.label, eval=self.run.relative(self.run.noise(each.name)))
                for each in self.plan.noise
                if each.name in again
            ],
            failed_jobs=self.side_failures(),
            not_compared=self.left_out(),
            used=self._used.model_dump(mode="json") if self._used else {},
            ignored_options=self.ignored_options(),
        )

    def ignored_options(self) -> list[str]:
        """Return a sentence for each option of the evaluation that had no effect."""
        return ignored_options(self.plan.evaluation, self._used) if self._used else []

    def _row(self, row: PlanRow, together: Grouping) -> RunRow:
        """What the jobs of a row made."""
        run, label = self.run, row.label
        manifest = self._manifests[0].get(label)
        seconds = dict(manifest.seconds) if manifest else {}
        for state in self._of(label, ScoreJob):
            if state.done:
                seconds["evaluate"] = state.done.seconds
        company = next((g for g in together.groups if label in (job.label for job in g)), [])
        mine = next((state.job.name for state in self._of(label, ScoreJob)), "")
        return RunRow(
            label=label,
            eval=self._named(run.evaluation(label), self.scored(label)),
            checkpoint=self._named(run.checkpoint(label), self._has(label, CompressJob)),
            recipe=manifest.recipe if manifest else None if row.dense else row.recipe,
            divergence=self._named(run.divergence(label), self._has(label, TextJob)),
            seconds=seconds,
            failed=self.failures().get(label),
            scored_with=[job.label for job in company] if len(company) > 1 else [],
            scored_alone=together.alone.get(mine),
        )

    def _of(self, label: str, *kinds: type[Job]) -> Iterator[JobState]:
        """The jobs of these kinds that work for a row."""
        for state in self.states.values():
            if label in state.job.labels and isinstance(state.job, kinds):
                yield state

    def _has(self, label: str, kind: type[Job]) -> bool:
        return any(state.succeeded for state in self._of(label, kind))

    def _named(self, path: Path, there: bool) -> str | None:
        return self.run.relative(path) if there else None

    @cached_property
    def _used(self) -> UsedSettings | None:
        dense = self.plan.reference
        return used_settings(self.run.evaluation(dense)) if self.scored(dense) else None

    @cached_property
    def _manifests(self) -> tuple[dict[str, Manifest], dict[str, str]]:
        """The manifests of the checkpoints that were made, and why others cannot be read."""
        found: dict[str, Manifest] = {}
        damaged: dict[str, str] = {}
        for row in self.plan.rows:
            if not self._has(row.label, CompressJob):
                continue
            try:
                if (manifest := read_manifest(self.run.checkpoint(row.label))) is not None:
                    found[row.label] = manifest
            except CheckpointError as error:
                damaged[row.label] = str(error)
        return found, damaged

    def _shared_layers(self) -> Grouping:
        """Which rows begin with the same layers, and why a row shares none.

        Read from the checkpoints: which rows were in fact scored by one process may have been
        decided by an interruption, and a report does not depend on that.
        """
        failures = self.failures()
        jobs = [
            state.job
            for row in sorted(self.plan.rows, key=lambda row: row.label != self.plan.reference)
            for state in self._of(row.label, ScoreJob)
            if row.label not in failures
        ]
        shareable = [job for job in jobs if isinstance(job, ScoreJob) and job.shareable]
        return groups_of(self.run, shareable, one_process=False)


def write_report_once(run: RunPaths, description: RunFile, *, progress: bool) -> Path:
    """Write ``run.json``, the report and a model card into every checkpoint of the run.

    Those there are kept if they were made from the same results. Raises what building a report
    raises.
    """
    from streamline_bench.report.build import build_report
    from streamline_bench.report.run_file import read_run_file
    from streamline_bench.report.views.model_card import write_checkpoint_cards

    run.make_job("report")
    key = digest(description.model_dump(mode="json"))
    if read_done(run, "report", key) is not None and run.page.is_file():
        return run.page
    write_run_file(run.root, description)
    read_run_file(run.root)
    try:
        page = build_report(run.root, progress=progress)
    except ComparisonError as error:
        # What a task's own code reads is not in the keys of the jobs.
        raise ComparisonError(
            f"{error} If a task's data changed since the first row was scored, delete the 'eval' "
            f"folders in {run.root}: the same command then scores every row again."
        ) from None
    made = sorted(path for path in run.root.glob("leaderboard.*") if path.is_file())
    cards = write_checkpoint_cards(run.root)
    write_done(run, "report", key=key, seconds=0, products=[run.run_file, *made, *cards])
    return page
