"""Which jobs are started, when, how often, and what a failure takes with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from run_jobs import compress_job, score_job

from streamline_bench.runs.execution import scheduler as scheduler_module
from streamline_bench.runs.execution.processes import Ended
from streamline_bench.runs.execution.scheduler import Grouping, JobState, Scheduler
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job, count_attempt, write_done, write_failed
from streamline_bench.runs.jobs.score import ScoreJob

Script = Callable[[RunPaths, Job, int], Ended]


class Scripted:
    """An executor whose jobs end at once, in the way a script says."""

    def __init__(self, script: Script, room: int = 1) -> None:
        self.script = script
        self.room = room
        self.started: list[tuple[str, ...]] = []
        self._waiting: list[tuple[RunPaths, Job]] = []

    def has_room(self, kind: str) -> bool:
        return len(self._waiting) < self.room

    def at_once(self, kind: str) -> int:
        return 1

    def submit(self, run: RunPaths, unit: Job) -> None:
        self.started.append(tuple(job.name for job in unit.parts))
        self._waiting.append((run, unit))

    def ended(self, timeout: float) -> list[Ended]:
        found = []
        while self._waiting:
            run, unit = self._waiting.pop(0)
            number = self.started.count(tuple(job.name for job in unit.parts))
            found.append(self.script(run, unit, number))
        return found

    def stop(self) -> None:
        self._waiting.clear()


def succeed(run: RunPaths, unit: Job, number: int = 1) -> Ended:
    """Every job of the unit leaves its marker."""
    for job in unit.parts:
        count_attempt(run, job.name)
        write_done(run, job.name, key=job.key, seconds=1, products=[])
    return Ended(unit.name, 0)


def _jobs(**changes: bool) -> list[Job]:
    compress = [compress_job(label) for label in "ab"]
    return [*compress, *(score_job(label, **changes) for label in ("dense", "a", "b"))]


def _asked(run: Path, name: str) -> dict[str, Any]:
    """The job as its process read it."""
    asked: dict[str, Any] = json.loads((RunPaths(run).job(name) / "job.json").read_text())
    return asked


def _do(
    run: Path,
    jobs: list[Job],
    executor: Scripted,
    *,
    retries: int = 2,
    one_process: bool = True,
) -> Mapping[str, JobState]:
    seen: list[int] = []
    scheduler = Scheduler(
        RunPaths(run),
        executor,
        retries=retries,
        one_process=one_process,
        watch=lambda states: seen.append(len(states)),
    )
    scheduler.do(jobs)
    assert seen
    return scheduler.states


def _statuses(states: Mapping[str, JobState]) -> dict[str, str]:
    return {name: state.status for name, state in states.items()}


def test_every_job_runs_once_and_after_what_it_needs(tmp_path: Path) -> None:
    executor = Scripted(succeed)
    states = _do(tmp_path, _jobs(), executor)
    assert set(_statuses(states).values()) == {"done"}
    order = [names[0] for names in executor.started]
    assert len(order) == len(set(order)) == 5
    for label in "ab":
        assert order.index(f"compress-{label}") < order.index(f"score-{label}")


def test_what_is_done_is_kept(tmp_path: Path) -> None:
    _do(tmp_path, _jobs(), Scripted(succeed))
    executor = Scripted(succeed)
    states = _do(tmp_path, _jobs(), executor)
    assert set(_statuses(states).values()) == {"kept"}
    assert executor.started == []
    new = {"key": "new"}
    changed = [job.model_copy(update=new) if job.name == "score-a" else job for job in _jobs()]
    states = _do(tmp_path, changed, executor)
    assert executor.started == [("score-a",)]


def test_hidden_states_are_kept_while_a_row_waits_for_them(tmp_path: Path) -> None:
    """Rows a and b are trained on the same states, c on others; what is left of old runs goes."""
    folder = RunPaths(tmp_path).states
    names = {"a": "first", "b": "first", "c": "second"}
    jobs = [compress_job(label, states=name) for label, name in names.items()]
    (folder / "old").mkdir(parents=True)
    seen: dict[str, set[str]] = {}

    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        (folder / names[unit.labels[0]]).mkdir(exist_ok=True)
        seen[unit.labels[0]] = {path.name for path in folder.iterdir()}
        return Ended(unit.name, 2) if unit.labels == ("b",) else succeed(run, unit)

    _do(tmp_path, list(jobs), Scripted(script))
    assert seen == {"a": {"old", "first"}, "b": {"first"}, "c": {"second"}}
    assert not list(folder.iterdir())


def test_a_failure_takes_only_its_own_row(tmp_path: Path) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        if unit.name != "compress-a":
            return succeed(run, unit)
        write_failed(run, unit.name, key="ca", reason="No such layer.")
        return Ended(unit.name, 2)

    executor = Scripted(script)
    states = _do(tmp_path, _jobs(), executor)
    assert _statuses(states) == {
        "compress-a": "failed",
        "compress-b": "done",
        "score-dense": "done",
        "score-a": "skipped",
        "score-b": "done",
    }
    assert states["score-a"].reason == states["compress-a"].reason == "No such layer."
    assert executor.started.count(("compress-a",)) == 1
    # Asked again, only what failed is tried again.
    again = Scripted(succeed)
    assert set(_statuses(_do(tmp_path, _jobs(), again)).values()) == {"kept", "done"}
    assert again.started == [("compress-a",), ("score-a",)]


@pytest.mark.parametrize("code", [-9, None])
def test_a_lost_process_is_started_again(tmp_path: Path, code: int | None) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        if unit.name == "compress-a" and number == 1:
            return Ended(unit.name, code)
        return succeed(run, unit)

    executor = Scripted(script)
    states = _do(tmp_path, _jobs(), executor)
    assert set(_statuses(states).values()) == {"done"}
    assert executor.started.count(("compress-a",)) == 2


def test_but_not_for_ever(tmp_path: Path) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        return Ended(unit.name, -9) if unit.name == "compress-a" else succeed(run, unit)

    executor = Scripted(script)
    states = _do(tmp_path, _jobs(), executor, retries=3)
    assert executor.started.count(("compress-a",)) == 4
    assert states["compress-a"].reason is not None
    assert "SIGKILL" in states["compress-a"].reason


def test_a_process_that_says_nothing_is_quoted_from_its_log(tmp_path: Path) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        if unit.name != "compress-a":
            return succeed(run, unit)
        run.log(unit.name).write_text("first\nImportError: no torch\n\n", encoding="utf-8")
        return Ended(unit.name, 1)

    states = _do(tmp_path, _jobs(), Scripted(script))
    assert states["compress-a"].reason == "It ended with exit code 1: ImportError: no torch"


def test_an_old_failure_does_not_explain_a_new_one(tmp_path: Path) -> None:
    RunPaths(tmp_path).make_job("compress-a")
    write_failed(RunPaths(tmp_path), "compress-a", key="ca", reason="The old reason.")
    states = _do(tmp_path, _jobs(), Scripted(lambda run, unit, number: Ended(unit.name, -15)))
    assert states["compress-a"].reason is not None
    assert "SIGTERM" in states["compress-a"].reason


def test_a_result_that_is_there_counts_whatever_the_exit_code(tmp_path: Path) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        succeed(run, unit)
        return Ended(unit.name, -9)

    assert set(_statuses(_do(tmp_path, _jobs(), Scripted(script))).values()) == {"done"}


def test_rows_are_scored_together_once_all_are_compressed(tmp_path: Path) -> None:
    executor = Scripted(succeed)
    _do(tmp_path, _jobs(shareable=True), executor)
    assert executor.started[-1] == ("score-dense", "score-a", "score-b")
    assert len(executor.started) == 3


@pytest.mark.parametrize("one_process", [True, False])
def test_a_row_that_shares_nothing_does_not_wait_for_rows_still_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: bool
) -> None:
    def groups(
        run: RunPaths, jobs: list[ScoreJob], *, one_process: bool, at_once: int = 1
    ) -> Grouping:
        alone = {} if one_process else {job.name: "another" for job in jobs if "-b" in job.name}
        shared = [job for job in jobs if job.name not in alone]
        return Grouping([shared, *([job] for job in jobs if job.name in alone)], alone)

    class Slow(Scripted):
        """Row ``a`` is compressed only when nothing else is left to do."""

        def ended(self, timeout: float) -> list[Ended]:
            self._waiting.sort(key=lambda waiting: waiting[1].name == "compress-a")
            run, unit = self._waiting.pop(0)
            return [self.script(run, unit, 1)]

    monkeypatch.setattr(scheduler_module, "groups_of", groups)
    executor = Slow(succeed, room=2)
    states = _do(tmp_path, _jobs(shareable=True), executor, one_process=one_process)
    assert set(_statuses(states).values()) == {"done"}
    scored = executor.started[2:]
    if one_process:
        assert scored == [("score-dense", "score-a", "score-b")]
    else:
        assert scored == [("score-b",), ("score-dense", "score-a")]
        assert _asked(tmp_path, "score-b")["alone"] == "another"


def test_a_row_that_could_not_be_compressed_is_left_out(tmp_path: Path) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        return Ended(unit.name, 1) if unit.name == "compress-a" else succeed(run, unit)

    executor = Scripted(script)
    states = _do(tmp_path, _jobs(shareable=True), executor)
    assert executor.started[-1] == ("score-dense", "score-b")
    assert states["score-a"].status == "skipped"


@pytest.mark.parametrize("code", [2, -9])
def test_rows_whose_common_process_fails_are_scored_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        return Ended(unit.name, code) if len(unit.parts) > 1 else succeed(run, unit)

    executor = Scripted(script)
    states = _do(tmp_path, _jobs(shareable=True), executor)
    assert set(_statuses(states).values()) == {"done"}
    assert executor.started[2:] == [
        ("score-dense", "score-a", "score-b"),
        ("score-dense",),
        ("score-a",),
        ("score-b",),
    ]
    said = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in said] == ["dense", "a", "b"]
    assert "is done alone" in said[0]
    assert _asked(tmp_path, "score-a")["alone"].startswith("its common process failed: It ")


def test_a_common_process_whose_machine_is_lost_is_started_again(tmp_path: Path) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        lost = len(unit.parts) > 1 and number == 1
        return Ended(unit.name, None) if lost else succeed(run, unit)

    executor = Scripted(script)
    _do(tmp_path, _jobs(shareable=True), executor)
    assert executor.started[2:] == [("score-dense", "score-a", "score-b")] * 2


def test_a_row_that_fails_in_company_is_not_scored_alone(tmp_path: Path) -> None:
    def script(run: RunPaths, unit: Job, number: int) -> Ended:
        if len(unit.parts) == 1:
            return succeed(run, unit)
        for job in unit.parts:
            if job.name != "score-a":
                succeed(run, job)
        write_failed(run, "score-a", key="sa", reason="A log-likelihood is NaN.")
        return Ended(unit.name, 0)

    executor = Scripted(script)
    states = _do(tmp_path, _jobs(shareable=True), executor)
    assert states["score-a"].status == "failed"
    assert states["score-a"].reason == "A log-likelihood is NaN."
    assert len(executor.started) == 3


def test_only_missing_rows_are_scored_together_after_an_interruption(tmp_path: Path) -> None:
    jobs = _jobs(shareable=True)
    _do(tmp_path, jobs, Scripted(succeed))
    for name in ("score-a", "score-b"):
        (RunPaths(tmp_path).job(name) / "done.json").unlink()
    executor = Scripted(succeed)
    _do(tmp_path, jobs, executor)
    assert executor.started == [("score-a", "score-b")]


def test_what_dense_shares_decides_also_where_it_has_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reasons name the dense row, whichever rows are left after an interruption."""
    asked: list[list[str]] = []

    def groups(
        run: RunPaths, jobs: list[ScoreJob], *, one_process: bool, at_once: int = 1
    ) -> Grouping:
        asked.append([job.name for job in jobs])
        return Grouping([[job] for job in jobs], {job.name: "another" for job in jobs[1:]})

    jobs = _jobs(shareable=True)
    for name in ("compress-a", "compress-b", "score-dense"):
        RunPaths(tmp_path).make_job(name)
        key = next(job.key for job in jobs if job.name == name)
        write_done(RunPaths(tmp_path), name, key=key, seconds=1, products=[])
    monkeypatch.setattr(scheduler_module, "groups_of", groups)
    executor = Scripted(succeed)
    _do(tmp_path, jobs, executor, one_process=False)
    assert asked == [["score-dense", "score-a", "score-b"]]
    assert executor.started == [("score-a",), ("score-b",)]


def test_the_only_row_of_a_run_is_not_said_to_be_alone(tmp_path: Path) -> None:
    _do(tmp_path, [score_job("dense", shareable=True)], Scripted(succeed))
    assert _asked(tmp_path, "score-dense")["alone"] is None
