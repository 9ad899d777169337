"""Runs a graph of jobs: what is done is kept, what failed takes only its own rows with it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from streamline_bench.runs.executor import Ended, Executor
from streamline_bench.runs.folder import job_folder
from streamline_bench.runs.jobs import Job
from streamline_bench.runs.marker import Done, read_done, read_failed
from streamline_bench.runs.score_job import last_line
from streamline_bench.runs.work import write_job

__all__ = ["JobState", "Status", "run_jobs"]

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


def run_jobs(
    run: Path,
    jobs: Sequence[Job],
    executor: Executor,
    *,
    retries: int,
    watch: Callable[[Mapping[str, JobState]], None],
) -> dict[str, JobState]:
    """Run every job whose result is not there yet.

    A job whose process was killed, or whose machine was lost, is started again up to ``retries``
    times; one that ended with an error is not. However this ends, no job is left running.

    Args:
        watch: called about twice a second, and after every change.

    Raises:
        OutputError: the run folder cannot be written.
    """
    states = {job.name: JobState(job) for job in jobs}
    for state in states.values():
        state.done = read_done(run, state.job.name, state.job.key)
        if state.done is not None:
            state.status = "kept"
    try:
        watch(states)
        while not all(state.ended for state in states.values()):
            _start_ready(run, states, executor)
            watch(states)
            for ended in executor.ended(0.5):
                _settle(run, states[ended.name], ended, retries)
        watch(states)
    finally:
        executor.stop()
    return states


def _start_ready(run: Path, states: Mapping[str, JobState], executor: Executor) -> None:
    for state in states.values():
        if state.status != "waiting":
            continue
        needed = [states[name] for name in state.job.needs]
        lost = next((each for each in needed if each.ended and not each.succeeded), None)
        if lost is not None:
            state.status, state.reason = "skipped", lost.reason
        elif (
            all(each.succeeded for each in needed)
            and all(states[name].ended for name in state.job.after)
            and executor.has_room()
        ):
            job = state.job
            write_job(run, job.name, job.kind, job.key, job.payload)
            executor.submit(run, job)
            state.status = "running"
            state.tries += 1


def _settle(run: Path, state: JobState, ended: Ended, retries: int) -> None:
    job = state.job
    state.done = read_done(run, job.name, job.key)
    if state.done is not None:
        # It may have been killed after its last write; what counts is that the result is whole.
        state.status = "done"
    elif ended.lost and state.tries <= retries:
        state.status = "waiting"
    else:
        state.status, state.reason = "failed", _reason(run, job, ended)


def _reason(run: Path, job: Job, ended: Ended) -> str:
    if ended.reason:
        return ended.reason
    if ended.code is None:
        return f"Its worker was lost; see jobs/{job.name}/log.txt."
    if ended.code < 0:
        return f"It was killed by {_signal_name(-ended.code)}; see jobs/{job.name}/log.txt."
    failed = read_failed(run, job.name, job.key)
    if failed is not None:
        return failed.reason
    words = last_line(job_folder(run, job.name) / "log.txt")
    return f"It ended with exit code {ended.code}: {words}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
