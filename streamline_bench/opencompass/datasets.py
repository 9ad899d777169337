"""The bundled tasks as an OpenCompass data set, and an evaluator for their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from opencompass.datasets.base import BaseDataset
from opencompass.openicl.icl_evaluator import BaseEvaluator

from streamline_bench.core.machine.environment import resource
from streamline_bench.errors import StreamlineBenchError


class BundledDataset(BaseDataset):  # type: ignore[misc]
    """One of the bundled tasks (see ``tasks/lm_eval/bundled``); nothing is downloaded.

    Columns: ``context``; with choices also ``choice0``, ``choice1``, ... and ``gold`` (their
    index); else ``answer`` (a list with the right answer).
    """

    @staticmethod
    def load(skill: str) -> Dataset:
        """Return the questions of a skill.

        Raises:
            StreamlineBenchError: there is no such skill.
        """
        folder = resource("tasks") / "lm_eval" / "bundled" / "data"
        path = folder / f"{skill}.jsonl"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl")))
            raise StreamlineBenchError(f"There is no bundled task '{skill}'; there are: {known}.")
        lines = path.read_text(encoding="utf-8").splitlines()
        return Dataset.from_list([_row(json.loads(line)) for line in lines])


def _row(question: dict[str, Any]) -> dict[str, Any]:
    if "answer" in question:
        return {"context": question["context"], "answer": [question["answer"]]}
    choices = {f"choice{number}": text for number, text in enumerate(question["choices"])}
    return {"context": question["context"], **choices, "gold": question["gold"]}


class ExactMatchEvaluator(BaseEvaluator):  # type: ignore[misc]
    """Right is an answer equal to one of the references, white space around it aside.

    (OpenCompass's own EMEvaluator cuts both at the first comma and drops articles.)
    """

    def score(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]
    ) -> dict[str, Any]:
        """Return ``score`` (percent) and, per question, ``pred``, ``answer`` and ``correct``."""
        if len(predictions) != len(references):
            return {"error": "predictions and references have different length"}
        details: list[dict[str, Any]] = []
        for prediction, reference in zip(predictions, references, strict=True):
            answers = [reference] if isinstance(reference, str) else list(reference)
            right = prediction.strip() in {answer.strip() for answer in answers}
            details.append({"pred": prediction, "answer": answers, "correct": right})
        right_ones = sum(detail["correct"] for detail in details)
        return {"score": 100 * right_ones / max(1, len(details)), "details": details}
