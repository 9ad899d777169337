"""What a gate compares, and how it is read: a run folder, a leaderboard, a reference, evaluations.

A leaderboard has estimates only. If ``run.json`` and the evaluations are in the same folder, the
answers are read too, in a second step: that takes longer. Of each row's evaluation,
:func:`~streamline_bench.stability.readers.load.load_samples` reads what belongs together and logs
what it leaves out; answers that are not those of the leaderboard are refused.

A reference file keeps the estimates, one bit per answer, and a hash over the questions, so that
later runs are compared answer by answer although the reference's evaluations are long gone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator

from streamline_bench.core.files import atomic_write_text, read_json, validated
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import SamplesError
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard, Procedure, parse_leaderboard
from streamline_bench.report.provenance import computed_by
from streamline_bench.report.row import ComputedBy, Row
from streamline_bench.report.run_file import RUN_FILE, RunFile, RunRow, read_run_file
from streamline_bench.report.scores import GradeScore, TaskScore
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.metrics import with_metrics
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.stability import choice_spread
from streamline_bench.throughput.record import RECORD_NAME, ThroughputRecord, read_record
from streamline_bench.throughput.speed import Speed, figures_of

log = logging.getLogger(__name__)

LEADERBOARD = "leaderboard.json"
KIND: Literal["streamline-bench gate reference"] = "streamline-bench gate reference"
Key = tuple[str, str]
"""Task, filter."""

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


class TaskReference(Frozen):
    """One task of one row, by the filter that summaries use.

    Attributes:
        stability: None for the dense row and for tasks without choices.
        documents: hash over documents, prompts and expected answers in order; None without samples.
        right: a bit per document (:func:`pack`), None without samples.
    """

    task: str
    filter: str
    n: int = Field(ge=1)
    accuracy: Estimate
    stability: Estimate | None = None
    documents: str | None = None
    right: str | None = None

    @property
    def key(self) -> Key:
        """Task and filter."""
        return self.task, self.filter

    @model_validator(mode="after")
    def _bits(self) -> TaskReference:
        if self.right is not None and len(self.right) != 2 * ((self.n + 7) // 8):
            raise ValueError(f"task '{self.task}' has not one verdict for each of {self.n} answers")
        return self


class GradeReference(Frozen):
    """A task that is judged by a grade, by the filter that summaries use.

    Attributes:
        value: mean over documents, as a share of the highest grade.
        documents: as of a :class:`TaskReference`.
        values: the grade of each document, likewise; None without samples.
    """

    task: str
    filter: str
    metric: str
    higher_is_better: bool = True
    n: int = Field(ge=1)
    value: Estimate
    documents: str | None = None
    values: tuple[float, ...] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, filter and metric."""
        return self.task, self.filter, self.metric

    @model_validator(mode="after")
    def _all(self) -> GradeReference:
        if self.values is not None and len(self.values) != self.n:
            raise ValueError(f"task '{self.task}' has not one grade for each of {self.n} answers")
        return self


class RowReference(Frozen):
    """One model; ``failed`` says why it has no result."""

    label: str
    is_dense: bool
    failed: str | None = None
    computed_by: ComputedBy = None
    tasks: tuple[TaskReference, ...] = ()
    grades: tuple[GradeReference, ...] = ()
    speed: Speed | None = None

    @property
    def asked(self) -> dict[str, str | None]:
        """Task -> what computed its answers; None where nothing says."""
        tasks = [task.task for task in self.tasks] + [grade.task for grade in self.grades]
        by = self.computed_by
        return {task: by.get(task) if isinstance(by, dict) else by for task in tasks}


class Reference(Frozen):
    """A run, as far as a gate needs it. Version 2 adds ``grades`` and ``computed_by`` to rows.

    Attributes:
        source: folder or file that it was made from.
        method: how answers were compared; None for speeds alone.
        machine: id of the machine on which the speed was measured; None where nothing was.
    """

    kind: Literal["streamline-bench gate reference"] = KIND
    schema_version: Literal[1, 2] = 2
    source: str
    title: str
    dense: str
    method: Procedure | None = None
    rows: tuple[RowReference, ...] = Field(min_length=1)
    machine: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


def pack(right: BoolArray) -> str:
    """Verdicts [n] as hexadecimal digits, eight to a byte, the first in the highest bit."""
    return np.packbits(right).tobytes().hex()


