"""What the benchmark runner calls a regression."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import run_benchmarks


def made(factors: tuple[float, ...] = (1.0,), **medians: float) -> dict[str, Any]:
    """A run of the throughput group and others: name -> median, times a factor in each block."""
    benchmarks = []
    for name, median in medians.items():
        group, _, param = name.partition("__")
        entry = {"group": group, "param": param, "fullname": f"x/test_{name}"}
        blocks = [median * factor for factor in factors]
        benchmarks.append(
            {**entry, "stats": {"median": median}, "extra_info": {"block_medians": blocks}}
        )
    return {"benchmarks": benchmarks}


def test_ratios_within_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert not run_benchmarks.broken_limits(made(throughput__9=0.75, throughput__12=1.0))
    (fault,) = run_benchmarks.broken_limits(made(throughput__9=0.99, throughput__12=1.0))
    assert fault == "throughput: 9 / 12 = 0.990 (limit 0.95)"
    assert not run_benchmarks.broken_limits(made(scan__scan=9.0)), "its peer was not run"


def test_a_limit_is_broken_where_the_interval_is_beyond_it() -> None:
    def broken(*ratios: float) -> list[str]:
        run = made((1.0, 1.2, 0.9), throughput__9=1.0, throughput__12=1.0)
        ours = run["benchmarks"][0]["extra_info"]
        ours["block_medians"] = [
            ratio * peer for ratio, peer in zip(ratios, (1.0, 1.2, 0.9), strict=True)
        ]
        return run_benchmarks.broken_limits(run)

    assert broken(0.99, 0.98, 0.99), "what all blocks share is no noise"
    assert not broken(0.8, 1.2, 1.1), "above 0.95 on average, and it may be noise"


def test_slower_than_stored_beyond_what_they_predict() -> None:
    before = [made(scan__scan=median, scan__forward=1.0) for median in (1.0, 1.05, 0.96, 1.02)]
    assert not run_benchmarks.slower_than(before, made(scan__scan=1.08), 0.1)
    (fault,) = run_benchmarks.slower_than(before, made(scan__scan=1.5), 0.1)
    assert fault == "test_scan__scan: 1.49 times what earlier runs of this machine took"
    noisy = [made(scan__scan=median) for median in (0.6, 1.5, 0.9, 1.4)]
    assert not run_benchmarks.slower_than(noisy, made(scan__scan=1.5), 0.1)
    assert not run_benchmarks.slower_than(before[:2], made(scan__scan=9.0), 0.1)
    old = [{"benchmarks": [{**run["benchmarks"][0], "extra_info": {}}]} for run in before]
    assert run_benchmarks.slower_than(old, made(scan__scan=1.5), 0.1)


def test_stored_runs_are_numbered_by_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared with the last good runs of this machine; a bad one is not kept."""
    medians = [median for run in (1.0, 1.02, 0.99, 2.0, 1.01) for median in (run, run)]
    runs = iter([made(scan__scan=median) for median in medians])

    def fake(file: Path, rest: list[str]) -> int:
        assert rest == ["-k", "scan"]
        file.write_text(json.dumps(next(runs)))
        return 0

    monkeypatch.setattr(run_benchmarks, "run", fake)
    output = tmp_path / "out" / "b.json"
    arguments = ["x", "--store", str(tmp_path), "--output", str(output), "--blocks", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "-k", "scan"])
    assert [run_benchmarks.main() for _ in range(5)] == [0, 0, 0, 1, 0]
    assert "FAILED test_scan__scan: 1.99 times" in capsys.readouterr().out
    folder = tmp_path / run_benchmarks.machine_id()
    stored = [f"000{number}.json" for number in range(1, 5)]
    assert sorted(path.name for path in folder.iterdir()) == stored
    assert json.loads(output.read_text()) == made((1.0, 1.0), scan__scan=1.01)
    monkeypatch.setenv("STREAMLINE_BENCH_MACHINE", "another")
    assert run_benchmarks.last_stored(tmp_path / run_benchmarks.machine_id(), 10) == []
