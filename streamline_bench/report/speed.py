"""Throughput figures of a run, for the rows of its leaderboard."""

from __future__ import annotations

from pathlib import Path

from streamline_bench.throughput.figures import Speed, read_figures

__all__ = ["read_throughput"]


def read_throughput(path: Path | None) -> dict[str, Speed]:
    """Return label -> figures of a ``throughput.json``; nothing without one.

    Raises:
        StreamlineBenchError: the file is missing or damaged.
    """
    if path is None:
        return {}
    return {
        label: Speed(**found.model_dump(exclude={"label"}))
        for label, found in read_figures(path).items()
    }
