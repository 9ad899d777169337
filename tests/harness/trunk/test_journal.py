"""A file of answers: what is taken up again, and what a kill or a damaged disk leaves of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.errors import OutputError
from streamline_bench.harness.scoring.packing import Query
from streamline_bench.harness.trunk.journal import Journal, name_of

BATCHES = [{0: (-1.5, True), 3: (0.1 + 0.2, False)}, {1: (-1e-300, False)}, {2: (-7.0, True)}]
ALL = {index: answer for batch in BATCHES for index, answer in batch.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with three batches of answers to the queries 'a'."""
    path = tmp_path / "answers" / "row.jsonl"
    journal = Journal(path, every=0)
    for batch in BATCHES:
        journal.add("a", batch.items())
    journal.write()
    return path


def test_answers_are_those_that_were_given_to_the_last_bit(path: Path) -> None:
    journal = Journal(path)
    assert journal.known("a") == ALL
    assert journal.known("b") == {}
    journal.add("b", [(0, (-2.0, False))])
    journal.write()
    assert Journal(path).known("a") == ALL
    assert Journal(path).known("b") == {0: (-2.0, False)}


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data[:-3], 2),  # killed within a write
        (lambda data: data + b"\0" * 64, 3),  # a power cut leaves blocks of zeros
        (lambda data: data.replace(b"-1e-300", b"-2e-300"), 1),
        (lambda data: b"", 0),
        (lambda data: b"\xff\xfe" + data, 0),
    ],
)
def test_what_is_whole_is_kept_up_to_the_first_damage(
    path: Path, damage: Callable[[bytes], bytes], left: int
) -> None:
    path.write_bytes(damage(path.read_bytes()))
    journal = Journal(path, every=0)
    known = {index: answer for batch in BATCHES[:left] for index, answer in batch.items()}
    assert journal.known("a") == known
    # What comes after is written where the damage began.
    journal.add("a", BATCHES[2].items())
    journal.write()
    assert Journal(path).known("a") == {**known, **BATCHES[2]}


def test_quick_batches_do_not_wait_for_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "row.jsonl"
    journal = Journal(path, every=3600)
    journal.add("a", BATCHES[0].items())
    assert not path.exists()
    journal.write()
    assert len(path.read_bytes().splitlines()) == 1
    journal.discard()
    assert not path.exists()


def test_other_queries_or_batches_have_another_name() -> None:
    queries = [Query(0, [1, 2], [3]), Query(1, [1], [2])]
    others = [
        [Query(0, [1, 2], [3])],
        [Query(0, [1, 2], [4]), Query(1, [1], [2])],
        [Query(0, [1], [3]), Query(1, [2, 1], [2])],
        [Query(1, [1, 2], [3]), Query(0, [1], [2])],
    ]
    names = {name_of(each, 64) for each in [queries, *others]} | {name_of(queries, 32)}
    assert len(names) == 6
    assert name_of([Query(0, (1, 2), (3,)), Query(1, [1], [2])], 64) in names


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be kept in"):
        Journal(tmp_path / "file" / "row.jsonl")
