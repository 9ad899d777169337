"""Reads what a gate is given: a run folder, its leaderboard, a reference file or evaluations.

A leaderboard has estimates only. If ``run.json`` and the evaluations are in the same folder, the
answers are read too, in a second step: that takes longer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.core.files.structured import read_json
from streamline_bench.errors import SamplesError
from streamline_bench.gate.reference import (
    KIND,
    Reference,
    RowReference,
    TaskReference,
    pack,
    parse_reference,
)
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard, Row, TaskScore, parse_leaderboard
from streamline_bench.report.run_file import RUN_FILE, RunFile, RunRow, read_run_file
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.stability import choice_spread

LEADERBOARD = "leaderboard.json"
Key = tuple[str, str]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """A run or a reference, with what its questions are like where its samples are there.

    Attributes:
        clusters: (task, filter) -> which questions belong together.
        spreads: (task, filter) -> spread of the dense model's choices, float64 [n].
    """

    figures: Reference
    clusters: Mapping[Key, ClusterLabels | None] = field(default_factory=dict)
    spreads: Mapping[Key, FloatArray] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, RowReference]:
        """Rows by label."""
        return {row.label: row for row in self.figures.rows}


@dataclass(frozen=True)
class Source:
    """A run or a reference that was opened, without its answers.

    Attributes:
        figures: the estimates of every row.
        board: None for a reference file.
        run: ``run.json`` in the folder of the leaderboard; None without one.
    """

    path: Path
    figures: Reference
    board: Leaderboard | None = None
    run: RunFile | None = None

    def evidence(self, *, progress: bool = True) -> Evidence:
        """Read the answers as well, where they are.

        Raises:
            SamplesError: an evaluation is damaged, or does not belong to the leaderboard.
            ThroughputError: the record of speeds is damaged.
        """
        if self.board is None:
            return Evidence(self.figures)
        folder = self.path if self.path.is_dir() else self.path.parent
        speed = folder / self.run.throughput if self.run and self.run.throughput else None
        return evidence_of(
            self.board,
            _samples(folder, self.run, progress),
            source=str(self.path),
            throughput=speed if speed is not None and speed.exists() else None,
        )


def open_source(path: Path) -> Source:
    """Open a run folder, a ``leaderboard.json`` or a reference file.

    Raises:
        SamplesError: there is none, or it is damaged.
    """
    file = path / LEADERBOARD if path.is_dir() else path
    if not file.is_file():
        advice = "make it with streamline-bench report" if path.is_dir() else "check the path"
        raise SamplesError(f"'{file}' does not exist; {advice}.")
    payload = read_json(file, SamplesError, f"give a run folder, a {LEADERBOARD} or a reference")
    if isinstance(payload, dict) and payload.get("kind") == KIND:
        return Source(path, parse_reference(payload, str(file)))
    board = parse_leaderboard(payload, str(file))
    run = read_run_file(file.parent) if (file.parent / RUN_FILE).is_file() else None
    return Source(path, evidence_of(board, {}, source=str(path)).figures, board, run)


def read_evidence(path: Path, *, progress: bool = True) -> Evidence:
    """Open and read a run folder, a ``leaderboard.json`` or a reference file.

    Raises:
        SamplesError, ThroughputError: see :func:`open_source` and :meth:`Source.evidence`.
    """
    return open_source(path).evidence(progress=progress)


def read_evaluations(
    evaluations: Mapping[str, Path | str],
    dense: str,
    *,
    throughput: Path | str | None = None,
    settings: Settings | None = None,
    progress: bool = True,
) -> Evidence:
    """Read evaluations of a dense model and of what was made from it, each once.

    Args:
        evaluations: label -> output folder of lm-eval or OpenCompass, or samples Parquet.
        dense: label of the model that the others are compared with.
        throughput: a ``throughput.json`` whose labels are the same.

    Raises:
        SamplesError: an evaluation cannot be read, or ``dense`` is not among them.
        ComparisonError: they were evaluated differently.
        ThroughputError: the record is damaged.
    """
    if dense not in evaluations:
        raise SamplesError(
            f"The dense run '{dense}' is not among the evaluations: {', '.join(evaluations)}."
        )
    folders = {label: Path(path).absolute() for label, path in evaluations.items()}
    samples = {
        label: load_samples(path, run=label, progress=progress) for label, path in folders.items()
    }
    speed = None if throughput is None else Path(throughput).absolute()
    run = RunFile(
        dense=dense,
        rows=[RunRow(label=label, eval=str(path)) for label, path in folders.items()],
        throughput=None if speed is None else str(speed),
    )
    board = build_leaderboard(run, Path("/"), samples=samples, settings=settings, progress=progress)
    source = ", ".join(str(path) for path in evaluations.values())
    return evidence_of(board, samples, source=source, throughput=speed)


def evidence_of(
    board: Leaderboard,
    samples: Mapping[str, Samples],
    *,
    source: str,
    throughput: Path | None = None,
) -> Evidence:
    """What a leaderboard and the answers that it was made from say.

    Args:
        samples: label -> answers; rows without have estimates only.
        throughput: the ``throughput.json`` behind the leaderboard's figures: it knows the machine.

    Raises:
        SamplesError: the answers are not those that the leaderboard was made from.
        ThroughputError: the record is damaged.
    """
    dense = samples.get(board.dense)
    return Evidence(
        Reference(
            source=source,
            title=board.title,
            dense=board.dense,
            method=board.method,
            rows=tuple(_row(row, samples.get(row.label), board) for row in board.rows),
            machine=None if throughput is None else _machine(throughput),
            versions=board.versions,
        ),
        clusters=_clusters(dense),
        spreads={} if dense is None else _spreads(dense, board),
    )


def _samples(folder: Path, run: RunFile | None, progress: bool) -> dict[str, Samples]:
    """Answers of the rows whose evaluations are there; a leaderboard may have been moved alone."""
    if run is None:
        return {}
    return {
        row.label: load_samples(folder / row.eval, run=row.label, progress=progress)
        for row in run.rows
        if row.failed is None and row.eval is not None and (folder / row.eval).exists()
    }


def _row(row: Row, samples: Samples | None, board: Leaderboard) -> RowReference:
    return RowReference(
        label=row.label,
        is_dense=row.is_dense,
        failed=row.failed,
        tasks=tuple(
            _task(score, samples, board.method.verdict) for score in row.tasks if score.main
        ),
        speed=row.throughput,
    )


def _task(score: TaskScore, samples: Samples | None, verdict: str) -> TaskReference:
    found: dict[str, Any] = {}
    if samples is not None:
        rows = _rows(samples, (score.task, score.filter))
        if len(rows) != score.n or rows[verdict].isna().any():
            raise SamplesError(
                f"Row '{samples.info.run}' has {score.n} verdicts on task '{score.task}' in the "
                f"leaderboard and {int(rows[verdict].notna().sum())} in '{samples.info.source}'; "
                "make the report again."
            )
        found = {
            "documents": _digest(rows),
            "right": pack(rows[verdict].to_numpy(dtype=np.bool_)),
        }
    return TaskReference(
        task=score.task,
        filter=score.filter,
        n=score.n,
        accuracy=score.accuracy,
        stability=score.comparison.stability if score.comparison else None,
        **found,
    )


def _rows(samples: Samples, key: Key) -> pd.DataFrame:
    frame = samples.frame
    chosen: pd.DataFrame = frame[(frame["task"] == key[0]) & (frame["filter"] == key[1])]
    ordered: pd.DataFrame = chosen.sort_values("doc_id", kind="stable", ignore_index=True)
    return ordered


def _digest(rows: pd.DataFrame) -> str:
    columns = ["doc_hash", "prompt_hash", "target_hash", "request_hash"]
    text = "\n".join(" ".join(values) for values in rows[columns].to_numpy().tolist())
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _keys(samples: Samples) -> list[Key]:
    keys = samples.frame[["task", "filter"]].drop_duplicates()
    return [(str(task), str(name)) for task, name in keys.to_numpy().tolist()]


def _clusters(dense: Samples | None) -> dict[Key, ClusterLabels | None]:
    if dense is None:
        return {}
    return {key: cluster_labels(_rows(dense, key)["cluster"]) for key in _keys(dense)}


def _spreads(dense: Samples, board: Leaderboard) -> dict[Key, FloatArray]:
    """Of the tasks with choices."""
    found = {}
    ddof = board.method.ddof
    for key in _keys(dense):
        rows = _rows(dense, key)
        if all(isinstance(choices, list) and len(choices) > 1 for choices in rows["choices"]):
            quantity: Any = board.method.quantity
            found[key] = choice_spread(rows, quantity=quantity, ddof=ddof)
    return found


def _machine(throughput: Path) -> str:
    from streamline_bench.throughput.record import read_record

    return read_record(throughput).environment.machine_id
