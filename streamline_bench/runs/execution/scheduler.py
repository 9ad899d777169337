"""Runs a graph of jobs: what is done is kept, what failed takes only its own rows with it."""

from __future__ import annotations

import logging
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from streamline_bench.core.machine.environment import printable
from streamline_bench.errors import StreamlineBenchError
from streamline_bench.runs.execution.processes import Ended, Executor
from streamline_bench.runs.execution.same_weights import Weights
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import (
    Done,
    Job,
    forget_failure,
    last_line,
    read_done,
    read_failed,
)
from streamline_bench.runs.jobs.kinds import CompressJob, TextJob, text_together_job
from streamline_bench.runs.jobs.score import ScoreJob, score_together_job
from streamline_bench.runs.planning.plan import digest

log = logging.getLogger(__name__)

Status = Literal["waiting", "running", "done", "kept", "same", "failed", "skipped"]
"""``kept``: an earlier run did it; ``same``: its result is that of another job, whose model has the
same weights; ``skipped``: a job it needs failed."""


@dataclass
class JobState:
    """Where a job stands.

    Attributes:
        tries: attempts in this run of the command.
        process: name of the job whose process does it: its own, or of several done together.
        twin: name of the job whose result is this one's.
        reason: why it failed or was skipped.
        done: its marker, once it is there.
    """

    job: Job
    status: Status = "waiting"
    tries: int = 0
    process: str | None = None
    twin: str | None = None
    reason: str | None = None
    done: Done | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.status not in ("waiting", "running")

    @property
    def succeeded(self) -> bool:
        """Its result is there and whole."""
        return self.status in ("done", "kept", "same")


