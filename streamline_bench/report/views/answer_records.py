"""Single answers as records of Every Eval Ever's schema 0.3.0 (arXiv 2606.14516)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from streamline_bench.report.row import Row
from streamline_bench.stability.comparison import GradeComparison, TaskComparison
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.samples import Samples

SCHEMA_VERSION = "0.3.0"

Fields = dict[str, Any]


class Scored(NamedTuple):
    """One metric of one task of a row, of verdicts or of grades alike.

    ``scale`` divides what an answer has; ``least`` and ``most`` are None where there is no bound.
    """

    task: str
    filter: str
    name: str
    metric: str
    n: int
    value: Estimate
    comparison: TaskComparison | GradeComparison | None
    lower_is_better: bool = False
    least: float | None = 0.0
    most: float | None = 1.0
    scale: float = 1.0


_ENDS = {"grade": (0.0, 1.0), "ratio": (0.0, math.inf), "difference": (None, None)}


def scored(row: Row) -> Iterator[Scored]:
    """Every metric of a row that each of its answers has."""
    for task in row.tasks:
        yield Scored(
            task.task, task.filter, task.name, task.verdict, task.n, task.accuracy, task.comparison
        )
    for grade in row.grades:
        least, most = _ENDS[grade.kind]
        yield Scored(
            grade.task, grade.filter, grade.name, grade.metric, grade.n, grade.value,
            grade.comparison, not grade.higher_is_better, least, most, grade.scale,
        )  # fmt: skip


def answer_lines(
    score: Scored, samples: Samples | None, identity: Mapping[str, str]
) -> Iterator[str]:
    """One line of JSON per answer; it is called correct where its metric is 1."""
    if samples is None:
        return
    frame = samples.frame
    chosen = frame[(frame["task"] == score.task) & (frame["filter"] == score.filter)]
    answers: list[Fields] = chosen.to_dict("records")  # type: ignore[assignment]
    for answer in answers:
        value = float(answer["metrics"].get(score.metric, answer["correct"])) / score.scale
        line = {
            "schema_version": SCHEMA_VERSION,
            **identity,
            "evaluation_name": score.name,
            "evaluation_result_id": result_id(score.metric, score.filter),
            "sample_id": str(answer["doc_id"]),
            "interaction_type": "single_turn",
            **_said(answer, score.metric),
            "evaluation": {"score": value, "is_correct": value == 1.0},
            "metadata": texts({name: answer[name] for name in ("doc_hash", "prompt_hash")}),
        }
        yield json.dumps(line, allow_nan=False) + "\n"


def _said(answer: Mapping[str, Any], metric: str) -> Fields:
    """Question, expected answer, and the model's: the text, or the likeliest choice."""
    choices, gold = answer["choices"], _place(answer["gold"])
    by_length = metric == "acc_norm"
    taken = _place(answer["prediction_norm" if by_length else "prediction"])
    how = answer["filter"] or "none"
    if choices is not None:
        how = "highest loglikelihood" + (" per character" if by_length else "")
    text = answer["text"] if choices is None or taken is None else choices[taken].strip()
    said = [] if text is None else [str(text)]
    expected = answer["target"] if choices is None or gold is None else choices[gold].strip()
    key = json.dumps({"raw": answer["prompt"], "reference": expected}, sort_keys=True)
    return {
        "sample_hash": hashlib.sha256(key.encode()).hexdigest(),
        "input": {
            "raw": answer["prompt"],
            "reference": [expected],
            **({"choices": [choice.strip() for choice in choices]} if choices is not None else {}),
        },
        "output": {"raw": said},
        "answer_attribution": [
            {"turn_idx": 0, "source": "output.raw", "extracted_value": each,
             "extraction_method": how, "is_terminal": True}
            for each in said
        ],
    }  # fmt: skip


def _place(value: Any) -> int | None:
    """A place in a list of choices; None for what pandas calls missing."""
    return int(value) if isinstance(value, int) else None


def texts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The schema wants texts; what is not known is left out."""
    return {name: str(value) for name, value in facts.items() if value is not None}


def result_id(metric: str, chosen: str) -> str:
    return metric if chosen in ("", "none") else f"{metric}:{chosen}"
