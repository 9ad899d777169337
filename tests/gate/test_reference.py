"""The reference file: small, and as good as the run that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.gate.evidence import pack, read_evidence, unpack, write_reference
from streamline_bench.gate.judge import gate
from streamline_bench.gate.result import Thresholds

FAST = Thresholds(draws=500)


@pytest.fixture
def reference(reference_run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "reference.json"
    write_reference(read_evidence(reference_run, progress=False).figures, path)
    return path


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_a_bit_per_answer(n: int) -> None:
    right = np.random.default_rng(n).random(n) < 0.5
    packed = pack(right)
    assert len(packed) == 2 * -(-n // 8)
    assert unpack(packed, n).tolist() == right.tolist()
    assert pack(np.array([True] + [False] * 7)) == "80"


def test_as_good_as_the_run(
    reference: Path, reference_run: Path, make_run: Any, spoil: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", changes={("streamline", "arc"): spoil(40)})
    by_run = gate(run, reference_run, thresholds=FAST, progress=False)
    by_file = gate(run, reference, thresholds=FAST, progress=False)
    assert by_file.checks == by_run.checks
    assert not by_file.passed


def test_small(reference: Path) -> None:
    assert reference.stat().st_size < 12_000, "six tasks of 300 answers"


def test_a_reference_can_be_gated_itself(reference: Path) -> None:
    result = gate(reference, reference, thresholds=FAST, progress=False)
    assert result.passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "schema_version": 3}, "newer than 2; upgrade"),
        (lambda d: {**d, "rows": []}, "'rows'"),
        (lambda d: {**d, "surprise": 1}, "'surprise'"),
    ],
)
def test_damaged(reference: Path, change: Any, message: str) -> None:
    reference.write_text(json.dumps(change(json.loads(reference.read_text()))))
    with pytest.raises(SamplesError, match=message):
        read_evidence(reference)


def test_verdicts_must_be_as_many_as_answers(reference: Path) -> None:
    payload = json.loads(reference.read_text())
    payload["rows"][0]["tasks"][0]["right"] = "ff"
    reference.write_text(json.dumps(payload))
    with pytest.raises(SamplesError, match=r"verdict.* 300"):
        read_evidence(reference)
