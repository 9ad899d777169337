"""Seconds per solved question: from tokens per right answer and measured speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamline_bench.report.row import Row
from streamline_bench.report.scores import SolvedCost
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.texts import GenerationComparison
from streamline_bench.throughput.speed import Speed


def with_solved(row: Row, rows: Sequence[Row], usual: str) -> Row:
    """The row with what a right answer costs, where its and the dense row's speed was measured.

    Args:
        rows: all rows of the board; ``usual`` is the label of its dense row.
    """
    against = row.reference or usual
    dense = next((each.speed for each in rows if each.label == against), None)
    if row.is_dense or row.speed is None or dense is None:
        return row
    found = (_cost(each, dense, row.speed) for each in row.generations)
    return row.model_copy(update={"solved": [cost for cost in found if cost is not None]})


def _cost(found: GenerationComparison, dense: Speed, speed: Speed) -> SolvedCost | None:
    tokens = found.tokens_per_solved
    before, now = dense.output_tokens_per_second, speed.output_tokens_per_second
    if tokens is None or not before or not now:
        return None
    return SolvedCost(
        task=found.task,
        filter=found.filter,
        tokens=tokens,
        dense=None if tokens.dense is None else tokens.dense / before,
        row=None if tokens.pruned is None else tokens.pruned / now,
        ratio=_ratio(tokens.ratio, speed),
    )


def _ratio(tokens: Estimate | None, speed: Speed) -> Estimate | None:
    """Tokens / speed, each as a multiple of the dense model's; they are measured independently."""
    if tokens is None or not speed.ratio:
        return None
    value = tokens.value / speed.ratio
    if tokens.low is None or tokens.high is None or tokens.low <= 0:
        return Estimate(value=value)
    slow, fast, more = 0.0, 0.0, ""
    if speed.ratio_low is not None and speed.ratio_high is not None:
        more = "; and of the ratio of speeds"
        slow = math.log(speed.ratio / speed.ratio_low)
        fast = math.log(speed.ratio_high / speed.ratio)
    below = math.hypot(math.log(tokens.value / tokens.low), fast)
    above = math.hypot(math.log(tokens.high / tokens.value), slow)
    method = f"{tokens.method}{more}"
    return Estimate(
        value=value, low=value * math.exp(-below), high=value * math.exp(above), method=method
    )
