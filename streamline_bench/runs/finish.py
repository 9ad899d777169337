"""From finished jobs to ``run.json`` and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.errors import CheckpointError, ComparisonError
from streamline_bench.harness.used_settings import (
    UsedSettings,
    ignored_options,
    merged_settings,
    used_settings,
)
from streamline_bench.report.run_file import NoiseRun, RunFile, RunRow, write_run_file
from streamline_bench.runs.execution.same_weights import Weights
from streamline_bench.runs.execution.scheduler import Grouping, JobState, groups_of
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job, read_done, write_done
from streamline_bench.runs.jobs.kinds import CompressJob, MeasureJob, TextJob
from streamline_bench.runs.jobs.planned import same_tokens
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import Evaluation, Plan, PlanRow, digest

if TYPE_CHECKING:
    from streamline_bench.compression.target import ServingMemory, Target


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
        """Whether a row has answered everything."""
        found = [state.succeeded for state in self._of(label, ScoreJob)]
        return bool(found) and all(found)

    def distinct(self) -> list[str]:
        """Return the labels of the rows that have a result, one of each that have the same weights.

        Those whose dense row has none are left out.
        """
        failed, twins = self.failures(), self._twins
        rows = [row for row in self.plan.rows if row.label not in failed | twins]
        return [row.label for row in rows if self.plan.reference_of(row).label not in failed]

    def describe(self) -> RunFile:
        """Return what ``run.json`` will hold."""
        succeeded = [state for state in self.states.values() if state.succeeded]
        again: dict[str, dict[str, list[str]]] = {}
        for job in (state.job for state in succeeded):
            if isinstance(job, ScoreJob) and job.noise:
                folder = self.run.relative(job.output(self.run))
                again.setdefault(job.noise, {})[folder] = self._asked_again(job)
        commands = [state.done.command for state in succeeded if state.done and not state.twin]
        together = self._shared_layers()
        return RunFile(
            title=self.plan.title,
            dense=self.plan.reference,
            rows=[self._row(row, together) for row in self.plan.rows],
            commands=[command for command in commands if command],
            versions=self.plan.versions,
            throughput=self._named(
                self.run.measured() / "throughput.json",
                any(state.job.name == "throughput" for state in succeeded),
            ),
            noise=[
                NoiseRun(
                    label=each.label,
                    eval=next(iter(found)),
                    more=list(found)[1:],
                    asked_again={folder: tasks for folder, tasks in found.items() if tasks},
                )
                for each in self.plan.noise
                if (found := again.get(each.name))
            ],
            tasks=list(self.plan.tasks),
            tasks_left_out=self._left_out_of_answers(),
            metrics=self.plan.metrics,
            pairs=self.plan.pairs,
            target=self._target.described if self._target is not None else None,
            fronts=self._target is not None or self.plan.search > 0,
            text=self._text(),
            failed_jobs=self.side_failures(),
            not_compared=self.left_out(),
            used=self._used.model_dump(mode="json") if self._used else {},
            ignored_options=self.ignored_options(),
        )

    def ignored_options(self) -> list[str]:
        """Return a sentence for each option of the evaluation that had no effect."""
        said = [
            sentence
            for asked in self.plan.evaluations
            if (used := merged_settings(self._used_for(asked))) is not None
            for sentence in ignored_options(asked, used)
        ]
        return list(dict.fromkeys(said))

    def _asked_again(self, job: ScoreJob) -> list[str]:
        """The tasks of a job that the command asks with other settings now."""
        return [task for task in job.unread if task in self.plan.tasks]

    def _row(self, row: PlanRow, together: Grouping) -> RunRow:
        """What the jobs of a row made."""
        run, label = self.run, row.label
        manifest = self._manifests[0].get(label)
        seconds = dict(manifest.seconds) if manifest else {}
        evaluations, asked_again = [], {}
        for state in self._of(label, ScoreJob):
            if state.done:
                seconds["evaluate"] = seconds.get("evaluate", 0.0) + state.done.seconds
            if (job := self._answered_by(state)) is not None:
                evaluations.append(run.relative(job.output(run)))
                if isinstance(state.job, ScoreJob) and (tasks := self._asked_again(state.job)):
                    asked_again[evaluations[-1]] = tasks
        evaluations = list(dict.fromkeys(evaluations)) if self.scored(label) else []
        walks = ([job.label for job in group] for group in together.groups)
        walk = next((labels for labels in walks if label in labels), [])
        company = [each.label for each in self.plan.rows if each.label in walk]
        mine = next((state.job.name for state in self._of(label, ScoreJob)), "")
        return RunRow(
            label=label,
            eval=evaluations[0] if evaluations else None,
            more=evaluations[1:],
            asked_again=asked_again,
            checkpoint=self._named(run.checkpoint(row.place), self._has(label, CompressJob)),
            recipe=row.recipe if row.made_here else None,
            divergence=self._divergence(row),
            seconds=seconds,
            failed=self.failures().get(label),
            scored_with=company if len(company) > 1 else [],
            scored_alone=together.alone.get(mine),
            **self._measured(row),
            **self._facts(row),
        )

    def _facts(self, row: PlanRow) -> dict[str, Any]:
        """What the plan knows of a row."""
        plan, other = self.plan, row.model if row.checkpoint else None
        facts: dict[str, Any] = {
            "dense": row.dense,
            "reference": None if row.dense else plan.reference_of(row).label,
            "same_as": self._twins.get(row.label),
            "group": row.group,
            "axes": row.axes,
            "published": [each.model_dump(mode="json") for each in row.published],
            "bytes": self._bytes(row),
            "memory": self._memory(row),
        }
        if other is not None:
            facts["made_elsewhere"] = {
                **other.model_dump(mode="json", exclude_defaults=True),
                "name": other.name,
            }
        if not row.dense and not same_tokens(plan, row):
            dense = facts["reference"]
            facts["not_compared"] = {
                "token distributions": f"its tokenizer is another one than that of {dense}"
            }
        return facts

    def _bytes(self, row: PlanRow) -> int | None:
        """Bytes of the weights' files."""
        if row.model is not None and not row.made_here:
            return row.model.nbytes
        if row.dense:
            return self.plan.nbytes
        folder = self.run.checkpoint(row.place)
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        return sum(sizes) or None

    @cached_property
    def _target(self) -> Target | None:
        from streamline_bench.compression.target import Target

        return Target.model_validate(self.plan.target) if self.plan.target else None

    @cached_property
    def _serving(self) -> ServingMemory | None:
        """Memory for the sequences of the target; None: it names none, or it is not known."""
        from streamline_bench.compression.target import serving_memory
        from streamline_bench.modeling.loading import SourceModel

        if self._target is None or self._target.memory is None:
            return None
        plan = self.plan
        source = SourceModel.find(plan.model, plan.revision,
                                  trust_remote_code=plan.trust_remote_code)  # fmt: skip
        return serving_memory(source.reader, source.config, self._target)

    def _memory(self, row: PlanRow) -> int | None:
        """Bytes of memory of a row that comes from the run's first model."""
        from streamline_bench.core.checkpoint.folder import resolve_pretrained
        from streamline_bench.throughput.footprint import footprint

        if self._serving is None or row.checkpoint or row.model is not None:
            return None
        folder = self.run.checkpoint(row.place)
        if row.dense:
            folder = resolve_pretrained(self.plan.model, self.plan.revision)
        elif not self._has(row.label, CompressJob):
            return None
        sizes = footprint(folder)
        return self._serving.of(sizes.weights_bytes, sizes.kv_values_per_token or 0)

    def _divergence(self, row: PlanRow) -> str | None:
        for state in self._of(row.label, TextJob):
            if state.succeeded:
                job = self.states[state.twin].job if state.twin else state.job
                return self.run.relative(self.run.divergence(job.place))
        return None

    def _measured(self, row: PlanRow) -> dict[str, str]:
        """The file with the speed of a row, and what the row is called in it."""
        for state in self.states.values():
            job = state.job
            if not isinstance(job, MeasureJob) or not state.succeeded:
                continue
            label = next((each for each, key in job.keys.items() if key == row.key), None)
            if label is not None:
                file = self.run.measured(job.question) / "throughput.json"
                return {"throughput": self.run.relative(file), "measured_as": label}
        return {}

    def _answered_by(self, state: JobState) -> ScoreJob | None:
        """The job whose answers are those of a row."""
        if not state.succeeded:
            return None
        job = self.states[state.twin].job if state.twin else state.job
        return job if isinstance(job, ScoreJob) else None

    def _left_out_of_answers(self) -> list[str]:
        """Tasks that rows of this run have answered, and that this command does not ask for."""
        wanted = self.plan.tasks
        jobs = [state.job for state in self.states.values() if isinstance(state.job, ScoreJob)]
        asked = dict.fromkeys(task for job in jobs for task in job.evaluation.tasks)
        return [task for task in asked if task not in wanted]

    def _text(self) -> str | None:
        text = self.plan.text
        return digest(text.model_dump(mode="json", exclude={"file"})) if text else None

    def _of(self, label: str, *kinds: type[Job]) -> Iterator[JobState]:
        """The jobs of these kinds that work for a row."""
        for state in self.states.values():
            if label in state.job.labels and isinstance(state.job, kinds):
                yield state

    def _has(self, label: str, kind: type[Job]) -> bool:
        return any(state.succeeded for state in self._of(label, kind))

    def _named(self, path: Path, there: bool) -> str | None:
        return self.run.relative(path) if there else None

    @property
    def _used(self) -> UsedSettings | None:
        return merged_settings([each for _, each in self._read])

    def _used_for(self, asked: Evaluation) -> list[UsedSettings]:
        return [used for job, used in self._read if job.evaluation.settings == asked.settings]

    @cached_property
    def _read(self) -> list[tuple[ScoreJob, UsedSettings]]:
        """What the harness used for each set of questions, as the dense row's results say it."""
        dense = self.plan.reference
        if not self.scored(dense):
            return []
        jobs = [self._answered_by(state) for state in self._of(dense, ScoreJob)]
        read = [(job, used_settings(job.output(self.run))) for job in jobs if job is not None]
        return [(job, used) for job, used in read if used is not None]

    @cached_property
    def _twins(self) -> dict[str, str]:
        """Label -> label of the first row with the same weights."""
        weights, first, twins = Weights(), dict[str, str](), dict[str, str]()
        failed = self.failures()
        for row in sorted(self.plan.rows, key=lambda row: not row.dense):
            jobs = [state.job for state in self._of(row.label, ScoreJob) if state.succeeded]
            name = next((weights.of(self.run, j) for j in jobs if isinstance(j, ScoreJob)), None)
            if name is None or row.label in failed:
                continue
            before = first.setdefault(f"{name} {self.plan.reference_of(row).label}", row.label)
            if before != row.label and not row.dense:
                twins[row.label] = before
        return twins

    @cached_property
    def _manifests(self) -> tuple[dict[str, Manifest], dict[str, str]]:
        """The manifests of the checkpoints that were made, and why others cannot be read."""
        found: dict[str, Manifest] = {}
        damaged: dict[str, str] = {}
        for row in self.plan.rows:
            if not self._has(row.label, CompressJob):
                continue
            try:
                if (manifest := read_manifest(self.run.checkpoint(row.place))) is not None:
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
            for state in [*self._of(row.label, ScoreJob)][:1]
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