class Scheduler:
    """Runs the jobs of one run folder that have no result yet.

    A process that was killed, or whose machine was lost, is started again up to ``retries`` times;
    a job that ended with an error is not. Rows whose common process fails as a whole are scored
    alone.

    Attributes:
        states: where every job stands, by its name.
    """

    def __init__(
        self,
        run: RunPaths,
        executor: Executor,
        *,
        retries: int,
        one_process: bool,
        watch: Callable[[Mapping[str, JobState]], None],
    ) -> None:
        self.states: dict[str, JobState] = {}
        self._run = run
        self._executor = executor
        self._retries = retries
        self._one_process = one_process
        self._watch = watch
        self._started: dict[str, Job] = {}
        self._tries: Counter[str] = Counter()
        self._alone: dict[str, str | None] = {}
        self._looked_at: set[str] = set()
        self._weights = Weights()

    def do(self, jobs: Sequence[Job]) -> None:
        """Run these jobs until all have ended (OutputError: the run folder cannot be written)."""
        for job in jobs:
            done = read_done(self._run, job.name, job.key)
            self.states[job.name] = JobState(job, "waiting" if done is None else "kept", done=done)
        while not all(state.ended for state in self.states.values()):
            self._skip_hopeless()
            self._start_ready(self._first_of_their_weights())
            self._watch(self.states)
            for ended in self._executor.ended(0.5):
                self._settle(self._started.pop(ended.name), ended)
                self._drop_states()
        self._drop_states()  # also those that a killed run left
        self._watch(self.states)

    def _drop_states(self) -> None:
        """Delete the hidden states that no row will be trained on any more."""
        jobs = (state.job for state in self.states.values() if not state.ended)
        wanted = {job.states for job in jobs if isinstance(job, CompressJob)}
        for folder in self._run.states.glob("*"):
            if folder.name not in wanted:
                shutil.rmtree(folder, ignore_errors=True)

    def _skip_hopeless(self) -> None:
        for state in self.states.values():
            needed = (self.states[name] for name in state.job.needs)
            lost = next((each for each in needed if each.ended and not each.succeeded), None)
            if state.status == "waiting" and lost is not None:
                state.status, state.reason = "skipped", lost.reason

    def _first_of_their_weights(self) -> list[Job]:
        """The waiting jobs whose model is not that of another job that is asked the same.

        The others wait for that job, and take its result or its failure.
        """
        first: dict[object, JobState] = {}
        found: list[Job] = []
        for state in sorted(self.states.values(), key=lambda state: state.status == "waiting"):
            name = self._weights.asked(self._run, state.job) if self._ready(state.job) else None
            twin = first.setdefault(name, state) if name is not None else state
            if state.status != "waiting":
                continue
            if twin is state:
                found.append(state.job)
            elif twin.succeeded:
                state.status, state.twin, state.done = "same", twin.job.name, twin.done
            elif twin.ended:
                state.status, state.reason = "failed", twin.reason
        return found

    def _start_ready(self, waiting: Sequence[Job]) -> None:
        together: list[ScoreJob | TextJob] = [*_shareable(waiting), *_shareable_texts(waiting)]
        together = [job for job in together if job.name not in self._alone]
        for job in waiting:
            room = self._executor.has_room(job.kind)
            if room and job not in together and self._ready(job):
                self._start(job)
        for text in _by_question(job for job in together if isinstance(job, TextJob)):
            if all(map(self._ready, text)):
                self._start_texts(text)
        for same in _by_question(job for job in together if isinstance(job, ScoreJob)):
            if all(map(self._ready, same)):
                if self._executor.has_room("score"):
                    self._start_together(same)
            elif not self._one_process:
                self._start_strangers(filter(self._ready, same))

    def _ready(self, job: Job) -> bool:
        return all(self.states[name].succeeded for name in job.needs)

    def _start_texts(self, jobs: list[TextJob]) -> None:
        """Run the dense model once for all rows, or once in each process that has room."""
        number = min(self._executor.at_once("text"), len(jobs))
        for part in (jobs[first::number] for first in range(number)):
            if self._executor.has_room("text"):
                self._start(text_together_job(part))

    def _start_together(self, jobs: list[ScoreJob]) -> None:
        # Dense may have its result already; the others are compared with it.
        dense = self._dense(jobs)
        among = [dense, *(job for job in jobs if job is not dense)]
        at_once = self._executor.at_once("score")
        found = groups_of(self._run, among, one_process=self._one_process, at_once=at_once)
        # Started with the other single jobs as soon as there is room.
        self._alone.update(found.alone)
        for group in ([job for job in group if job in jobs] for group in found.groups):
            if len(group) == 1:
                several = len(self._all_shareable()) > 1  # else there is no company to miss
                why = "no other row was left to score it with" if several else None
                self._alone.setdefault(group[0].name, why)
            elif group and self._executor.has_room("score"):
                self._start(score_together_job(group))

    def _start_strangers(self, jobs: Iterable[ScoreJob]) -> None:
        """Score what shares nothing with the dense row, while other rows are still compressed."""
        jobs = list(jobs)
        if not jobs:
            return
        dense = self._dense(jobs)
        for job in jobs:
            if job is dense or job.name in self._looked_at:
                continue
            if not self._executor.has_room("score"):
                return
            self._looked_at.add(job.name)
            why = groups_of(self._run, [dense, job], one_process=False).alone.get(job.name)
            if why is not None:
                self._alone[job.name] = why
                self._start(job)

    def _all_shareable(self) -> list[ScoreJob]:
        return _shareable(state.job for state in self.states.values())

    def _dense(self, jobs: Sequence[ScoreJob]) -> ScoreJob:
        """The dense row's job, best one with the same questions; the first of these without one."""
        found = [job for job in self._all_shareable() if job.dense]
        same = [job for job in found if job.evaluation == jobs[0].evaluation]
        return next(iter([*same, *found, *jobs]))

    def _start(self, job: Job) -> None:
        for part in job.parts:
            if isinstance(part, ScoreJob):
                part = part.model_copy(update={"alone": self._alone.get(part.name)})
            part.write(self._run)
            forget_failure(self._run, part.name)
            self.states[part.name].status = "running"
            self.states[part.name].process = job.name
            self.states[part.name].tries += 1
        if len(job.parts) > 1:
            job.write(self._run)
        self._executor.submit(self._run, job)
        self._started[job.name] = job
        self._tries[job.name] += 1

    def _settle(self, job: Job, ended: Ended) -> None:
        for part in job.parts:
            state = self.states[part.name]
            # It may have been killed after its last write; what counts is that the result is whole.
            state.done = read_done(self._run, part.name, part.key)
            failed = read_failed(self._run, part.name, part.key)
            if state.done is not None:
                state.status = "done"
            elif failed is not None:
                state.status, state.reason = "failed", failed.reason
            elif self._is_worth_repeating(job, ended):
                state.status = "waiting"
            elif len(job.parts) > 1:
                state.status = "waiting"
                why = _reason(self._run, ended)
                self._alone[part.name] = f"its common process failed: {why}"
                log.warning(
                    "%s is done alone, because its common process failed: %s",
                    part.label,
                    printable(why),
                )
            else:
                state.status, state.reason = "failed", _reason(self._run, ended)

    def _is_worth_repeating(self, job: Job, ended: Ended) -> bool:
        # What is killed by a signal is most often short of memory, which several models need most.
        killed_together = len(job.parts) > 1 and ended.code is not None
        return ended.lost and not killed_together and self._tries[job.name] <= self._retries


