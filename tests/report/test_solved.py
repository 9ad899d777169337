"""Seconds per solved question, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from streamline_bench.report.row import Row
from streamline_bench.report.solved import with_solved
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.texts import GenerationComparison, LengthChange
from streamline_bench.throughput.speed import Speed

GENERATED = GenerationComparison(
    task="sums", filter="none", n=50, identical=Estimate(value=0.2), first_word=1, shared=0.5,
    first_character=3, dense_words=5, pruned_words=8, exact_match=None,
    tokens_per_solved=LengthChange(
        dense=100, pruned=300, ratio=Estimate(value=3, low=2, high=4.5, method="bootstrap")
    ),
)  # fmt: skip


def speed(rate: float, **ratio: float) -> Speed:
    return Speed(
        status="ok", engine="hf", device="cpu", dtype="float32", batch_size=8,
        output_tokens_per_second=rate, **ratio,
    )  # fmt: skip


def row(label: str, measured: Speed | None, **fields: Any) -> Row:
    given = {"label": label, "is_dense": label == "dense", "throughput": measured}
    nothing = dict.fromkeys(("accuracy_macro", "accuracy_micro", "macro", "micro"))
    provenance = dict.fromkeys(("results_file", "model", "engine"))
    return Row(**given, **nothing, tasks=[], provenance=provenance, **fields)


def test_a_faster_model_may_be_slower_for_each_right_answer() -> None:
    rows = [
        row("dense", speed(200)),
        row("pruned", speed(250, ratio=1.25, ratio_low=1.2, ratio_high=1.3),
            generations=[GENERATED]),
    ]  # fmt: skip
    (found,) = with_solved(rows[1], rows, "dense").solved
    assert (found.dense, found.row) == pytest.approx((0.5, 1.2))
    assert found.ratio is not None and found.ratio.value == pytest.approx(2.4)
    # Log-distances of tokens and speed, independent of each other.
    below = math.sqrt(math.log(3 / 2) ** 2 + math.log(1.3 / 1.25) ** 2)
    above = math.sqrt(math.log(4.5 / 3) ** 2 + math.log(1.25 / 1.2) ** 2)
    ends = 2.4 * math.exp(-below), 2.4 * math.exp(above)
    assert found.ratio.ends == pytest.approx(ends)


def test_nothing_is_claimed_where_something_is_missing() -> None:
    dense, fast = row("dense", speed(200)), speed(250, ratio=1.25)
    unmeasured = row("pruned", None, generations=[GENERATED])
    assert with_solved(unmeasured, [dense, unmeasured], "dense").solved == []
    uncounted = GENERATED.model_copy(update={"tokens_per_solved": None})
    other = row("pruned", fast, generations=[uncounted])
    assert with_solved(other, [dense, other], "dense").solved == []
    none = LengthChange(dense=100, pruned=None, ratio=None)
    wrong = row("pruned", fast,
                generations=[GENERATED.model_copy(update={"tokens_per_solved": none})])  # fmt: skip
    (found,) = with_solved(wrong, [dense, wrong], "dense").solved
    assert (found.dense, found.row, found.ratio) == (0.5, None, None)
