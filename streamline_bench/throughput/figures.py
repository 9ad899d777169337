"""Figures that records are made of: a rate, a ratio to dense with its interval, a latency."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from streamline_bench.core.recipe.schema import Frozen


class Recorded(Frozen):
    """A part of a record."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # a request rate may be infinite


class Rate(Recorded):
    """Median over rounds, smallest and largest."""

    median: float
    low: float
    high: float


class Ratio(Recorded):
    """Model / dense: the geometric mean over blocks, with Student's interval over the blocks.

    Attributes:
        low, high: None with one block, which does not show what another start would give.
        blocks: those in which both ran.
        median: median over the blocks, and its interval by a hierarchical bootstrap (blocks, then
            rounds in a block), which is too narrow for few blocks. None in records of schema 1,
            whose interval was over the rounds of one process.
    """

    value: float
    low: float | None
    high: float | None
    blocks: int = 1
    median: float | None = None
    median_low: float | None = None
    median_high: float | None = None


class Latency(Recorded):
    """Milliseconds over the counted requests of one load, all blocks together.

    Attributes:
        n: number of values (requests; for times between tokens, gaps); None in older records.
        p50, p90, p95, p99: None where so few values do not bound the percentile from above.
        intervals: percentile -> ends of its interval between order statistics; left out where
            blocks (or requests) differ so much that there are too few of them.
        ratio: mean of this model / mean of dense in the same block.
    """

    mean: float
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    n: int | None = None
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    ratio: Ratio | None = None
