"""What the benchmark runner calls a regression."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import run_benchmarks


def made(**medians: float) -> dict[str, Any]:
    """A run of the throughput group and others: name -> median, quartiles within 5 %."""
    benchmarks = []
    for name, median in medians.items():
        group, _, param = name.partition("__")
        stats = {"median": median, "q1": 0.95 * median, "q3": 1.05 * median}
        entry = {"group": group, "param": param, "fullname": f"x/test_{name}", "stats": stats}
        benchmarks.append(entry)
    return {"benchmarks": benchmarks}


def test_ratios_within_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert not run_benchmarks.broken_limits(made(throughput__9=0.75, throughput__12=1.0))
    (fault,) = run_benchmarks.broken_limits(made(throughput__9=0.99, throughput__12=1.0))
    assert fault == "throughput: 9 / 12 = 0.990 (limit 0.95)"
    assert not run_benchmarks.broken_limits(made(scan__scan=9.0)), "its peer was not run"


def test_slower_than_stored_beyond_quartiles() -> None:
    before = made(scan__scan=1.0, scan__forward=1.0)
    assert not run_benchmarks.slower_than(before, made(scan__scan=1.2), 0.3)
    (fault,) = run_benchmarks.slower_than(before, made(scan__scan=1.5), 0.3)
    assert fault == "test_scan__scan: 1.50 times the stored median on this machine"
    noisy = made(scan__scan=1.5)
    noisy["benchmarks"][0]["stats"]["q1"] = 1.04
    assert not run_benchmarks.slower_than(before, noisy, 0.3)
    assert not run_benchmarks.slower_than(None, made(scan__scan=1.5), 0.3)


def test_stored_runs_are_numbered_by_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared with the last good run of this machine; a bad one is not kept."""
    runs = iter([made(scan__scan=1.0), made(scan__scan=2.0), made(scan__scan=1.1)])

    def fake(file: Path, rest: list[str]) -> int:
        assert rest == ["-k", "scan"]
        file.write_text(json.dumps(next(runs)))
        return 0

    monkeypatch.setattr(run_benchmarks, "run", fake)
    output = tmp_path / "out" / "b.json"
    arguments = ["x", "--store", str(tmp_path), "--output", str(output), "-k", "scan"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert [run_benchmarks.main() for _ in range(3)] == [0, 1, 0]
    assert "FAILED test_scan__scan: 2.00 times" in capsys.readouterr().out
    folder = tmp_path / run_benchmarks.machine_id()
    assert sorted(path.name for path in folder.iterdir()) == ["0001.json", "0002.json"]
    assert json.loads(output.read_text()) == made(scan__scan=1.1)
    monkeypatch.setenv("STREAMLINE_BENCH_MACHINE", "another")
    assert run_benchmarks.last_stored(tmp_path / run_benchmarks.machine_id()) is None
