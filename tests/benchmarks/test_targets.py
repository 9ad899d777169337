"""Benchmarks that measure a promise fail beyond it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import eight_b_on_gpu
import help_time
import trunk_vs_separate

HERE = Path(__file__).parent


def call(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / name), *options], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("target", "code"), [("600", 0), ("0.0001", 1)])
def test_stability(target: str, code: int) -> None:
    ended = call("stability_million.py", "--pairs", "2000", "--draws", "100", "--target", target)
    assert ended.returncode == code, ended.stderr
    assert ("s of processor time (target 0.0001 s)" in ended.stderr) == bool(code)


def row(case: str, layers_ratio: float, scoring: float, runs: float | None) -> dict[str, Any]:
    found = {"case": case, "layers_ratio": layers_ratio, "scoring": {"ratio": scoring}}
    return found if runs is None else {**found, "runs": {"ratio": runs}}


def test_trunk() -> None:
    rows = [row("deep", 2.8, 2.0, 2.6), row("chosen", 1.5, 1.3, 1.4)]
    assert trunk_vs_separate.missed(rows, 2.5) == []
    (fault,) = trunk_vs_separate.missed(rows, 2.7)
    assert (
        fault == "Case 'deep': runs together are 2.6 times as fast as separate ones (target 2.7)."
    )
    alone = trunk_vs_separate.missed([row("deep", 2.8, 2.0, None)], 2.5)
    assert len(alone) == 1 and "scoring together are 2.0 times" in alone[0]


def test_help() -> None:
    medians = {"python -c pass": 0.01, "import click": 0.1, "--help": 0.15, "compare": 0.25}
    assert help_time.missed(medians, 3.0) is None
    assert help_time.missed(medians, 2.0) == (
        "'compare' takes 2.50 times 'import click' (target 2)."
    )
    assert set(help_time.commands()) >= {"--help", "gate", "import click"}
    assert "lm-eval" not in help_time.commands()
    assert help_time.seconds(("-c", "pass")) > 0


def test_eight_b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of part runs, with a tiny model on the CPU."""
    monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path / "cache"))
    size, model = eight_b_on_gpu.SIZES["tiny"], tmp_path / "model"
    model.mkdir()
    eight_b_on_gpu.write_model(model, size)
    parts = ("scan", "layer", "scoring")
    found = {name: eight_b_on_gpu.part(name, model, size) for name in parts}
    assert found["layer"]["steps"] == size.steps
    assert found["scoring"]["changed"] == 0
    assert found["layer"]["forecast"] > 0
    assert eight_b_on_gpu.MAKING + sum(eight_b_on_gpu.PARTS.values()) <= 8 * 60
    limit = eight_b_on_gpu.limits()["layer"]
    said = eight_b_on_gpu.line("layer", {**found["layer"], "seconds": 3 * limit}, limit)
    assert "3.0 times as much" in said