def unpack(text: str, n: int) -> BoolArray:
    """The first ``n`` verdicts of :func:`pack`, bool [n]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n)
    right: BoolArray = bits.astype(np.bool_)
    return right


def write_reference(reference: Reference, path: Path) -> None:
    """Write atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    payload = reference.model_dump(mode="json", exclude_none=True)
    atomic_write_text(path, json.dumps(payload, indent=1, ensure_ascii=False) + "\n")


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

    def evidence(self, *, progress: bool = True, answers: bool = True) -> Evidence:
        """Read the machine, and the answers where they are and asked for.

        Raises:
            SamplesError: an evaluation is damaged, or does not belong to the leaderboard.
            ThroughputError: the record of speeds is damaged.
        """
        if self.board is None:
            return Evidence(self.figures)
        folder = self.path if self.path.is_dir() else self.path.parent
        speeds = speed_files(folder, self.run) if self.run is not None else []
        return evidence_of(
            self.board,
            _samples(folder, self.run, progress) if answers else {},
            source=str(self.path),
            throughput=speeds[0] if speeds else None,
        )


def speed_files(folder: Path, run: RunFile) -> list[Path]:
    """Return the ``throughput.json`` files that a run's rows have their speeds from, if there."""
    named = dict.fromkeys(row.throughput or run.throughput for row in run.rows)
    files = [folder / name for name in named if name is not None]
    return [file for file in files if file.is_file()]


def open_source(path: Path) -> Source:
    """Open a run folder, a ``leaderboard.json``, a ``throughput.json`` or a reference file.

    Raises:
        SamplesError: there is none, or it is damaged.
        ThroughputError: the record of speeds is damaged.
    """
    file = path / LEADERBOARD if path.is_dir() else path
    speeds = path / RECORD_NAME if path.is_dir() else path
    if speeds.name == RECORD_NAME and speeds.is_file() and not (path / LEADERBOARD).is_file():
        return Source(path, _of_record(read_record(speeds), str(path)))
    if not file.is_file():
        advice = "make it with streamline-bench report" if path.is_dir() else "check the path"
        inside = sorted(each.parent.name for each in path.glob(f"*/{LEADERBOARD}"))
        if inside:
            advice = f"'{path}' holds the runs {', '.join(inside)}: name one of them"
        what = f"has no {LEADERBOARD}" if path.is_dir() else "does not exist"
        raise SamplesError(f"'{path}' {what}; {advice}.")
    payload = read_json(file, SamplesError, f"give a run folder, a {LEADERBOARD} or a reference")
    if isinstance(payload, dict) and payload.get("kind") == KIND:
        advice = "write the reference again"
        figures = validated(
            Reference, payload, str(file), newest=2, error=SamplesError, advice=advice
        )
        return Source(path, figures)
    board = parse_leaderboard(payload, str(file))
    run = read_run_file(file.parent) if (file.parent / RUN_FILE).is_file() else None
    return Source(path, evidence_of(board, {}, source=str(path)).figures, board, run)


def _of_record(record: ThroughputRecord, source: str) -> Reference:
    """The speeds of a measurement without evaluations."""
    dense = record.dense or record.models[0].label
    rows = tuple(
        RowReference(
            label=label,
            is_dense=label == dense,
            speed=Speed.model_validate(speed.model_dump(exclude={"label"})),
        )
        for label, speed in figures_of(record).items()
    )
    machine = record.environment.machine_id
    return Reference(source=source, title=source, dense=dense, rows=rows, machine=machine)


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
    asked = board.method.metrics
    groups = {label: _by_task(each, asked) for label, each in samples.items()}
    of_dense = groups.get(board.dense, {})
    quantity: Any = board.method.quantity
    return Evidence(
        Reference(
            source=source,
            title=board.title,
            dense=board.dense,
            method=board.method,
            rows=tuple(
                _row(row, groups.get(row.label), samples.get(row.label), board)
                for row in board.rows
            ),
            machine=None if throughput is None else _machine(throughput),
            versions=board.versions,
        ),
        clusters={key: cluster_labels(rows["cluster"]) for key, rows in of_dense.items()},
        spreads={
            key: choice_spread(rows, quantity=quantity, ddof=board.method.ddof)
            for key, rows in of_dense.items()
            if all(isinstance(choices, list) and len(choices) > 1 for choices in rows["choices"])
        },
    )


def _samples(folder: Path, run: RunFile | None, progress: bool) -> dict[str, Samples]:
    """Answers of the rows whose evaluations are there; a leaderboard may have been moved alone."""
    rows = [] if run is None else [row for row in run.rows if row.failed is None and row.eval]
    there = {row.label: folder / str(row.eval) for row in rows if (folder / str(row.eval)).exists()}
    gone = [row.label for row in rows if row.label not in there]
    if there and gone:
        log.warning(
            "%s: the evaluations of %s are not there; these rows are compared by estimates only.",
            folder,
            ", ".join(f"'{label}'" for label in gone),
        )
    return {
        label: load_samples(path, run=label, progress=progress) for label, path in there.items()
    }


