"""What a gate compares with: figures of every row, and its verdicts, in one small file.

A reference keeps one bit per answer, and a hash over the questions, so that later runs are compared
answer by answer although the reference's evaluations are long gone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.files.structured import validated
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import SamplesError
from streamline_bench.report.leaderboard import Procedure
from streamline_bench.stability.comparison import Estimate
from streamline_bench.throughput.speed import Speed

KIND: Literal["streamline-bench gate reference"] = "streamline-bench gate reference"

BoolArray = npt.NDArray[np.bool_]


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

    @model_validator(mode="after")
    def _bits(self) -> TaskReference:
        if self.right is not None and len(self.right) != 2 * ((self.n + 7) // 8):
            raise ValueError(f"task '{self.task}' has not one verdict for each of {self.n} answers")
        return self


class RowReference(Frozen):
    """One model; ``failed`` says why it has no result."""

    label: str
    is_dense: bool
    failed: str | None = None
    tasks: tuple[TaskReference, ...] = ()
    speed: Speed | None = None


class Reference(Frozen):
    """A run, as far as a gate needs it.

    Attributes:
        source: folder or file that it was made from.
        machine: id of the machine on which the speed was measured; None where nothing was.
    """

    kind: Literal["streamline-bench gate reference"] = KIND
    schema_version: Literal[1] = 1
    source: str
    title: str
    dense: str
    method: Procedure
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


def parse_reference(payload: Any, origin: str) -> Reference:
    """Validate what :func:`write_reference` wrote.

    Raises:
        SamplesError: it is damaged, or of another version.
    """
    return validated(
        Reference,
        payload,
        origin,
        newest=1,
        error=SamplesError,
        advice="write the reference again",
    )
