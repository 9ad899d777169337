"""What a row of a leaderboard was asked, and how it did: tasks, grades, what flipped."""

from __future__ import annotations

from collections.abc import Sequence

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.stability.comparison import GradeComparison, GradedMetric, TaskComparison
from streamline_bench.stability.estimate import Estimate, square_and_add
from streamline_bench.stability.texts import LengthChange


class TaskData(Frozen):
    """Where a task's documents come from; ``dataset`` is an id of the Hugging Face Hub."""

    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    shots: int | None = None


class GivenAnswer(Frozen):
    """The answer that a row gave most often, and the share of questions that it gave it to."""

    answer: str
    share: float


class GuessingLevel(Frozen):
    """What a task gives to whom does not read its questions, and whether the dense model has more.

    Attributes:
        n: documents.
        chance: mean over documents of 1 / number of choices; None without choices.
        constant: the majority-class baseline: accuracy of the most frequent right answer, given to
            every question; None where no answer can be.
        answer: that answer.
        dense: accuracy of the dense model, with Wilson's interval.
        above_constant: its accuracy - ``constant``, paired (Tango's score).
        beaten: the dense model is better than both: the interval of ``dense`` is above ``chance``,
            that of ``above_constant`` above 0.
    """

    task: str
    n: int
    chance: float | None
    constant: float | None
    answer: str | None
    dense: Estimate
    above_constant: Estimate | None
    beaten: bool

    @property
    def level(self) -> float:
        """The better of both baselines."""
        return max(self.chance or 0.0, self.constant or 0.0)


class TaskScore(Frozen):
    """One task of one row; ``comparison`` is None for the dense row.

    ``main`` marks the filter of a task that the summaries over tasks use. ``given`` is the row's
    most frequent answer; None where the engine does not say what was chosen.
    """

    task: str
    filter: str
    main: bool
    output_type: str
    verdict: str
    n: int
    accuracy: Estimate
    comparison: TaskComparison | None
    given: GivenAnswer | None = None
    data: TaskData | None = None

    @property
    def name(self) -> str:
        """The task, with its filter if that is not the task's main one."""
        return self.task if self.main else f"{self.task} ({self.filter})"

    @property
    def shots(self) -> int | None:
        """The number of few-shot examples that the evaluation's results record."""
        return self.data.shots if self.data else None


class GradeScore(GradedMetric):
    """A graded metric of one row; ``comparison`` is None for a dense row.

    ``value`` is the mean over documents, of a grade divided by ``scale``. ``main`` marks the filter
    that counts.
    """

    main: bool
    value: Estimate
    comparison: GradeComparison | None

    @property
    def name(self) -> str:
        """The task, with its filter if that is not the task's main one."""
        return self.task if self.main else f"{self.task} ({self.filter})"


def grade_change(scores: Sequence[GradeScore]) -> Estimate | None:
    """Change of the grades that judge tasks, mean over tasks, positive where they are better.

    Distances to the ends of the tasks' intervals add up by squares. None without such grades.
    """
    found = [
        improvement
        for score in scores
        if score.main and score.decides and score.kind == "grade" and score.comparison
        and (improvement := score.comparison.improvement)
    ]  # fmt: skip
    return square_and_add(found) if found else None


class SolvedCost(Frozen):
    """Seconds per solved question: tokens of all answers / right answers / tokens per second.

    Time counts as it was measured for the row's ``throughput``: at its batch size, by its clock
    (processor seconds on a processor). A pruned model that writes more for each right answer is
    slower than its tokens per second say.

    Attributes:
        tokens: generated per solved question.
        dense, row: seconds per solved question.
        ratio: row / dense. Its interval holds the choice of documents and, where it is known, the
            error of the ratio of speeds, added by squares of logarithms.
    """

    task: str
    filter: str
    tokens: LengthChange
    dense: float | None
    row: float | None
    ratio: Estimate | None


class Flip(Frozen):
    """An answer that was right before and is wrong now, for reading.

    ``dense_shares`` and ``pruned_shares`` are softmax of the choices' log-likelihoods; ``drop`` is
    by how much the share of the right choice fell. For generation the texts are given instead.
    """

    task: str
    doc_id: int
    prompt: str
    choices: list[str] | None
    gold: int | None
    target: str
    dense_choice: int | None
    pruned_choice: int | None
    dense_shares: list[float] | None
    pruned_shares: list[float] | None
    dense_text: str | None
    pruned_text: str | None
    drop: float | None
