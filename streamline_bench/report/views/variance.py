"""Where the variance of folded rows comes from: accuracy (or grades), stability and token KL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from streamline_bench.report import text
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.places import Folded
from streamline_bench.stability.comparison import VarianceParts

PARTS = ("question", "seed", "calibration", "both")


class VarianceLine(NamedTuple):
    """A quantity of a folded row, and the standard deviations that every part gives one run."""

    label: str
    runs: str
    quantity: str
    mean: str
    parts: list[str]


def variance_lines(board: Leaderboard) -> list[VarianceLine]:
    """The lines of the table; shares in points, token KL in nats."""
    return [line for fold in board.folded for line in _of_fold(fold)]


def note(board: Leaderboard) -> str:
    """What the numbers of the table mean."""
    return (
        "Standard deviations of one run, in points (token KL: in nats, its questions are the "
        "documents of the text): that other questions, another seed, another calibration text "
        f"would give. Behind < stands the upper {board.level} limit (one-sided, chi-square): what "
        "is below it cannot be excluded. Two runs are one degree of freedom and exclude little; a "
        "number before it is an estimate, and where none stands, the runs differ no more than "
        "questions make them differ. The interval of the mean holds all parts: Student's "
        "distribution, by part, squares added."
    )


def _of_fold(fold: Folded) -> Iterator[VarianceLine]:
    runs = f"{fold.variance.seeds} \N{MULTIPLICATION SIGN} {fold.variance.calibrations}"
    if fold.accuracy is not None:
        mean = text.with_interval(fold.accuracy)
        yield VarianceLine(fold.label, runs, "accuracy, %", mean, _cells(fold.variance))
    else:
        mean = text.with_interval(fold.grade_change, signed=True)
        yield VarianceLine(fold.label, runs, "grades, change", mean, _cells(fold.variance))
    if fold.stability is not None and fold.stability_variance is not None:
        mean = text.with_interval(fold.stability)
        yield VarianceLine(fold.label, runs, "stability, %", mean, _cells(fold.stability_variance))
    if fold.token_kl is not None and fold.token_kl_variance is not None:
        mean = f"{text.decimal(fold.token_kl.value)} {text.nats(fold.token_kl)}"
        cells = _cells(fold.token_kl_variance, unit=1.0)
        yield VarianceLine(fold.label, runs, "token KL, nats", mean, cells)


def _cells(parts: VarianceParts, unit: float = 100.0) -> list[str]:
    """Standard deviations: ``1.20 < 19.10``, ``< 3.40``, or a dash where a part has one level."""

    def written(variance: float) -> str:
        return f"{unit * math.sqrt(variance):.2f}"

    found = []
    for name in PARTS:
        value, limit = getattr(parts, name), parts.limits.get(name)
        if value is None:
            found.append(text.MISSING)
        elif limit is None:
            found.append(written(value))
        else:
            found.append(f"{written(value)} < {written(limit)}" if value else f"< {written(limit)}")
    return found
