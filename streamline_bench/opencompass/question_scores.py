"""What an evaluator of OpenCompass says of each question, where it reports a mean only.

ROUGE and LongBench's evaluators give one number for a data set. :class:`EachQuestion` stands for
such an evaluator in a config: the number stays as it is, and the details get what the same
evaluator gives for every question alone, if the mean of that is the number.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from opencompass.registry import ICL_EVALUATORS

Score = Callable[..., dict[str, Any]]


class EachQuestion:
    """Builds an evaluator whose results have numbers of every question.

    Args:
        evaluator: config of the evaluator.
    """

    def __new__(cls, evaluator: Mapping[str, Any]) -> Any:
        """Return the evaluator itself, with another ``score``."""
        built = ICL_EVALUATORS.build(dict(evaluator))
        built.score = with_questions(built.score)
        return built


def with_questions(score: Score) -> Score:
    """Let ``score`` add details, where it has none and takes predictions and references only."""

    @functools.wraps(score)  # OpenCompass looks at the names of its parameters
    def scored(**given: Any) -> dict[str, Any]:
        whole = score(**given)
        if given.keys() != {"predictions", "references"} or "details" in whole:
            return whole
        details = question_details(score, whole, given["predictions"], given["references"])
        return {**whole, "details": details} if details else whole

    return scored


def question_details(
    score: Score, whole: dict[str, Any], predictions: Any, references: Any
) -> list[dict[str, float]]:
    """Numbers of every question whose mean is the whole's; those of right or wrong as 1 and 0.

    ROUGE is reported as the median of resampled means. The mean itself is then added to ``whole``,
    as what belongs to the questions.
    """
    parts = [
        score(predictions=[prediction], references=[reference])
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    found: dict[str, list[float]] = {}
    for name, value in list(whole.items()):
        given = [part.get(name) for part in parts]
        values = [float(each) for each in given if isinstance(each, int | float)]
        if not parts or len(values) < len(parts) or not isinstance(value, int | float):
            continue
        mean = statistics.fmean(values)
        same = math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-6)
        if not same and not (name.startswith("rouge") and _is_near(mean, value, values)):
            continue
        if not same:
            whole[f"{name} (mean of questions)"] = mean
        scale = 100 if set(values) <= {0, 100} else 1
        found[name] = [each / scale for each in values]
    return [dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)]


def _is_near(mean: float, median: float, values: list[float]) -> bool:
    """Whether the median of resampled means may be this: within three of their errors."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return abs(mean - median) <= 3 * error
