"""The samples table: every answer of one evaluation, in the same columns whatever the engine.

A reader (lm-eval, OpenCompass) makes :class:`Row` after :class:`Row`; everything downstream
(alignment, stability, report) sees the table and :class:`RunInfo` only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streamline_bench.core.files import atomic_write_bytes
from streamline_bench.core.recipe.validation import first_problem
from streamline_bench.errors import SamplesError, library_errors

SCHEMA_VERSION = 1

REPETITION = "repetition"
"""How the filters begin that stand for the times OpenCompass asked a question."""


@dataclass(kw_only=True)
class Row:
    """One answer: one (task, filter, document).

    Attributes:
        run: label of the run.
        task, task_version: as the engine names them.
        output_type: multiple_choice, loglikelihood, loglikelihood_rolling or generate_until.
        filter: the engine's answer filter ("none" if it has none).
        doc_id: position in the task's split.
        doc_hash, target_hash: of the document and of the expected answer.
        prompt_hash: of the (first) prompt.
        request_hash: of everything sent to the model: prompts, choices, generation arguments.
        prompt: as sent.
        choices: what was chosen from.
        loglikelihoods: one per choice, summed over its tokens, in nats.
        lengths, byte_lengths: characters and UTF-8 bytes scored per choice, without delimiter.
        mean_nll: mean token NLL per choice, where the engine gives it (OpenCompass calls it PPL).
        prediction: argmax of loglikelihoods ("acc"); prediction_norm: of loglikelihoods / lengths.
        gold: the right choice, where there is exactly one.
        target: the expected answer as text.
        text: what was generated, as the filter leaves it.
        answer: what was generated before the filter, where that is something else; of several
            repetitions the first.
        tokens: tokens of the answer, where the model noted them, mean over repetitions; of these
            ``thinking`` before the end of its thoughts; ``unfinished`` is the share of repetitions
            that reached the limit of tokens.
        correct: verdict by ``verdict_metric``, both None where the task is judged by a grade;
            correct_norm: by acc_norm.
        cluster: ``kind:hash`` of what the document belongs to (its passage, its subject).
        metrics: every metric of the row that is a number; a list of them as ``name.0``, ….
    """

    run: str = ""
    task: str
    task_version: str = ""
    output_type: str
    filter: str = "none"
    doc_id: int = 0
    doc_hash: str
    prompt_hash: str
    target_hash: str
    request_hash: str
    prompt: str
    choices: list[str] | None = None
    loglikelihoods: list[float] | None = None
    lengths: list[int] | None = None
    byte_lengths: list[int] | None = None
    mean_nll: list[float] | None = None
    prediction: int | None = None
    prediction_norm: int | None = None
    gold: int | None = None
    target: str
    text: str | None = None
    answer: str | None = None
    tokens: float | None = None
    thinking: float | None = None
    unfinished: float | None = None
    correct: bool | None = None
    correct_norm: bool | None = None
    verdict_metric: str | None = None
    cluster: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


_DTYPES = {"str": "str", "int": "int64", "int | None": "Int64", "bool | None": "boolean",
           "float | None": "Float64"}  # fmt: skip

COLUMNS = {column.name: _DTYPES.get(str(column.type), "object") for column in fields(Row)}
"""Column of the table -> pandas dtype: the fields of :class:`Row`."""


class RunInfo(BaseModel):
    """What a run says about itself; compared before any answer is.

    Attributes:
        source: the file or folder that was read; the newest where several were joined.
        config: the engine's own record of the model (``model_args``, ``limit``, seeds, and the
            extra keys that ``--model streamline`` adds: recipe, hashes, sizes).
        results: aggregated metrics per task, as the engine printed them.
        metrics: task -> its metrics, in the order of its configuration.
        repeats: task -> how many answers to each question there are.
        same_questions: task -> the task that asks the same in another way, as the task says.
        data: task -> the data set, its subset and its split, where the engine reports them.
        computed_by: task -> what computed its answers: transformers, vLLM, or the name of another
            model class; empty where the engine does not say.
        graded: tasks whose 0 and 1 are grades, because another row of the same board has others.
        seconds: wall-clock time of the evaluation, where the engine reports it.
        machine: accelerators or processor, where the engine reports them.
        files: task -> the file that its answers were read from, for messages.
        missing: task -> why it has no answers although the run was to have them.
        left_out: evaluation in the same folder -> why all or a part of it was not read.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    run: str
    engine: str
    engine_version: str | None = None
    source: str
    timestamp: str | None = None
    model: str | None = None
    task_versions: dict[str, str] = {}
    n_shot: dict[str, int | str | None] = {}
    task_hashes: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    chat_template: str | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    limit: float | None = None
    config: dict[str, Any] = {}
    results: dict[str, dict[str, Any]] = {}
    higher_is_better: dict[str, dict[str, bool | None]] = {}
    metrics: dict[str, list[str]] = {}
    repeats: dict[str, int] = {}
    same_questions: dict[str, str] = {}
    data: dict[str, dict[str, str]] = {}
    computed_by: dict[str, str] = {}
    graded: list[str] = []
    seconds: float | None = None
    machine: str | None = None
    versions: dict[str, str] = {}
    files: dict[str, str] = {}
    missing: dict[str, str] = {}
    left_out: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """One run: its answers (``frame``, see :data:`COLUMNS`) and what is known of it (``info``)."""

    frame: pd.DataFrame
    info: RunInfo

    @classmethod
    def from_rows(cls, rows: Sequence[Row | Mapping[str, Any]], info: RunInfo) -> Samples:
        """Build the table of ``info.run``; columns that a mapping leaves out become None.

        Raises:
            SamplesError: there is no row, or a row has a column that the table does not know.
        """
        if not rows:
            raise SamplesError(f"{info.source} holds no samples; evaluate at least one document.")
        found = [vars(row) if isinstance(row, Row) else row for row in rows]
        unknown = {name for row in found for name in row} - set(COLUMNS)
        if unknown:
            raise SamplesError(f"{info.source}: the samples table has no column {sorted(unknown)}.")
        columns = {name: [row.get(name) for row in found] for name in COLUMNS}
        return cls(_frame({**columns, "run": [info.run] * len(found)}), info)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(sorted(self.frame["task"].unique()))

    @property
    def first_filters(self) -> dict[str, str]:
        """Task -> its first filter, which summaries over tasks use."""
        first = self.frame.drop_duplicates("task")
        return dict(zip(first["task"], first["filter"], strict=True))

    def joined(self, more: Sequence[Samples]) -> Samples:
        """The same run with the tasks of further evaluations of it; of a task, the first counts."""
        frames, info = [self.frame], self.info
        for other in more:
            new = other.frame[~other.frame["task"].isin(list(info.task_versions))]
            frames.append(new)
            info = _joined(info, other.info)
        return Samples(pd.concat(frames, ignore_index=True), info)

    def without(self, tasks: Collection[str]) -> Samples:
        """The same run without some of its tasks."""
        if not set(tasks) & set(self.tasks):
            return self
        kept = self.frame[~self.frame["task"].isin(list(tasks))].reset_index(drop=True)
        info = self.info.model_copy(
            update={
                name: {k: v for k, v in getattr(self.info, name).items() if k not in tasks}
                for name in ("task_versions", "results", "n_shot", "missing")
            }
        )
        return Samples(kept, info)

    def relabelled(self, run: str) -> Samples:
        """The same answers under another label."""
        labels = pd.Series(run, index=self.frame.index, dtype="str")
        return Samples(self.frame.assign(run=labels), self.info.model_copy(update={"run": run}))

    def save(self, path: Path) -> None:
        """Write table and metadata as one Parquet file; a reader sees the old file or the new one.

        Raises:
            OutputError: the file cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = [
            pa.array([_plain(value) for value in self.frame[name].tolist()], type=kind)
            for name, kind in _arrow_types().items()
        ]
        table = pa.Table.from_arrays(arrays, names=list(COLUMNS))
        metadata = {_METADATA_KEY: self.info.model_dump_json().encode("utf-8")}
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        atomic_write_bytes(path, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read what :meth:`save` wrote.

        Raises:
            SamplesError: the file is damaged, of another kind, or of another version.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        with library_errors(
            f"'{path}' is not a readable Parquet file", "evaluate again", SamplesError
        ):
            table = pq.read_table(path)
            table.validate(full=True)
        for name in _LATER:  # an older release wrote a table without it
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), _arrow_types()[name]))
        metadata = table.schema.metadata or {}
        types = dict(zip(table.schema.names, table.schema.types, strict=True))
        if _METADATA_KEY not in metadata or types != _arrow_types():
            raise SamplesError(
                f"'{path}' is not a samples table; give a file that Samples.save wrote."
            )
        try:
            info = RunInfo.model_validate_json(metadata[_METADATA_KEY])
        except ValidationError:
            raise SamplesError(f"{path}: the metadata of the samples table is damaged.") from None
        if info.schema_version != SCHEMA_VERSION:
            raise SamplesError(
                f"{path} has samples schema {info.schema_version}, this release reads "
                f"{SCHEMA_VERSION}; read the original evaluation again."
            )
        columns = {name: table.column(name).to_pylist() for name in COLUMNS}
        columns["metrics"] = [dict(pairs or ()) for pairs in columns["metrics"]]
        return cls(_frame(columns), info)


def _joined(info: RunInfo, more: RunInfo) -> RunInfo:
    """What two evaluations of one model say, the first one's word counting."""
    both = (
        "task_versions", "n_shot", "task_hashes", "groups", "results", "higher_is_better", "data",
        "metrics", "repeats", "same_questions", "computed_by", "versions", "files", "missing",
        "left_out",
    )  # fmt: skip
    seconds = [each.seconds for each in (info, more) if each.seconds is not None]
    newest = max((info, more), key=lambda each: each.timestamp or "")
    return info.model_copy(
        update={
            **{name: {**getattr(more, name), **getattr(info, name)} for name in both},
            "seconds": sum(seconds) if seconds else None,
            "source": newest.source,
            "timestamp": newest.timestamp,
        }
    )


