"""``leaderboard.json``, the source of every view of a report: schema, reader and writer.

:func:`json_schema` gives it as JSON Schema; ``reports/leaderboard.schema.json`` holds the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from streamline_bench.core.files import read_json, validated
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import SamplesError
from streamline_bench.report.fronts import Front
from streamline_bench.report.places import Between, Contest, Folded, Gain, Rank
from streamline_bench.report.row import Row
from streamline_bench.report.scores import GuessingLevel
from streamline_bench.stability.comparison import NoiseFloor


class Procedure(Frozen):
    """How the runs were compared (see :class:`streamline_bench.stability.settings.Settings`)."""

    mode: str
    ddof: int
    quantity: str
    verdict: str
    confidence: float
    draws: int
    seed: int
    margin: float | None = None
    metrics: dict[str, str] = Field(default_factory=dict)
    pairs: dict[str, str] = Field(default_factory=dict)


class Leaderboard(Frozen):
    """Everything a report shows; the dense row always has a result.

    Version 4 adds ``grades`` and ``aggregate_only`` to rows and ``metrics`` to the method; a file
    of version 3 is one without them. Version 5 adds ``grade_ranks``, ``grade_change``,
    ``formats``, ``solved`` and ``memory`` to rows, ``computed_by`` to their provenance, numbers of
    tokens to ``generations``, grades to ``noise`` (whose other numbers may be missing then),
    ``pairs`` to the method, ``target`` and ``fronts``; what is folded has no accuracy where no task
    has verdicts. It may have ``parts`` of rows and ``gains``.
    A file of version 4 is one without them. It may have ``guessing``, ``against_random`` and
    ``given`` of tasks.

    Attributes:
        ranks: entry (row or folded row) -> its place by accuracy.
        grade_ranks: the same by the mean of the grades that judge tasks.
        folded: rows over seeds and calibrations.
        neighbours: every entry against the next one of the ranking of its size, Holm's adjustment
            over all.
        contests: entries that may be compared, each group around its first, the largest group
            first.
        gains: what patches add, by healing, selection and size.
        target: what the sizes of rows were solved for, in words.
        guessing: what every task gives to whom guesses.
        against_random: every entry against the random one of its size, Holm's adjustment over those
            of a size; empty where no row removes random layers.
        fronts: of accuracy against costs; empty where neither a target nor a search was asked for.
        not_read: for files of the evaluations (``row: file``) why they are not read.
    """

    kind: Literal["streamline-bench leaderboard"] = "streamline-bench leaderboard"
    schema_version: Literal[3, 4, 5] = 5
    title: str
    dense: str
    method: Procedure
    rows: list[Row] = Field(min_length=1)
    ranks: dict[str, Rank] = Field(default_factory=dict)
    grade_ranks: dict[str, Rank] = Field(default_factory=dict)
    folded: list[Folded] = Field(default_factory=list)
    neighbours: list[Between] = Field(default_factory=list)
    contests: list[Contest] = Field(default_factory=list)
    gains: list[Gain] = Field(default_factory=list)
    guessing: list[GuessingLevel] = Field(default_factory=list)
    against_random: list[Between] = Field(default_factory=list)
    target: str | None = None
    fronts: list[Front] = Field(default_factory=list)
    noise: NoiseFloor | None = None
    not_compared: dict[str, str] = Field(default_factory=dict)
    commands: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    failed_jobs: dict[str, str] = Field(default_factory=dict)
    ignored_options: list[str] = Field(default_factory=list)
    not_read: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _dense_row(self) -> Leaderboard:
        dense = {row.label: row for row in self.rows if row.is_dense}
        wanted = {self.dense, *(row.reference for row in self.rows if row.reference)}
        if missing := sorted(wanted - dense.keys()):
            raise ValueError(f"the row '{missing[0]}' must be marked as dense")
        for label, row in dense.items():
            if label in wanted and (row.failed or (row.tasks and row.accuracy_macro is None)):
                raise ValueError(f"the dense row '{label}' has no result")
        return self

    @property
    def shown_as(self) -> dict[str, Row]:
        """Label -> the row that shows it: runs that gave the same weights share one."""
        found = {row.label: row for row in self.rows}
        for row in self.rows:
            for twin in getattr(row, "same_weights", ()):
                found.setdefault(twin.label, row)
        return found

    @property
    def shown_ranks(self) -> dict[str, Rank]:
        """Places by accuracy; by grades where no task has right or wrong answers."""
        return self.ranks or self.grade_ranks

    @property
    def dense_row(self) -> Row:
        """The row that the others are compared with, where they name no other."""
        return next(row for row in self.rows if row.label == self.dense)

    def other_reference(self, row: Row) -> str | None:
        """The dense row that a row is compared with, where it is not the board's."""
        return row.reference if row.reference != self.dense and not row.is_dense else None

    @property
    def level(self) -> str:
        """The confidence of the intervals: ``95 %``."""
        return f"{100 * self.method.confidence:g} %"


def read_leaderboard(path: Path) -> Leaderboard:
    """Read and validate a ``leaderboard.json``.

    Raises:
        SamplesError: the file is missing, damaged or of another schema version.
    """
    return parse_leaderboard(read_json(Path(path), SamplesError, _ADVICE), str(path))


_ADVICE = "make the report again"


def parse_leaderboard(payload: Any, origin: str) -> Leaderboard:
    """Validate what a ``leaderboard.json`` holds; ``origin`` is named in errors.

    Raises:
        SamplesError: see :func:`read_leaderboard`.
    """
    return validated(Leaderboard, payload, origin, newest=5, error=SamplesError, advice=_ADVICE)


def to_json(board: Leaderboard) -> str:
    """The leaderboard as JSON without blanks, every number unrounded.

    Raises:
        SamplesError: a number is not finite; its place is named.
    """
    payload = board.model_dump(mode="json")
    try:
        return (
            json.dumps(payload, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
        )
    except ValueError:
        raise SamplesError(
            f"The leaderboard holds a number that is not finite, in {_not_finite(payload)}; no "
            "report is written."
        ) from None


def _not_finite(value: object, where: str = "") -> str:
    """The first place of such a number, e.g. ``rows.2.scan.cosine.0.1``."""
    if isinstance(value, float):
        return where if not math.isfinite(value) else ""
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        parts = list(enumerate(value))
    else:
        return ""
    inside = (_not_finite(part, f"{where}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, inside), "")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of ``leaderboard.json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Leaderboard.model_json_schema(),
    }
