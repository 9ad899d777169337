"""A result counts only where its marker says so and every file is as it was."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from streamline_bench.errors import OutputError
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import (
    Done,
    Result,
    count_attempt,
    forget_failure,
    read_done,
    read_failed,
    write_done,
    write_failed,
)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run folder with the finished job 'j', key 'k', whose result is two files."""
    paths = RunPaths(tmp_path)
    paths.make_job("j")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "a.txt").write_text("aaaa", encoding="utf-8")
    (tmp_path / "out" / "deep" / "b.txt").write_text("bbbb", encoding="utf-8")
    count_attempt(paths, "j")
    count_attempt(paths, "j")
    write_done(paths, "j", key="k", seconds=1.5, products=[tmp_path / "out"], result=Result("c"))
    return paths


def test_it_says_what_was_done(run: RunPaths) -> None:
    done = read_done(run, "j", "k")
    assert isinstance(done, Done)
    assert (done.seconds, done.attempts, done.command) == (1.5, 2, "c")
    assert sorted(done.files) == ["out/a.txt", "out/deep/b.txt"]


def test_another_key_is_another_result(run: RunPaths) -> None:
    assert read_done(run, "j", "other") is None


@pytest.mark.parametrize("damage", ["truncate", "change", "delete", "folder"])
def test_a_damaged_result_is_not_taken_for_whole(run: RunPaths, damage: str) -> None:
    path = run.root / "out" / "deep" / "b.txt"
    if damage == "truncate":
        path.write_text("bb", encoding="utf-8")
    elif damage == "change":
        path.write_text("bbbB", encoding="utf-8")
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    assert read_done(run, "j", "k") is None


def test_foreign_files_beside_the_result_do_not_matter(run: RunPaths) -> None:
    (run.root / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    assert read_done(run, "j", "k") is not None


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"key": "k"}', "\x00"])
def test_a_damaged_marker_is_no_marker(run: RunPaths, text: str) -> None:
    (run.job("j") / "done.json").write_text(text, encoding="utf-8")
    assert read_done(run, "j", "k") is None
    (run.job("j") / "failed.json").write_text(text, encoding="utf-8")
    assert read_failed(run, "j", "k") is None


def test_a_marker_of_another_release_counts_as_absent(run: RunPaths) -> None:
    write_failed(run, "j", key="k", reason="why")
    for name, read in (("done.json", read_done), ("failed.json", read_failed)):
        path = run.job("j") / name
        marker = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**marker, "schema_version": 2}), encoding="utf-8")
        assert read(run, "j", "k") is None
        path.write_text(json.dumps({**marker, "schema_version": 1}), encoding="utf-8")
        assert read(run, "j", "k") is not None


@pytest.mark.parametrize("text", ["", "x", "-3", '"7"'])
def test_damaged_counts_start_again(run: RunPaths, text: str) -> None:
    (run.job("j") / "attempts.json").write_text(text, encoding="utf-8")
    assert count_attempt(run, "j") == 1


def test_a_failure_is_replaced_by_success_and_can_be_forgotten(run: RunPaths) -> None:
    write_failed(run, "j", key="k", reason="why")
    found = read_failed(run, "j", "k")
    assert found is not None
    assert (found.reason, found.attempts) == ("why", 2)
    assert read_failed(run, "j", "other") is None
    write_done(run, "j", key="k", seconds=0, products=[run.root / "out"])
    assert read_failed(run, "j", "k") is None
    write_failed(run, "j", key="k", reason="why")
    forget_failure(run, "j")
    forget_failure(run, "j")
    assert read_failed(run, "j", "k") is None


def test_a_clock_that_goes_back_gives_no_negative_duration(run: RunPaths) -> None:
    write_done(run, "j", key="k", seconds=-5, products=[run.root / "out"])
    done = read_done(run, "j", "k")
    assert done is not None
    assert done.seconds == 0


def test_files_dated_in_the_future_are_whole_or_not_by_their_content(run: RunPaths) -> None:
    write_done(run, "j", key="k", seconds=1, products=[run.root / "out"])
    future = time.mktime((2099, 1, 1, 0, 0, 0, 0, 0, 0))
    for path in [*(run.root / "out").iterdir(), run.job("j") / "done.json"]:
        os.utime(path, (future, future))
    assert read_done(run, "j", "k") is not None


def test_a_note_that_cannot_be_removed_is_one_sentence(run: RunPaths) -> None:
    (run.job("j") / "failed.json").mkdir()
    with pytest.raises(OutputError, match=r"failed\.json cannot be removed"):
        write_done(run, "j", key="k", seconds=1, products=[run.root / "out"])
