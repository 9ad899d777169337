"""The samples table: every answer of one evaluation, in the same columns whatever the engine.

A reader (lm-eval, OpenCompass) fills :data:`COLUMNS`; everything downstream (alignment, stability,
report) sees this table and :class:`RunInfo` only. One row is one (task, filter,
document).

===================  =====================  ======================================================
column               type                   meaning
===================  =====================  ======================================================
run                  str                    label of the run
task, task_version   str                    as the engine names them
output_type          str                    multiple_choice, loglikelihood, loglikelihood_rolling
                                            or generate_until
filter               str                    the engine's answer filter ("none" if it has none)
doc_id               int                    position in the task's split
doc_hash             str                    of the document
prompt_hash          str                    of the (first) prompt
target_hash          str                    of the expected answer
request_hash         str                    of everything sent to the model: prompts, choices,
                                            generation arguments
prompt               str                    the prompt, as sent
choices              list[str] or None      what was chosen from
loglikelihoods       list[float] or None    one per choice, summed over its tokens, in nats
lengths              list[int] or None      characters scored per choice, delimiter not counted
byte_lengths         list[int] or None      the same in UTF-8 bytes
mean_nll             list[float] or None    mean token NLL per choice where the engine itself gives
                                            it (OpenCompass calls it PPL); None with lm-eval
prediction           int or None            argmax of loglikelihoods ("acc")
prediction_norm      int or None            argmax of loglikelihoods / lengths ("acc_norm")
gold                 int or None            the right choice, where there is exactly one
target               str                    the expected answer as text
text                 str or None            what was generated
correct              bool or None           verdict by ``verdict_metric``
correct_norm         bool or None           verdict by acc_norm
verdict_metric       str or None            the metric behind ``correct``
cluster              str or None            ``kind:hash`` of what the document belongs to (its
                                            passage, its subject); None if it stands alone
metrics              dict[str, float]       every numeric metric of the row
===================  =====================  ======================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from streamline_bench.errors import SamplesError

__all__ = ["COLUMNS", "RunInfo", "Samples"]

SCHEMA_VERSION = 1

COLUMNS: Mapping[str, str] = {
    "run": "str",
    "task": "str",
    "task_version": "str",
    "output_type": "str",
    "filter": "str",
    "doc_id": "int64",
    "doc_hash": "str",
    "prompt_hash": "str",
    "target_hash": "str",
    "request_hash": "str",
    "prompt": "str",
    "choices": "object",
    "loglikelihoods": "object",
    "lengths": "object",
    "byte_lengths": "object",
    "mean_nll": "object",
    "prediction": "Int64",
    "prediction_norm": "Int64",
    "gold": "Int64",
    "target": "str",
    "text": "object",
    "correct": "boolean",
    "correct_norm": "boolean",
    "verdict_metric": "object",
    "cluster": "object",
    "metrics": "object",
}
"""Column name -> pandas dtype."""


class RunInfo(BaseModel):
    """What a run says about itself; compared before any answer is.

    Attributes:
        config: the engine's own record of the model (``model_args``, ``limit``, seeds, and the
            extra keys that ``--model streamline`` adds: recipe, hashes, sizes).
        results: aggregated metrics per task, as the engine printed them.
        seconds: wall-clock time of the evaluation, where the engine tells.
        files: task -> the file that its answers were read from, for messages.
        missing: task -> why it has no answers although the run was to have them.
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
    seconds: float | None = None
    versions: dict[str, str] = {}
    files: dict[str, str] = {}
    missing: dict[str, str] = {}


@dataclass(frozen=True)
class Samples:
    """One run: its answers (``frame``, see :data:`COLUMNS`) and what is known of it (``info``)."""

    frame: pd.DataFrame
    info: RunInfo

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], info: RunInfo) -> Samples:
        """Build the table from one mapping per row; columns left out become None.

        Raises:
            SamplesError: there is no row, or a row has a column that the table does not know.
        """
        if not rows:
            raise SamplesError(f"{info.source} holds no samples; evaluate at least one document.")
        unknown = {name for row in rows for name in row} - set(COLUMNS)
        if unknown:
            raise SamplesError(f"{info.source}: the samples table has no column {sorted(unknown)}.")
        columns = {
            name: pd.Series([row.get(name) for row in rows], dtype=dtype)
            for name, dtype in COLUMNS.items()
        }
        return cls(pd.DataFrame(columns), info)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(sorted(self.frame["task"].unique()))

    @property
    def first_filters(self) -> dict[str, str]:
        """Task -> its first filter, which summaries over tasks use."""
        first = self.frame.drop_duplicates("task")
        return dict(zip(first["task"], first["filter"], strict=True))

    def save(self, path: Path) -> None:
        """Write the table and its metadata as one Parquet file.

        Raises:
            OutputError: the file cannot be written.
        """
        from streamline_bench.stability.readers.parquet import write_samples

        write_samples(self, path)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read what :meth:`save` wrote.

        Raises:
            SamplesError: the file is not a samples table of a known version.
        """
        from streamline_bench.stability.readers.parquet import read_samples

        return read_samples(path)


def parse_info(payload: bytes, origin: str) -> RunInfo:
    """Validate run metadata stored as JSON.

    Raises:
        SamplesError: it is not ours, or of a version that this release does not know.
    """
    try:
        info = RunInfo.model_validate(json.loads(payload))
    except (ValueError, ValidationError):
        raise SamplesError(f"{origin}: the metadata of the samples table is damaged.") from None
    if info.schema_version != SCHEMA_VERSION:
        raise SamplesError(
            f"{origin} has samples schema {info.schema_version}, this release reads "
            f"{SCHEMA_VERSION}; read the original evaluation again."
        )
    return info
