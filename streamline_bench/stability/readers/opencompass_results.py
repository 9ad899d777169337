"""Right or wrong per question, by OpenCompass' evaluation: ``results/<model>/<data set>.json``.

Where the evaluation states a verdict for every question, it counts. Where it does not, choices are
judged by their gold, and generated answers by the extracted answers, if it has them; that must then
give the accuracy that the evaluation reports.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamline_bench.errors import SamplesError

__all__ = ["Evaluation", "read_evaluation"]

_VERDICTS = ("correct", "is_correct", "cascade_correct")
_ACCURACY = re.compile(r"^accuracy( \(\d+ runs average\))?$")
_AGAIN = "evaluate again (opencompass --mode eval --reuse)"

Entry = Mapping[str, Any]


def read_evaluation(path: Path) -> Evaluation:
    """Read the evaluation of one data set.

    Raises:
        SamplesError: it is not JSON, or not of OpenCompass' form.
    """
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SamplesError(
            f"{path} is not valid JSON ({error}); it looks truncated, {_AGAIN}."
        ) from None
    if not isinstance(payload, dict):
        raise SamplesError(f"{path} is not an evaluation that OpenCompass wrote; {_AGAIN}.")
    return Evaluation(path, payload)


class Evaluation:
    """What OpenCompass found on one data set."""

    def __init__(self, path: Path, payload: Mapping[str, Any]) -> None:
        self.path = path
        self._payload = payload
        details = payload.get("details") or []
        self._numbered = isinstance(details, dict)
        if isinstance(details, dict):
            details = [details[key] for key in sorted(filter(str.isdigit, details), key=int)]
        self._details: list[Any] = details if isinstance(details, list) else []

    @property
    def repetitions(self) -> int:
        """How many times each question was asked, as far as the details tell."""
        if self._numbered or not self._details:
            return 1
        value = _listed(self._details[0])
        return len(value) if value else 1

    @property
    def numbers(self) -> dict[str, float]:
        """Numbers over all questions, named as lm-eval names its own (``accuracy,none``)."""
        return {
            f"{name},none": float(value)
            for name, value in self._payload.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def judge(self, rows: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> None:
        """Set ``correct`` of the rows, in place; rows stay as they are where nothing is known.

        Args:
            rows: all rows of the data set in the order of ``entries``, its predictions: the first
                repetition of every question, then the second.

        Raises:
            SamplesError: the evaluation was made from other predictions.
        """
        self._check_count(len(entries))
        self._check_same(entries)
        accuracy = self._accuracy()
        stated = self._stated()
        if stated is None and rows[0]["output_type"] == "generate_until":
            derived = self._derived()
            if derived is not None and accuracy is not None and _gives(derived, accuracy):
                stated = derived
        if stated is not None:
            for row, verdict in zip(rows, stated, strict=True):
                row |= {"correct": verdict, "verdict_metric": "accuracy"}
                row["metrics"]["accuracy"] = float(verdict)
            return
        own = [row["correct"] for row in rows if row.get("correct") is not None]
        if accuracy is not None and len(own) == len(rows) and not _gives(own, accuracy):
            raise SamplesError(
                f"{self.path} reports accuracy {accuracy:.4f}, the predictions beside it give "
                f"{100 * sum(own) / len(own):.4f}: it was made from others; {_AGAIN}."
            )

    def _accuracy(self) -> float | None:
        found = [value for name, value in self._payload.items() if _ACCURACY.match(name)]
        return float(found[0]) if found and isinstance(found[0], int | float) else None

    def _check_count(self, entries: int) -> None:
        expected = len(self._details) * self.repetitions
        if self._details and expected != entries:
            raise SamplesError(
                f"{self.path} was made from {expected} predictions, beside it are {entries}: one "
                f"is truncated or of another run; run OpenCompass again, or {_AGAIN}."
            )

    def _check_same(self, entries: Sequence[Entry]) -> None:
        """Details by number repeat the predictions that they are about."""
        if not self._numbered:
            return
        for number, (detail, entry) in enumerate(zip(self._details, entries, strict=True)):
            judged = detail.get("origin_prediction") if isinstance(detail, dict) else None
            if not _is_about(judged, entry):
                raise SamplesError(
                    f"{self.path}: question {number} was judged on another prediction than the "
                    f"one beside it; {_AGAIN}."
                )

    def _stated(self) -> list[bool] | None:
        found = [_listed(detail) for detail in self._details]
        if not found or any(value is None or len(value) != self.repetitions for value in found):
            return None
        return [value[number] for number in range(self.repetitions) for value in found if value]

    def _derived(self) -> list[bool] | None:
        """Whether the extracted answers are the references, as accuracy evaluators compare them."""
        if not self._numbered or not self._details:
            return None
        pairs = [
            (detail.get("predictions"), detail.get("references"))
            for detail in self._details
            if isinstance(detail, dict)
        ]
        return [str(answer) == str(right) for answer, right in pairs]


def _listed(detail: Any) -> list[bool] | None:
    """The verdicts on one question, one per repetition."""
    for name in _VERDICTS:
        value = detail.get(name) if isinstance(detail, dict) else None
        if value is not None:
            return [bool(part) for part in value] if isinstance(value, list) else [bool(value)]
    return None


def _is_about(judged: Any, entry: Entry) -> bool:
    if isinstance(judged, str):
        return bool(judged == entry.get("prediction"))
    if not isinstance(judged, dict):
        return True
    for label, score in judged.items():
        own = entry.get(f"label: {label}")
        if isinstance(own, dict) and isinstance(score, dict) and score.get("PPL") != own.get("PPL"):
            return False
    return True


def _gives(verdicts: Sequence[bool], accuracy: float) -> bool:
    return math.isclose(100 * sum(verdicts) / len(verdicts), accuracy, abs_tol=1e-6)