@dataclass(frozen=True)
class Grouping:
    """Which jobs are done in one process, and why the others are done alone (by name)."""

    groups: list[list[ScoreJob]]
    alone: dict[str, str] = field(default_factory=dict)


def groups_of(
    run: RunPaths, jobs: Sequence[ScoreJob], *, one_process: bool, at_once: int = 1
) -> Grouping:
    """Return which of these jobs are worth doing in one walk through the model.

    Args:
        one_process: there is only one worker, for which loading the harness once for all is worth
            it even where nothing is shared.
        at_once: processes that score at the same time, each on a device of its own. Models apart
            may be done before a walk by one of them is; layers are what is counted.
    """
    if one_process or len(jobs) < 2:
        return Grouping([list(jobs)])
    from streamline_bench.harness.trunk.stack import legs_of, read_stack, solo_reason, walks_of

    stacks, alone = {}, {}
    for job in jobs:
        try:
            stacks[job.name] = read_stack(
                job.folder(run),
                dtype=job.evaluation.dtype,
                trust_remote_code=job.trust_remote_code,
                progress=False,
            )
        except StreamlineBenchError as error:
            alone[job.name] = f"its layers cannot be compared with those of other rows: {error}"
    by_name = {job.name: job for job in jobs}
    groups: list[list[ScoreJob]] = []
    for names in walks_of(stacks):
        depths = [len(stacks[name].steps) for name in names]
        shared = sum(leg.start for leg in legs_of(names, stacks))
        apart = min(at_once, len(names))
        if len(names) > 1 and sum(depths) - shared > sum(depths) / apart:
            groups += [[by_name[name]] for name in names]
            why = f"the {len(names)} rows that share layers are done sooner apart, {apart} at once"
            alone.update(dict.fromkeys(names, why))
        else:
            groups.append([by_name[name] for name in names])
    for group in groups:
        if len(group) == 1 and group[0].name not in alone:
            name = group[0].name
            alone[name] = solo_reason(name, jobs[0].name, stacks).replace(
                f"'{jobs[0].name}'", f"'{jobs[0].label}'"
            )
    return Grouping([*groups, *([job] for job in jobs if job.name not in stacks)], alone)


def _shareable(jobs: Iterable[Job]) -> list[ScoreJob]:
    return [job for job in jobs if isinstance(job, ScoreJob) and job.shareable]


def _shareable_texts(jobs: Iterable[Job]) -> list[TextJob]:
    return [job for job in jobs if isinstance(job, TextJob) and job.shareable]


_Asked = TypeVar("_Asked", ScoreJob, TextJob)


def _by_question(jobs: Iterable[_Asked]) -> list[list[_Asked]]:
    """Part jobs into those that are asked the same and loaded in the same way."""
    found: dict[str, list[_Asked]] = {}
    for job in jobs:
        asked = f"{job.trust_remote_code} "
        if isinstance(job, ScoreJob):
            asked += job.evaluation.model_dump_json()
        else:
            asked += digest([job.model, job.revision, job.dtype, job.text.model_dump(mode="json")])
        found.setdefault(asked, []).append(job)
    return list(found.values())


def _reason(run: RunPaths, ended: Ended) -> str:
    log_file = run.log(ended.name)
    named = run.relative(log_file)
    if ended.reason:
        return ended.reason
    if ended.code is None:
        return f"Its worker was lost; see {named}."
    if ended.code < 0:
        return f"It was killed by {_signal_name(-ended.code)}; see {named}."
    return f"It ended with exit code {ended.code}: {last_line(log_file)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