def task_hash(rows: Sequence[Row]) -> str:
    """SHA-256 over the documents, prompts and expected answers of a task, as lm-eval makes it."""
    text = "".join(row.doc_hash + row.prompt_hash + row.target_hash for row in rows)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextmanager
def well_formed(where: str, what: str, advice: str) -> Iterator[None]:
    """Say in one sentence that a file does not have the form that the block expects.

    Args:
        where: file, and the place in it.
        what: what it should be: ``an evaluation that OpenCompass wrote``.

    Raises:
        SamplesError: anything in the block that damaged content can cause; the problem is named.
    """
    try:
        yield
    except ValidationError as error:
        problem = first_problem(error)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:  # fmt: skip
        problem = f"{type(error).__name__}: {error}"
    else:
        return
    raise SamplesError(f"{where}: not {what} ({problem}); {advice}.")


_METADATA_KEY = b"streamline_bench.samples"
_LATER = ("cluster", "answer", "tokens", "thinking", "unfinished")


def _arrow_types() -> dict[str, Any]:
    import pyarrow as pa

    kinds = {
        "int": pa.int64(),
        "bool": pa.bool_(),
        "float": pa.float64(),
        "list[str]": pa.list_(pa.string()),
        "list[int]": pa.list_(pa.int64()),
        "list[float]": pa.list_(pa.float64()),
        "dict[str, float]": pa.map_(pa.string(), pa.float64()),
    }
    types = {column.name: str(column.type).removesuffix(" | None") for column in fields(Row)}
    return {name: kinds.get(kind, pa.string()) for name, kind in types.items()}


def _frame(columns: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        {name: pd.Series(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    )


def _plain(value: Any) -> Any:
    if value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return list(value.items()) if isinstance(value, dict) else value
