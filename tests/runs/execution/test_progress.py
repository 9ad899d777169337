"""What is shown of a run: a line per change, a table in a terminal, nothing when quiet."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from run_jobs import compress_job, measure_job, score_job

from streamline_bench.runs.execution.progress import PlainLines, watching
from streamline_bench.runs.execution.scheduler import JobState
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Done

HOSTILE = "[red]\x1b[31mbad[/red]"


def _done(seconds: float, **facts: object) -> Done:
    return Done(key="k", seconds=seconds, attempts=1, files={}, facts=facts)


@pytest.fixture
def states() -> dict[str, JobState]:
    """Two jobs that wait."""
    jobs = [score_job(x) for x in "ab"]
    return {job.name: JobState(job) for job in jobs}


def _lines(show: PlainLines, states: dict[str, JobState], stream: io.StringIO) -> list[str]:
    before = stream.tell()
    show(states)
    return stream.getvalue()[before:].splitlines()


def test_a_line_for_every_change_and_none_between(states: dict[str, JobState]) -> None:
    stream = io.StringIO()
    show = PlainLines(Console(file=stream, width=200), RunPaths(Path()))
    a, b = states.values()
    assert _lines(show, states, stream) == []
    a.status = "running"
    assert _lines(show, states, stream) == ["score-a: started"]
    assert _lines(show, states, stream) == []
    a.status, a.done = "done", _done(42.0)
    b.status, b.reason = "failed", HOSTILE
    first, second = _lines(show, states, stream)
    assert first.startswith("score-a: done in 42 s (2 of 2 jobs")
    assert second == "score-b: failed: [red]\ufffd[31mbad[/red]"


def test_what_is_kept_is_one_line(states: dict[str, JobState]) -> None:
    stream = io.StringIO()
    show = PlainLines(Console(file=stream, width=200), RunPaths(Path()))
    for state in states.values():
        state.status, state.done = "kept", _done(1.0)
    assert _lines(show, states, stream) == ["2 of 2 jobs are kept from before"]
    assert _lines(show, states, stream) == []


def test_another_attempt_is_said(states: dict[str, JobState]) -> None:
    stream = io.StringIO()
    show = PlainLines(Console(file=stream, width=200), RunPaths(Path()))
    a = states["score-a"]
    a.status, a.tries = "running", 1
    show(states)
    a.status = "waiting"
    assert _lines(show, states, stream)[0].startswith("score-a: lost, will be tried again")
    a.status, a.tries = "running", 2
    assert _lines(show, states, stream) == ["score-a: started, attempt 2"]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"together": ["a", "b", "c"], "alone": None}, ", one walk of 3 models"),
        ({"together": [], "alone": "it shares no layer"}, ", by itself: it shares no layer"),
        ({}, "done in 1 s ("),
    ],
)
def test_company_is_said(states: dict[str, JobState], facts: dict[str, object], said: str) -> None:
    stream = io.StringIO()
    show = PlainLines(Console(file=stream, width=200), RunPaths(Path()))
    a = states["score-a"]
    a.status, a.done = "done", _done(1.0, **facts)
    assert said in _lines(show, states, stream)[0]


def test_what_is_left_comes_from_jobs_of_the_same_kind(states: dict[str, JobState]) -> None:
    stream = io.StringIO()
    show = PlainLines(Console(file=stream, width=200), RunPaths(Path()))
    a = states["score-a"]
    a.status, a.done = "done", _done(90.0)
    assert "1 of 2 jobs, 0 s, about 1:30 min left" in _lines(show, states, stream)[0]
    # Of a kind that never ran nothing is known.
    states["throughput"] = JobState(measure_job())
    b = states["score-b"]
    b.status, b.done = "done", _done(90.0)
    assert "left" not in _lines(show, states, stream)[0]


def test_a_long_job_gives_a_sign_of_life(
    states: dict[str, JobState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("streamline_bench.runs.execution.progress.time.monotonic", lambda: now[0])
    run, stream = RunPaths(tmp_path), io.StringIO()
    run.make_job("score-together-1")
    run.log("score-together-1").write_text("begun\nscan: 10%\rscan: 40%|## [01:10<01:40]\n")
    show = PlainLines(Console(file=stream, width=200), run)
    for state in states.values():
        state.status, state.process = "running", "score-together-1"
    assert len(_lines(show, states, stream)) == 2
    now[0] += 59
    assert _lines(show, states, stream) == []
    now[0] += 61
    (line,) = _lines(show, states, stream)  # one process, one line
    assert line.startswith("score-a, score-b: 2:00 min, scan: 40%|## [01:10<01:40]")
    assert "0 of 2 jobs" in line
    now[0] += 30
    assert _lines(show, states, stream) == []
    # The time of a common process is spent once: of 2 x 100 s, 180 have passed.
    alone = score_job("c")
    states[alone.name] = JobState(alone, "done", done=_done(100.0))
    now[0] += 30
    assert "1 of 3 jobs, 3:00 min, about 20 s left" in _lines(show, states, stream)[0]


def test_quiet_is_quiet(states: dict[str, JobState], capfd: pytest.CaptureFixture[str]) -> None:
    states["score-a"].status = "running"
    with watching(RunPaths(Path()), quiet=True, title="t") as watch:
        watch(states)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_table(
    states: dict[str, JobState], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()

    def console(**_: object) -> Console:
        return Console(file=stream, force_terminal=True, width=120)

    monkeypatch.setattr("rich.console.Console", console)
    states["score-a"].status, states["score-a"].done = "done", _done(3.0)
    states["score-b"] = JobState(score_job(HOSTILE), "failed", reason=HOSTILE)
    # Comes first in the run and last in the table, where its row has no score.
    states = {"compress-x": JobState(compress_job("x"), "kept", done=_done(1.0)), **states}
    with watching(RunPaths(Path()), quiet=False, title=HOSTILE) as watch:
        watch(states)
    shown = stream.getvalue()
    assert "None" not in shown
    assert shown.index(" a ") < shown.index(" x ")
    assert "done 3 s" in shown
    assert "3 of 3 jobs" in shown
    assert "\x1b[31mbad" not in shown


def test_a_row_with_the_weights_of_another_is_said(states: dict[str, JobState]) -> None:
    stream = io.StringIO()
    show = PlainLines(Console(file=stream, width=200), RunPaths(Path()))
    a, b = states.values()
    a.status, a.done = "done", _done(1.0)
    b.status, b.twin, b.done = "same", a.job.name, a.done
    assert _lines(show, states, stream)[1].startswith("score-b: the same weights as score-a")
