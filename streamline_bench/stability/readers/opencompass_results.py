"""Right or wrong per question, by OpenCompass' evaluation: ``results/<model>/<data set>.json``.

Where the evaluation states a verdict for every question, it counts. Where it does not, choices are
judged by their gold, and generated answers by the extracted answers, if it has them; that must then
give the accuracy that the evaluation reports.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from streamline_bench.core.files import read_json
from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.opencompass_rows import Entry
from streamline_bench.stability.samples import Row, well_formed

_VERDICTS = ("correct", "is_correct", "cascade_correct")
_ACCURACY = re.compile(r"^accuracy( \(\d+ runs average\))?$")
_AGAIN = "evaluate again (opencompass --mode eval --reuse)"


class Evaluation(BaseModel):
    """What OpenCompass found on one data set, or on a part of it; numbers are further keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    details: dict[str, Any] | list[Any] | None = None

    @property
    def numbered(self) -> bool:
        """Whether the details stand by the number of the question."""
        return isinstance(self.details, dict)

    @cached_property
    def listed(self) -> list[Any]:
        """The details, in order."""
        if isinstance(self.details, dict):
            numbers = sorted((key for key in self.details if re.fullmatch("[0-9]{1,9}", key)),
                             key=int)  # fmt: skip
            return [self.details[key] for key in numbers]
        return self.details or []

    @property
    def repetitions(self) -> int:
        """How many times each question was asked, as far as the details tell."""
        if self.numbered or not self.listed:
            return 1
        return len(_verdicts(self.listed[0]) or [True])

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Numbers over all questions, by OpenCompass' names."""
        return {
            name: float(value)
            for name, value in (self.model_extra or {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    @property
    def accuracy(self) -> float | None:
        """Per cent; None where several are reported and differ."""
        found = {value for name, value in self.numbers.items() if _ACCURACY.match(name)}
        return found.pop() if len(found) == 1 else None

    @property
    def stated(self) -> list[bool] | None:
        """A verdict per prediction, where every question has one for each time it was asked."""
        found = [_verdicts(detail) for detail in self.listed]
        if not found or any(value is None or len(value) != self.repetitions for value in found):
            return None
        return [value[number] for number in range(self.repetitions) for value in found if value]

    @property
    def derived(self) -> list[bool] | None:
        """Whether the extracted answers are the references, as accuracy evaluators compare them.

        None where that does not give the accuracy.
        """
        if not self.numbered or not self.listed or self.accuracy is None:
            return None
        pairs = [
            (detail.get("predictions"), detail.get("references"))
            for detail in self.listed
            if isinstance(detail, dict)
        ]
        same = [str(answer) == str(right) for answer, right in pairs]
        return same if same and _gives(same, self.accuracy) else None


def read_evaluation(paths: Sequence[Path], entries: Sequence[Sequence[Entry]]) -> Evaluation:
    """Read the evaluation of one data set, whole or in parts.

    Args:
        entries: the predictions, part by part, that it must have been made from.

    Returns:
        The parts as one: all details in order, and the accuracy over all questions.

    Raises:
        SamplesError: a file is damaged, was made from other predictions, or parts are missing.
    """
    if len(paths) == 1:
        entries = [[entry for part in entries for entry in part]]
    if len(paths) != len(entries):
        raise SamplesError(
            f"{paths[0]} is one of {len(paths)} parts of an evaluation, of {len(entries)} parts of "
            f"predictions; {_AGAIN}."
        )
    parts = [_read(path, part) for path, part in zip(paths, entries, strict=True)]
    if len(parts) == 1:
        return parts[0]
    forms = {(part.numbered, bool(part.listed)) for part in parts}
    if len(forms) > 1 or any(part.repetitions > 1 for part in parts):
        raise SamplesError(
            f"{paths[0]} and the other parts cannot be joined, because their details differ in "
            f"form or repeat questions; {_AGAIN} without splitting the data set."
        )
    details = [detail for part in parts for detail in part.listed]
    known = [(part.accuracy, len(own)) for part, own in zip(parts, entries, strict=True)]
    accuracy = [value * count for value, count in known if value is not None]
    total = sum(count for _, count in known)
    payload: dict[str, Any] = {
        "details": dict(zip(map(str, range(len(details))), details, strict=True))
        if parts[0].numbered
        else details
    }
    if len(accuracy) == len(parts) and total:
        payload["accuracy"] = sum(accuracy) / total
    return Evaluation.model_validate(payload)


def _read(path: Path, entries: Sequence[Entry]) -> Evaluation:
    payload = read_json(path, SamplesError, f"the file looks truncated, {_AGAIN}")
    with well_formed(str(path), "an evaluation that OpenCompass wrote", _AGAIN):
        found = Evaluation.model_validate(payload)
        expected, _ = len(found.listed) * found.repetitions, found.numbers
    if found.listed and expected != len(entries):
        raise SamplesError(
            f"{path} was made from {expected} predictions, beside it are {len(entries)}: one is "
            f"truncated or of another run; run OpenCompass again, or {_AGAIN}."
        )
    for number, (detail, entry) in enumerate(zip(found.listed, entries, strict=False)):
        # Details by number repeat the predictions that they are about.
        judged = detail.get("origin_prediction") if isinstance(detail, dict) else None
        if found.numbered and not _is_about(judged, entry):
            raise SamplesError(
                f"{path}: question {number} was judged on another prediction than the one beside "
                f"it; {_AGAIN}."
            )
    return found


def judge(rows: Sequence[Row], evaluation: Evaluation, path: Path) -> None:
    """Set ``correct`` of the rows, in place; rows stay as they are where nothing is known.

    Args:
        rows: all rows of the data set in the order of its predictions: the first repetition of
            every question, then the second.

    Raises:
        SamplesError: the evaluation was made from other predictions.
    """
    stated = evaluation.stated
    if stated is None and rows[0].output_type == "generate_until":
        stated = evaluation.derived
    if stated is not None and len(stated) == len(rows):
        for row, verdict in zip(rows, stated, strict=True):
            row.correct, row.verdict_metric = verdict, "accuracy"
            row.metrics["accuracy"] = float(verdict)
        return
    own = [row.correct for row in rows if row.correct is not None]
    accuracy = evaluation.accuracy
    if accuracy is not None and len(own) == len(rows) and not _gives(own, accuracy):
        raise SamplesError(
            f"{path} reports accuracy {accuracy:.4f}, the predictions beside it give "
            f"{100 * sum(own) / len(own):.4f}: it was made from others; {_AGAIN}."
        )


def _verdicts(detail: Any) -> list[bool] | None:
    """The verdicts on one question, one per repetition; None if it has none, or a grade."""
    for name in _VERDICTS:
        value = detail.get(name) if isinstance(detail, dict) else None
        if value is not None:
            found = value if isinstance(value, list) else [value]
            return [bool(part) for part in found] if all(part in (0, 1) for part in found) else None
    return None


def _is_about(judged: Any, entry: Entry) -> bool:
    if isinstance(judged, str):
        return bool(judged == entry.prediction)
    if not isinstance(judged, Mapping):
        return True
    own = {label: score.ppl for label, score in entry.scores.items()}
    return all(
        score.get("PPL") == own[label]
        for label, score in judged.items()
        if label in own and isinstance(score, Mapping)
    )


def _gives(verdicts: Sequence[bool], accuracy: float) -> bool:
    return math.isclose(100 * sum(verdicts) / len(verdicts), accuracy, abs_tol=1e-6)
