"""How rows stand to each other: ranks, contests, what patches add, folded rows."""

from __future__ import annotations

from pydantic import Field

from streamline_bench.core.recipe.schema import Frozen, MethodParts
from streamline_bench.stability.comparison import Decision, VarianceParts
from streamline_bench.stability.estimate import Estimate

RANDOM = "random_layers"
"""The method whose rows every selection has to beat."""


class Rank(Frozen):
    """Place by accuracy among the compressed rows, rows of seeds and calibrations folded.

    On a board of several sizes: among those of which the same size was asked.

    Attributes:
        low, high: its interval: paired bootstrap over documents.
        first: share of the draws in which no other is better.
    """

    place: int
    low: int
    high: int
    first: float


class Between(Frozen):
    """Two entries (rows, or folded rows) tested on the same documents.

    Attributes:
        n: documents, all tasks together.
        discordance: share of them on which exactly one is right (folded rows: mean distance of
            their shares of right answers).
        difference: first - second, mean over tasks.
        p_holm: adjusted over the tests that it stands among.
        needed: documents at which the difference seen would be found with 80 % power; None where
            no number of documents would do.
    """

    first: str
    second: str
    n: int
    discordance: float
    difference: Estimate
    p_value: float
    p_holm: float
    p_method: str
    needed: int | None = None


class Contest(Frozen):
    """Entries of equal cost and about equal size, best first, each tested against the first.

    Attributes:
        removed: least and largest share of the dense model's parameters that is missing.
        accuracy: of the first.
        tests: the first against each of the others, in their order; ``p_holm`` is over them.
    """

    cost: str | None
    removed: tuple[float, float]
    entries: list[str] = Field(min_length=2)
    accuracy: float
    tests: list[Between]


class Gain(Frozen):
    """What a patch adds: an entry against the one of the same selection, size and healing without.

    Attributes:
        entry, without: labels.
        parts: of the entry.
        size: what both were asked to remove, in words.
        test: the entry against the one without, on the same documents; ``p_holm`` is over all
            gains. None where no task has verdicts.
        token_kl, token_kl_without: of both, as a row's ``divergence.kl``.
        token_kl_change: the one less the other, paired by document of the text; None for rows over
            seeds or calibrations as one, and of records of older versions.
    """

    entry: str
    without: str
    parts: MethodParts
    size: str
    test: Between | None = None
    token_kl: Estimate | None = None
    token_kl_without: Estimate | None = None
    token_kl_change: Estimate | None = None


class Folded(Frozen):
    """Rows of one recipe and size that differ in seed or calibration text, as one.

    Attributes:
        members: labels of the runs; one may have the weights of another, and its row.
        accuracy, difference, stability: means over tasks with verdicts; their intervals hold the
            choice of questions and the method's own variance
            (:mod:`streamline_bench.stability.statistics.crossed`).
        grade_change: as a row's, likewise.
        p_value, decision: of the difference; of the change of grades where no task has verdicts.
        token_kl: as a row's ``divergence.kl``.
        variance: why one run differs from the next: in accuracy, or in grades where no task has
            verdicts.
        stability_variance, token_kl_variance: the same of these; None where they are not known by
            question, or by document of the text.
    """

    label: str
    members: list[str]
    accuracy: Estimate | None = None
    difference: Estimate | None = None
    grade_change: Estimate | None = None
    p_value: float
    decision: Decision
    stability: Estimate | None = None
    token_kl: Estimate | None = None
    variance: VarianceParts
    stability_variance: VarianceParts | None = None
    token_kl_variance: VarianceParts | None = None