def _by_task(samples: Samples, asked: Mapping[str, str]) -> dict[Key, pd.DataFrame]:
    """The answers to each task, by document, judged by the metrics that were asked for."""
    frame = with_metrics(samples.frame, asked, samples.info) if asked else samples.frame
    ordered = frame.sort_values("doc_id", kind="stable")
    groups = ordered.groupby(["task", "filter"], sort=False)
    return {(str(task), str(name)): rows.reset_index(drop=True) for (task, name), rows in groups}


def _row(
    row: Row,
    groups: Mapping[Key, pd.DataFrame] | None,
    samples: Samples | None,
    board: Leaderboard,
) -> RowReference:
    return RowReference(
        label=row.label,
        is_dense=row.is_dense,
        failed=row.failed,
        # A leaderboard of an older release does not say.
        computed_by=computed_by(samples.info) if samples else row.provenance.computed_by,
        tasks=tuple(
            _task(row, score, groups, board.method.verdict) for score in row.tasks if score.main
        ),
        grades=tuple(_grades(row, groups, board)),
        speed=row.throughput,
    )


def _grades(
    row: Row, groups: Mapping[Key, pd.DataFrame] | None, board: Leaderboard
) -> Iterator[GradeReference]:
    """The grades that judge a task of any row; the dense row's own may all be 0 or 1."""
    scales = {
        (score.task, score.filter, score.metric): score.scale
        for other in (*board.rows, row)
        for score in other.grades
        if score.main and score.decides and score.kind == "grade"
    }
    own = {(score.task, score.filter, score.metric): score for score in row.grades}
    for key, scale in scales.items():
        if key in own:
            yield _grade(row, own[key], scale, groups)


def _grade(
    row: Row, score: GradeScore, scale: float, groups: Mapping[Key, pd.DataFrame] | None
) -> GradeReference:
    found: dict[str, Any] = {}
    value = score.value
    if groups is not None:
        rows = groups.get((score.task, score.filter), pd.DataFrame({"metrics": []}))
        values = np.array([record.get(score.metric, np.nan) for record in rows["metrics"]]) / scale
        mean = values.mean() if len(values) else np.nan
        if len(values) != score.n or not np.isclose(
            mean * scale, value.value * score.scale, rtol=1e-9, atol=1e-9
        ):
            raise SamplesError(
                f"Task '{score.task}' of row '{row.label}' has {score.n} grades '{score.metric}' "
                f"in the leaderboard, {value.value * score.scale:.6g} on average, and "
                f"{len(values)} in its evaluation, {mean * scale:.6g} on average; make the report "
                "again (streamline-bench report)."
            )
        found = {"documents": _digest(rows), "values": tuple(values.tolist())}
    factor = score.scale / scale
    error = value.standard_error
    return GradeReference(
        task=score.task,
        filter=score.filter,
        metric=score.metric,
        higher_is_better=score.higher_is_better,
        n=score.n,
        value=Estimate(
            value=value.value * factor, standard_error=None if error is None else error * factor
        ),
        **found,
    )


def _task(
    row: Row, score: TaskScore, groups: Mapping[Key, pd.DataFrame] | None, verdict: str
) -> TaskReference:
    found = {}
    if groups is not None:
        rows = groups.get((score.task, score.filter), pd.DataFrame({verdict: []}))
        right = rows[verdict].dropna().to_numpy(dtype=np.bool_)
        same = len(rows) == len(right) == score.n
        if not same or not np.isclose(right.mean(), score.accuracy.value, rtol=0, atol=1e-9):
            raise SamplesError(
                f"Task '{score.task}' of row '{row.label}' has {score.n} verdicts in the "
                f"leaderboard, {score.accuracy.value * score.n:.0f} of them right, and "
                f"{len(right)} in its evaluation, {right.sum()} of them right; "
                "make the report again (streamline-bench report)."
            )
        found = {"documents": _digest(rows), "right": pack(right)}
    return TaskReference(
        task=score.task,
        filter=score.filter,
        n=score.n,
        accuracy=score.accuracy,
        stability=score.comparison.stability if score.comparison else None,
        **found,
    )


def _digest(rows: pd.DataFrame) -> str:
    columns = ["doc_hash", "prompt_hash", "target_hash", "request_hash"]
    text = "\n".join(" ".join(values) for values in rows[columns].to_numpy().tolist())
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _machine(throughput: Path) -> str:
    return read_record(throughput).environment.machine_id
