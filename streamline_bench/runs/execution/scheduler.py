"""Runs a graph of jobs: what is done is kept, what failed takes only its own rows with it."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streamline_bench.core.machine.environment import printable
from streamline_bench.runs.execution.executor import Ended, Executor, Unit
from streamline_bench.runs.execution.grouping import groups_of, together_payload, unit_of
from streamline_bench.runs.jobs.graph import Job
from streamline_bench.runs.jobs.marker import Done, forget_failure, read_done, read_failed
from streamline_bench.runs.jobs.score_job import last_line
from streamline_bench.runs.jobs.worker import write_job
from streamline_bench.runs.planning.plan import digest

__all__ = ["JobState", "Scheduler", "Status"]

log = logging.getLogger(__name__)

Status = Literal["waiting", "running", "done", "kept", "failed", "skipped"]
"""``kept``: an earlier run did it; ``skipped``: a job it needs failed."""

ENDED: frozenset[Status] = frozenset({"done", "kept", "failed", "skipped"})


@dataclass
class JobState:
    """Where a job stands.

    Attributes:
        tries: attempts in this run of the command.
        reason: why it failed or was skipped.
        done: its marker, once it is there.
    """

    job: Job
    status: Status = "waiting"
    tries: int = 0
    reason: str | None = None
    done: Done | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.status in ENDED

    @property
    def succeeded(self) -> bool:
        """Its result is there and whole."""
        return self.status in ("done", "kept")


class Scheduler:
    """Runs the jobs of one run folder that have no result yet.

    A process that was killed, or whose machine was lost, is started again up to ``retries`` times;
    a job that ended with an error is not. Rows whose common process fails as a whole are scored
    alone.

    Attributes:
        states: where every job stands.
    """

    def __init__(
        self,
        run: Path,
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
        self._units: dict[str, Unit] = {}
        self._tries: Counter[str] = Counter()
        self._alone: dict[str, str | None] = {}
        self._looked_at: set[str] = set()

    def do(self, jobs: Sequence[Job]) -> None:
        """Run these jobs; return when all have ended. ``watch`` is called all the while.

        Raises:
            OutputError: the run folder cannot be written.
        """
        for job in jobs:
            done = read_done(self._run, job.name, job.key)
            self.states[job.name] = JobState(job, "waiting" if done is None else "kept", done=done)
        while not all(state.ended for state in self.states.values()):
            self._skip_hopeless()
            self._start_ready()
            self._watch(self.states)
            for ended in self._executor.ended(0.5):
                self._settle(self._units.pop(ended.name), ended)
        self._watch(self.states)

    def _skip_hopeless(self) -> None:
        for state in self.states.values():
            needed = (self.states[name] for name in state.job.needs)
            lost = next((each for each in needed if each.ended and not each.succeeded), None)
            if state.status == "waiting" and lost is not None:
                state.status, state.reason = "skipped", lost.reason

    def _start_ready(self) -> None:
        waiting = [state for state in self.states.values() if state.status == "waiting"]
        together = [state.job for state in waiting if self._is_shareable(state.job)]
        for state in waiting:
            if self._executor.has_room() and state.job not in together and self._ready(state.job):
                self._start(unit_of([state.job]))
        if all(map(self._ready, together)):
            if together and self._executor.has_room():
                self._start_together(together)
        elif not self._one_process:
            self._start_strangers(filter(self._ready, together))

    def _is_shareable(self, job: Job) -> bool:
        return job.shareable and job.name not in self._alone

    def _ready(self, job: Job) -> bool:
        return all(self.states[name].succeeded for name in job.needs)

    def _start_together(self, jobs: list[Job]) -> None:
        # Dense may have its result already; what the others share is told in comparison with it.
        dense = self._dense()
        among = [dense, *(job for job in jobs if job is not dense)]
        found = groups_of(self._run, among, one_process=self._one_process)
        # Started with the other single jobs as soon as there is room.
        self._alone.update(found.alone)
        for group in ([job for job in group if job in jobs] for group in found.groups):
            if len(group) == 1:
                self._alone.setdefault(group[0].name, self._left_over())
            elif group and self._executor.has_room():
                self._start(unit_of(group))

    def _start_strangers(self, jobs: Iterable[Job]) -> None:
        """Score what shares nothing with the dense row, while other rows are still compressed."""
        dense = self._dense()
        for job in jobs:
            if job is dense or job.name in self._looked_at:
                continue
            if not self._executor.has_room():
                return
            self._looked_at.add(job.name)
            why = groups_of(self._run, [dense, job], one_process=False).alone.get(job.name)
            if why is not None:
                self._alone[job.name] = why
                self._start(unit_of([job]))

    def _dense(self) -> Job:
        return next(s.job for s in self.states.values() if s.job.shareable and not s.job.needs)

    def _left_over(self) -> str | None:
        """Why a row that could share layers has no company; of a run's only row, nothing."""
        rows = sum(state.job.shareable for state in self.states.values())
        return "no other row was left to score it with" if rows > 1 else None

    def _start(self, unit: Unit) -> None:
        for job in unit.jobs:
            why = self._alone.get(job.name)
            payload = {**job.payload, **({} if why is None else {"alone": why})}
            write_job(self._run, job.name, job.kind, job.key, payload)
            forget_failure(self._run, job.name)
            self.states[job.name].status = "running"
            self.states[job.name].tries += 1
        if len(unit.jobs) > 1:
            key = digest(["together", [job.key for job in unit.jobs]])
            write_job(self._run, unit.name, "together", key, together_payload(unit.jobs))
        self._executor.submit(self._run, unit)
        self._units[unit.name] = unit
        self._tries[unit.name] += 1

    def _settle(self, unit: Unit, ended: Ended) -> None:
        for job in unit.jobs:
            state = self.states[job.name]
            # It may have been killed after its last write; what counts is that the result is whole.
            state.done = read_done(self._run, job.name, job.key)
            failed = read_failed(self._run, job.name, job.key)
            if state.done is not None:
                state.status = "done"
            elif failed is not None:
                state.status, state.reason = "failed", failed.reason
            elif self._is_worth_repeating(unit, ended):
                state.status = "waiting"
            elif len(unit.jobs) > 1:
                state.status = "waiting"
                why = _reason(self._run, unit, ended)
                self._alone[job.name] = f"its common process failed: {why}"
                log.warning(
                    "%s is scored alone, because its common process failed: %s",
                    job.labels[0],
                    printable(why),
                )
            else:
                state.status, state.reason = "failed", _reason(self._run, unit, ended)

    def _is_worth_repeating(self, unit: Unit, ended: Ended) -> bool:
        # What is killed by a signal is most often short of memory, which several models need most.
        killed_together = len(unit.jobs) > 1 and ended.code is not None
        return ended.lost and not killed_together and self._tries[unit.name] <= self._retries


def _reason(run: Path, unit: Unit, ended: Ended) -> str:
    told = f"jobs/{unit.name}/log.txt"
    if ended.reason:
        return ended.reason
    if ended.code is None:
        return f"Its worker was lost; see {told}."
    if ended.code < 0:
        return f"It was killed by {_signal_name(-ended.code)}; see {told}."
    return f"It ended with exit code {ended.code}: {last_line(run / told)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
