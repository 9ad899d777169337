"""Blocks start every process anew; when they end, and what a failure in one of them leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput import Setup, Workload, blocks, measure, read_record
from streamline_bench.throughput.blocks import Blocks, measure_blocks
from streamline_bench.throughput.process import WorkerError
from streamline_bench.throughput.record import Round
from streamline_bench.throughput.sweep import Contender, Measured, RunningModel

FakeModel = Callable[..., Path]
WORK = Workload(batch_sizes=(1, 8), rounds=2, warmup_rounds=1)


class _Plain:
    sized_at_load = False


@dataclass
class Stub:
    """A model without a process: ``fails`` maps (start, batch) to what is raised there."""

    label: str
    diary: list[str]
    fails: dict[tuple[int, int], WorkerError] = field(default_factory=dict)
    engine = _Plain
    starts: int = 0

    def __post_init__(self) -> None:
        self.contender = Contender(self.label, self.label, None, None)

    def start(self) -> None:
        self.starts += 1
        self.diary.append(f"+{self.label}")
        if (self.starts, 0) in self.fails:
            self.contender.failure = self.fails[self.starts, 0].reason

    def round(self, batch: int, workload: Workload, index: int) -> tuple[Round, int]:
        self.diary.append(self.label)
        if (self.starts, batch) in self.fails:
            raise self.fails[self.starts, batch]
        numbers = {"requests": batch, "prompt_tokens": 1, "output_tokens": 1}
        return Round(index=index, seconds=1, cpu_seconds=1, **numbers), self.starts  # type: ignore[arg-type]

    def hang_up(self) -> None:
        self.diary.append(f"-{self.label}")

    def close(self) -> None:
        pass


def run(
    stubs: Sequence[Stub],
    workload: Workload = WORK,
    widths: Iterator[float] | None = None,
    one_at_a_time: bool = False,
) -> Blocks:
    return measure_blocks(
        cast("list[RunningModel]", stubs),
        workload,
        one_at_a_time=one_at_a_time,
        half_width=lambda _: next(widths or itertools.repeat(1.0)),
        advance=lambda: None,
    )


def numbers(point: Measured) -> list[tuple[int, int]]:
    return [(found.block, found.index) for found in point.rounds]


def test_every_block_starts_every_model_in_an_order_of_its_own() -> None:
    orders = set()
    for seed in (0, 0, 1):
        diary: list[str] = []
        stubs = [Stub(name, diary) for name in "abcd"]
        work = WORK.model_copy(update={"blocks": 6, "seed": seed})
        found = run(stubs, work)
        assert (found.done, found.stopped) == (6, None)
        assert [stub.starts for stub in stubs] == [6] * 4
        begun = "".join(entry for entry in diary if entry[0] == "+").replace("+", "")
        parts = [begun[place : place + 4] for place in range(0, 24, 4)]
        assert all(sorted(part) == list("abcd") for part in parts) and len(set(parts)) > 2
        orders.add(begun)
        for points in found.points.values():
            expected = [(block, index) for block in range(6) for index in range(2)]
            assert [numbers(point) for point in points] == [expected] * 2
            assert points[0].peak_memory_bytes == 6, "the largest of all blocks"
    assert len(orders) == 2, "the seed decides"


def test_one_at_a_time_ends_each_model_before_the_next() -> None:
    diary: list[str] = []
    run([Stub(name, diary) for name in "ab"], one_at_a_time=True)
    open_ones: set[str] = set()
    for entry in diary:
        if entry[0] == "+":
            open_ones.add(entry[1:])
        elif entry[0] == "-":
            open_ones.discard(entry[1:])
        assert len(open_ones) <= 1


def test_it_goes_on_until_it_was_precise_three_times_in_a_row() -> None:
    work = WORK.model_copy(update={"blocks": 2, "until_precision": 0.02})
    widths = [9, 0.01, 0.01, 0.03, 0.01, 0.01, 0.01, 9]
    assert run([Stub("a", [])], work, iter(widths)).done == 7
    work = work.model_copy(update={"blocks": 5})
    assert run([Stub("a", [])], work, itertools.repeat(0.01)).done == 5, "the fewest"


def test_a_precision_that_is_never_reached_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST_BLOCKS", 4)
    found = run([Stub("a", [])], WORK.model_copy(update={"until_precision": 0.02}))
    assert found.done == 4
    assert found.stopped is not None and "0.02" in found.stopped and "4 blocks" in found.stopped


def test_no_block_is_started_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=20)  # each look at the clock is 20 seconds later
    monkeypatch.setattr(
        "streamline_bench.throughput.blocks.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    work = WORK.model_copy(update={"blocks": 9, "minutes": 2})
    found = run([Stub("a", [])], work)
    assert found.done == 3  # 120 s have passed
    assert found.stopped is not None and "2 minutes" in found.stopped and "9" in found.stopped


def test_a_model_that_fails_in_a_later_block_keeps_what_it_had_measured_there() -> None:
    diary: list[str] = []
    bad = Stub("bad", diary, {(2, 8): WorkerError("it died")})
    found = run([Stub("dense", diary), bad])
    first, second = found.points["bad"]
    assert first.reason is None and {block for block, _ in numbers(first)} == {0, 1}
    assert second.reason == "it died" and {block for block, _ in numbers(second)} == {0}
    assert bad.starts == 2, "no third start"
    assert all(len(point.rounds) == 6 for point in found.points["dense"])


def test_a_model_that_does_not_start_again_is_failed_at_every_point() -> None:
    found = run([Stub("dense", []), Stub("bad", [], {(3, 0): WorkerError("never ready")})])
    assert [point.reason for point in found.points["bad"]] == ["never ready"] * 2
    assert all(len(point.rounds) == 6 for point in found.points["dense"])


def test_without_any_model_left_there_are_no_more_blocks() -> None:
    found = run([Stub("bad", [], {(1, 1): WorkerError("it died")})])
    assert found.done == 1 and found.stopped is not None


def test_memory_that_runs_out_in_a_later_block_makes_the_larger_batch_void() -> None:
    out = WorkerError("full", out_of_memory=True)
    found = run([Stub("dense", []), Stub("big", [], {(2, 8): out})])
    for points in found.points.values():
        assert points[0].batch_size == 1 and len(points[0].rounds) == 6
        assert points[1].batch_size == 4 and {block for block, _ in numbers(points[1])} == {1, 2}
        assert any("batch of 8" in note and "block 2" in note for note in points[1].notes)


def test_processes_copy_and_order_of_a_real_measurement(
    fake_model: FakeModel, fake_engine: str, gone: Callable[[Path], bool], tmp_path: Path
) -> None:
    dense, bad = fake_model("dense", child=True), fake_model("bad", last_start=2)
    work = Workload(batch_sizes=(1,), prompt_tokens=3, output_tokens=5, rounds=2, warmup_rounds=0,
                    blocks=2, self_check=True)  # fmt: skip
    record = measure(
        {"dense": dense, "bad": bad}, dense="dense", engine=fake_engine, workload=work,
        setup=Setup(clock="wall"), output=tmp_path / "out", progress=False,
    )  # fmt: skip
    assert read_record(tmp_path / "out") == record
    assert (record.blocks, record.stopped, record.self_check) == (2, None, "dense (again)")
    copy = record.model("dense (again)")
    assert copy is not None and copy.points[0].ratio is not None
    assert copy.points[0].ratio.blocks == 2 and copy.points[0].ratio.low is not None
    processes = [line.split()[1] for line in (dense / "starts.txt").read_text().splitlines()]
    assert len(set(processes)) == 4, "dense and its copy, in two blocks"
    failed = record.model("bad")
    assert failed is not None and failed.status == "failed" and "SIGKILL" in str(failed.reason)
    assert gone(dense) and gone(bad)


@pytest.mark.parametrize("key", ["self_check", "until_precision"])
def test_what_needs_a_ratio_is_refused_without_one(key: str, tmp_path: Path) -> None:
    work = Workload.model_validate({key: True if key == "self_check" else 0.02})
    with pytest.raises(ThroughputError, match=rf"{key}.*dense"):
        measure({"a": tmp_path}, workload=work, progress=False)
    if key == "until_precision":
        with pytest.raises(ThroughputError, match=r"'a'.*self_check"):
            measure({"a": tmp_path}, dense="a", workload=work, progress=False)
    else:
        with pytest.raises(ThroughputError, match=r"a \(again\).*rename"):
            measure({"a": tmp_path, "a (again)": tmp_path}, dense="a", workload=work)
