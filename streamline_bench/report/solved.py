"""Seconds per solved question: from tokens per right answer and measured speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamline_bench.report.leaderboard import Row, SolvedCost
from streamline_bench.stability.comparison import Estimate, GenerationComparison
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
    rates = dense.output_tokens_per_second, speed.output_tokens_per_second
    if tokens is None or not all(rates):
        return None
    seconds = [
        None if each is None or not rate else each / rate
        for each, rate in zip((tokens.dense, tokens.pruned), rates, strict=True)
    ]
    return SolvedCost(
        task=found.task,
        filter=found.filter,
        tokens=tokens,
        dense=seconds[0],
        row=seconds[1],
        ratio=_ratio(tokens.ratio, speed),
    )


def _ratio(tokens: Estimate | None, speed: Speed) -> Estimate | None:
    """Tokens / speed, each as a multiple of the dense model's; they are measured independently."""
    if tokens is None or not speed.ratio:
        return None
    value = tokens.value / speed.ratio
    if tokens.low is None or tokens.high is None or tokens.low <= 0:
        return Estimate(value=value)
    speeds = speed.ratio_low, speed.ratio, speed.ratio_high
    known = None not in speeds
    slow, fast = (
        (math.log(speed.ratio / speeds[0]), math.log(speeds[2] / speed.ratio))
        if known
        else (0.0, 0.0)
    )
    below = math.hypot(math.log(tokens.value / tokens.low), fast)
    above = math.hypot(math.log(tokens.high / tokens.value), slow)
    method = f"{tokens.method}" + ("; and of the ratio of speeds" if known else "")
    return Estimate(
        value=value, low=value * math.exp(-below), high=value * math.exp(above), method=method
    )
