"""A gate's evidence straight from evaluations, without a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streamline_bench.gate.evidence import Evidence, evidence_of
from streamline_bench.report.board.leaderboard import build_leaderboard
from streamline_bench.report.data.schema import Leaderboard
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.settings import Settings

__all__ = ["read_evaluations"]


def read_evaluations(
    evaluations: Mapping[str, Path | str],
    dense: str,
    *,
    throughput: Path | str | None = None,
    settings: Settings | None = None,
    progress: bool = True,
) -> Evidence:
    """Read evaluations of a dense model and of what was made from it.

    Args:
        evaluations: label -> output folder of lm-eval or OpenCompass, or samples Parquet.
        dense: label of the model that the others are compared with.
        throughput: a ``throughput.json`` whose labels are the same.

    Raises:
        SamplesError: an evaluation cannot be read, or ``dense`` is not among them.
        ComparisonError: they were not asked the same.
        ThroughputError: the record is damaged.
    """
    folders = {label: Path(path) for label, path in evaluations.items()}
    speed = None if throughput is None else Path(throughput)
    board = build_leaderboard(
        folders, dense, throughput=speed, settings=settings, progress=progress
    )
    samples = {
        label: load_samples(path, run=label, progress=progress) for label, path in folders.items()
    }
    source = ", ".join(str(path) for path in folders.values())
    return evidence_of(Leaderboard.model_validate(board), samples, source=source, throughput=speed)
