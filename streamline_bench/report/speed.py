"""Throughput figures of a run, for the rows of its leaderboard."""

from __future__ import annotations

from pathlib import Path

from streamline_bench.report.schema import Throughput

__all__ = ["read_throughput"]


def read_throughput(path: Path | None) -> dict[str, Throughput]:
    """Return label -> figures of a ``throughput.json``; nothing without one.

    Raises:
        StreamlineBenchError: the file is missing or damaged.
    """
    if path is None:
        return {}
    from streamline_bench.throughput.figures import read_figures

    return {
        label: Throughput(**{name: getattr(found, name) for name in Throughput.model_fields})
        for label, found in read_figures(path).items()
    }
