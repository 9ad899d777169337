"""A gate straight from evaluations, as the pytest plugin uses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.gate.evidence import read_evaluations, read_evidence
from streamline_bench.gate.judge import judge
from streamline_bench.gate.result import Thresholds

FAST = Thresholds(draws=200)
LABELS = ("dense", "streamline", "shortgpt")


def test_the_same_as_the_run_folder(
    make_run: Callable[..., Path], make_throughput: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", n=100, throughput=make_throughput())
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(make_throughput(streamline=100.0)))
    folders = {label: run / label / "eval" for label in LABELS}
    against = read_evidence(run, progress=False)
    found = read_evaluations(folders, "dense", throughput=slower, progress=False)
    assert found.figures.machine == "machine-1"
    result = judge(found, against, FAST)
    closing = {(check.row, check.quantity) for check in result.closing}
    assert closing == {("streamline", "tokens/s"), ("streamline", "speed-up")}
    unmeasured = judge(read_evaluations(folders, "dense", progress=False), against, FAST)
    assert {(check.row, check.quantity) for check in unmeasured.closing} == {
        (label, "tokens/s") for label in LABELS
    }


def test_parquet_and_other_engines_alike(
    make_run: Callable[..., Path], tmp_path: Path, reference_run: Path
) -> None:
    from streamline_bench.stability.readers.load import load_samples

    for label in LABELS:
        samples = load_samples(reference_run / label / "eval", run=label, progress=False)
        samples.save(tmp_path / f"{label}.parquet")
    files = {label: tmp_path / f"{label}.parquet" for label in LABELS}
    found = read_evaluations(files, "dense", progress=False)
    assert judge(found, read_evidence(reference_run, progress=False), FAST).passed


def test_without_the_dense_model(reference_run: Path) -> None:
    with pytest.raises(SamplesError, match="'dense' is not among"):
        read_evaluations({"streamline": reference_run / "streamline" / "eval"}, "dense")
