"""Shows a run on stderr: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from streamline_bench.core.machine.environment import a_few, printable
from streamline_bench.runs.execution.scheduler import JobState
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import last_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Watch = Callable[[Mapping[str, JobState]], None]

SILENCE = 60.0
"""Seconds without a line after which the running jobs are printed (without a terminal)."""


@contextmanager
def watching(run: RunPaths, *, quiet: bool, title: str) -> Iterator[Watch]:
    """Yield what the scheduler calls with the state of every job; ``quiet`` shows nothing."""
    if quiet:
        yield lambda states: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainLines(console, run)
        return
    from rich.live import Live

    with Live(console=console, refresh_per_second=2, transient=True) as live:
        clock = _Clock()
        yield lambda states: live.update(_table(states, title, clock))


class PlainLines:
    """One line whenever a job starts or ends, and one a minute while nothing else happens."""

    def __init__(self, console: Console, run: RunPaths) -> None:
        self._console = console
        self._run = run
        self._seen: dict[str, str] = {}
        self._clock = _Clock()
        self._spoke = time.monotonic()

    def __call__(self, states: Mapping[str, JobState]) -> None:
        """Print what changed since the last call."""
        self._clock.look(states)
        kept = [name for name, state in states.items() if state.status == "kept"]
        if fresh := [name for name in kept if name not in self._seen]:
            self._seen.update(dict.fromkeys(fresh, "kept"))
            self._print(f"{len(fresh)} of {len(states)} jobs are kept from before")
        for name, state in states.items():
            if self._seen.get(name, "waiting") != state.status:
                self._seen[name] = state.status
                self._print(_line(state, states, self._clock))
        if time.monotonic() - self._spoke >= SILENCE:
            self._say_what_runs(states)

    def _say_what_runs(self, states: Mapping[str, JobState]) -> None:
        """One line for each process: how long it has run, the end of its log, what is left."""
        running = [state for state in states.values() if state.status == "running"]
        for process in dict.fromkeys(state.process or state.job.name for state in running):
            theirs = [state for state in running if process in (state.process, state.job.name)]
            names = a_few([printable(state.job.name) for state in theirs])
            span = _span(self._clock.seconds(theirs[0]))
            step = printable(last_line(self._run.log(process)))
            self._print(f"{names}: {span}, {step} ({_counted(states, self._clock)})")

    def _print(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Clock:
    """When jobs started, by the monotonic clock; what is left, by the mean of those that ended."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._started: dict[str, float] = {}

    def look(self, states: Mapping[str, JobState]) -> None:
        for name, state in states.items():
            if state.status == "running":
                self._started.setdefault(name, time.monotonic())
            elif state.status == "waiting":
                self._started.pop(name, None)

    def seconds(self, state: JobState) -> float | None:
        if state.done is not None:
            return state.done.seconds
        started = self._started.get(state.job.name)
        running = state.status == "running"
        return time.monotonic() - started if running and started is not None else None

    def total(self) -> float:
        return time.monotonic() - self._begin

    def left(self, states: Mapping[str, JobState]) -> float | None:
        """Seconds left, from what jobs of the same kind took, with the workers busy now."""
        took: dict[str, list[float]] = {}
        for state in states.values():
            if state.done is not None:
                took.setdefault(state.job.kind, []).append(state.done.seconds)
        open_jobs = [state for state in states.values() if not state.ended]
        if any(state.job.kind not in took for state in open_jobs):
            return None
        together: dict[str, list[JobState]] = {}
        for state in open_jobs:
            process = state.process if state.status == "running" else None
            together.setdefault(process or state.job.name, []).append(state)
        waiting = 0.0
        for same in together.values():
            means = [statistics.fmean(took[state.job.kind]) for state in same]
            waiting += max(0.0, sum(means) - (self.seconds(same[0]) or 0.0))
        busy = sum(same[0].status == "running" for same in together.values())
        return waiting / max(1, busy)


def _counted(states: Mapping[str, JobState], clock: _Clock) -> str:
    ended = sum(state.ended for state in states.values())
    text = f"{ended} of {len(states)} jobs, {_span(clock.total())}"
    left = clock.left(states)
    return f"{text}, about {_span(left)} left" if left is not None and left > 1 else text


def _line(state: JobState, states: Mapping[str, JobState], clock: _Clock) -> str:
    name = printable(state.job.name)
    seconds = clock.seconds(state)
    if state.status == "running":
        return f"{name}: started" + (f", attempt {state.tries}" if state.tries > 1 else "")
    if state.status in ("failed", "skipped"):
        return f"{name}: {state.status}: {printable(state.reason)}"
    took = f" in {_span(seconds)}" if seconds is not None and state.status == "done" else ""
    words = {"done": "done", "waiting": "lost, will be tried again",
             "same": f"the same weights as {printable(state.twin or '')}"}  # fmt: skip
    how = ""
    if state.done is not None and state.done.facts.together:
        how = f", one walk of {len(state.done.facts.together)} models"
    elif state.done is not None and state.done.facts.alone:
        how = f", by itself: {printable(state.done.facts.alone)}"
    return f"{name}: {words[state.status]}{took}{how} ({_counted(states, clock)})"


def _table(states: Mapping[str, JobState], title: str, clock: _Clock) -> Table:
    from rich.table import Table
    from rich.text import Text

    clock.look(states)
    kinds = list(dict.fromkeys(state.job.kind for state in states.values()))
    table = Table(title=printable(title), caption=_counted(states, clock))
    table.add_column("row")
    for kind in kinds:
        table.add_column(kind)
    rows: dict[str, dict[str, str]] = {}
    # In the order of the scoring, which every row has; only some are compressed.
    for state in sorted(states.values(), key=lambda state: state.job.kind != "score"):
        for label in state.job.labels or (state.job.name,):
            rows.setdefault(label, {})[state.job.kind] = _cell(state, clock)
    for label, cells in rows.items():
        shown = (label, *(cells.get(kind, "") for kind in kinds))
        table.add_row(*(Text(printable(each)) for each in shown))
    return table


def _cell(state: JobState, clock: _Clock) -> str:
    seconds = clock.seconds(state)
    span = f" {_span(seconds)}" if seconds is not None else ""
    if state.status == "failed":
        return f"failed: {(state.reason or '')[:40]}"
    return f"{state.status}{span}"


def _span(seconds: float | None) -> str:
    whole = round(seconds or 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
