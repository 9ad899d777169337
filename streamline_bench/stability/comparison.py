"""The result of comparing two runs: frozen models per task, per group, and over all tasks.

What is not defined for a task (calibration of generated text, the chance of a task without choices)
is None, never a stand-in number.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.settings import Mode, Quantity
from streamline_bench.stability.texts import GenerationComparison, PerplexityComparison


class Flips(Frozen):
    """How many answers changed, by direction.

    ``wrong_to_other_wrong`` is None where the engine does not say what was chosen.
    """

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other_wrong: int | None

    @property
    def verdicts(self) -> int:
        """Changed verdicts, in both directions."""
        return self.right_to_wrong + self.wrong_to_right


class Clusters(Frozen):
    """Documents that belong together (one passage, one subject).

    Attributes:
        kind: what a cluster is, in the plural ("passages").
        count: clusters; documents that stand alone count as one each.
        largest: documents of the largest.
    """

    kind: str
    count: int
    largest: int


class ChoiceShift(Frozen):
    """How the distribution over the choices moved: softmax of their log-likelihoods.

    Attributes:
        n: documents with at least two choices.
        kl: mean KL(dense || pruned) per document, in nats.
        js: mean Jensen-Shannon divergence, in nats (at most ln 2).
        margin_n: documents of these with exactly one right choice.
        dense_margin, pruned_margin: mean of right choice minus best other choice, in nats.
        margin_shift: pruned margin - dense margin, mean per document.
    """

    n: int
    kl: Estimate
    js: Estimate
    margin_n: int
    dense_margin: float | None
    pruned_margin: float | None
    margin_shift: Estimate | None


class Calibration(Frozen):
    """Do the shares of the choices (softmax) mean what they say?

    Attributes:
        n: documents with exactly one right choice.
        bins: of equal numbers of documents: 15, or as many as leave 20 documents in each.
        dense_error, pruned_error: expected calibration error: mean over bins, weighted by their
            documents, of |accuracy - mean share of the chosen|.
        dense_brier, pruned_brier: mean over documents of the sum over choices of
            (share - [right])², in [0, 2].
        brier_shift: pruned - dense, mean per document.
    """

    n: int
    bins: int
    dense_error: float
    pruned_error: float
    dense_brier: float
    pruned_brier: float
    brier_shift: Estimate


Decision = Literal["better", "no worse than margin", "worse", "cannot tell"]
"""What the paired difference d (pruned - dense) allows to say, in this order:

- ``better``: d > 0 and significant;
- ``no worse than margin``: the lower end of ``difference`` is above -margin (non-inferior; the drop
  may still be significant, then it is real and smaller than the margin);
- ``worse``: d < 0 and significant, and the interval does not exclude a drop of the margin or more;
- ``cannot tell``: none of these; more documents are needed (see ``detectable``).

Significant means, for macro and micro (one test each): ``p_value`` is below 1 - confidence, and
``difference`` excludes 0. For tasks and groups (a family of tests): ``p_holm`` is below it, and
``adjusted`` excludes 0. A task whose ``difference`` excludes 0 while its ``adjusted`` does not is
significant by itself, but not among as many tasks as were tried.
"""


class GradedMetric(Frozen):
    """A metric of a task that is more than right or wrong on a document.

    Attributes:
        metric: its name in the samples.
        kind: ``grade``: between 0 and 1, or between 0 and 100, from which it is brought to 0 to 1
            (``scale``); ``ratio``: positive without such a bound (a length, a perplexity), compared
            as a multiple; ``difference``: some values are negative, compared as they are.
        higher_is_better: as the task says; taken as True where it says nothing.
        decides: it is what the task is judged by.
        n: documents.
    """

    task: str
    filter: str
    metric: str
    kind: Literal["grade", "ratio", "difference"]
    scale: float = 1.0
    higher_is_better: bool = True
    decides: bool
    n: int


class GradeComparison(GradedMetric):
    """A graded metric, dense against pruned.

    Attributes:
        dense, pruned: means over documents, with standard error.
        difference: pruned - dense, bootstrap over documents or clusters; None for ratios.
        ratio: pruned mean / dense mean, likewise; None for the others, and where the dense is 0.
        wins, ties, losses: documents on which the pruned model is better, equal, worse.
        p_value, p_method, p_holm, adjusted, margin, noninferiority_p, decision: as for a task with
            verdicts, of the difference; adjusted over the grades that decide. None for ratios.
        clusters: None where every document stands alone.
        noise_moved: share of documents that get another grade between dense and dense again.
        moved_above_noise: share of documents that get another grade, minus ``noise_moved``.
    """

    dense: Estimate
    pruned: Estimate
    difference: Estimate | None = None
    ratio: Estimate | None = None
    wins: int
    ties: int
    losses: int
    p_value: float | None = None
    p_method: str | None = None
    p_holm: float | None = None
    adjusted: Estimate | None = None
    margin: float | None = None
    noninferiority_p: float | None = None
    decision: Decision | None = None
    clusters: Clusters | None = None
    noise_moved: float | None = None
    moved_above_noise: Estimate | None = None

    @property
    def improvement(self) -> Estimate | None:
        """The difference, positive where the pruned model is better."""
        if self.difference is None or self.higher_is_better:
            return self.difference
        low, high = self.difference.ends
        known = self.difference.low is not None
        return Estimate(
            value=-self.difference.value,
            low=-high if known else None,
            high=-low if known else None,
        )


class Quadrants(Frozen):
    """Questions by the form in which a model has them right."""

    both: int
    choice_only: int
    free_only: int
    neither: int


class FormatComparison(Frozen):
    """Two tasks that ask the same: one gives choices, one wants a free answer.

    Attributes:
        free, choice: the tasks; ``filter`` is the one that reads the free answers.
        dense, pruned: questions by what each model has right.
        kept: of the questions that the dense model has right in both forms, what the pruned model
            has right of them.
        kept_p: exact McNemar test of both forms being kept equally often; None without such
            questions.
        gap: change of the free answers' accuracy minus that of the choices'; negative where free
            answers lose more. ``p_value`` tests it against 0.
    """

    free: str
    choice: str
    filter: str
    n: int
    dense: Quadrants
    pruned: Quadrants
    kept: Quadrants
    kept_p: float | None
    gap: Estimate
    p_value: float
    p_method: str


class VarianceParts(Frozen):
    """Why one run of a recipe gives another number than the next: variances of a mean over tasks.

    Attributes:
        seeds, calibrations: runs are their combinations.
        question: that other questions would give, in one run.
        seed, calibration: between seeds, between calibration texts; None where there is one.
        both: what a seed does with one text and not with another; None likewise.
        limits: part -> one-sided upper limit of its variance, at the level of the intervals. Two
            runs say little: the limit is far above what they show.
    """

    seeds: int
    calibrations: int
    question: float
    seed: float | None = None
    calibration: float | None = None
    both: float | None = None
    limits: dict[str, float] = Field(default_factory=dict)


class NoiseTask(Frozen):
    """Dense against dense again on one (task, filter), mean over the repetitions."""

    task: str
    filter: str
    n: int
    flips: Estimate
    agreement: Estimate
    same_choice: float | None
    choice_kl: float | None


class NoiseGrade(Frozen):
    """Grades of dense against dense again, mean over the repetitions.

    Attributes:
        moved: share of documents that get another grade.
        difference: again - dense, of the means.
    """

    task: str
    filter: str
    metric: str
    n: int
    moved: Estimate
    difference: float


class NoiseText(Frozen):
    """Generated texts of dense against dense again: the mean share that is not identical."""

    task: str
    filter: str
    n: int
    changed: Estimate


class NoiseFloor(Frozen):
    """What changes when nothing was removed (batch size, dtype or engine changed only).

    Attributes:
        repeats: labels of the repetitions.
        n: documents of all tasks with verdicts; 0 without any, and then what is over them is None.
        flips, agreement: over all documents of all tasks.
        macro_flips: mean over tasks.
        choice_kl: mean over tasks that have choices.
        grades: of metrics that are more than right or wrong.
        texts: of tasks with generated texts.
    """

    dense_run: str
    repeats: tuple[str, ...]
    tasks: tuple[NoiseTask, ...]
    n: int
    flips: Estimate | None = None
    agreement: Estimate | None = None
    macro_flips: float | None = None
    choice_kl: float | None = None
    grades: tuple[NoiseGrade, ...] = ()
    texts: tuple[NoiseText, ...] = ()


class _Decided(Frozen):
    """What tasks, groups and the summaries over tasks have in common.

    Attributes:
        dense_corrected, pruned_corrected: (accuracy - chance) / (1 - chance), chance being the mean
            of 1 / number of choices; None for tasks without choices.
        retention: pruned accuracy / dense accuracy; None where the dense model has none right.
        retention_above_chance: pruned_corrected / dense_corrected; None where the dense model
            cannot be told from guessing (the ratio has no bounds then), for groups and for micro.
        p_value: of no difference, of this one test; ``p_method`` names it. It is below
            1 - confidence exactly where ``difference`` excludes 0: both come from one score test
            (:class:`streamline_bench.stability.statistics.score.PairedDifference`).
        p_holm: ``p_value`` adjusted over the tasks (for a group: over the groups); None for macro
            and micro, and for filters of a task that the summaries leave out, which have no
            ``decision`` either.
        adjusted: the difference with Holm's interval, which excludes 0 exactly where ``p_holm`` is
            below 1 - confidence; None where ``p_holm`` is.
        margin: how large a drop of accuracy is tolerated.
        noninferiority_p: one-sided p of "the drop is the margin or more", not adjusted: below
            (1 - confidence) / 2 exactly where the lower end of ``difference`` is above -margin.
        detectable: smallest true difference that a test at 1 - confidence finds with 80 % power at
            this number of documents and discordant pairs; None where no difference can be found.
        decision: see :data:`Decision`.
        noise_flips: share of verdicts that flip between dense and dense again.
        flips_above_noise: share of verdicts that flip, minus ``noise_flips``.
    """

    dense_corrected: Estimate | None = None
    pruned_corrected: Estimate | None = None
    retention: Estimate | None = None
    retention_above_chance: Estimate | None = None
    p_value: float | None = None
    p_method: str | None = None
    p_holm: float | None = None
    adjusted: Estimate | None = None
    margin: float | None = None
    noninferiority_p: float | None = None
    detectable: float | None = None
    decision: Decision | None = None
    noise_flips: float | None = None
    flips_above_noise: Estimate | None = None


class TaskComparison(_Decided):
    """Dense against pruned on one (task, filter).

    Attributes:
        n: documents.
        verdict: the metric that says right or wrong.
        dense, pruned: accuracy with standard error, cluster-robust where there are clusters.
        difference: pruned - dense, with the interval of its own test; ``adjusted`` is the one
            that counts all tasks.
        mcnemar_p, mcnemar_mid_p: exact McNemar test, and its mid-p variant, over documents.
        agreement: share of equal verdicts, with Wilson's interval at the effective number of
            documents.
        stability: LLM-Streamline's equation 6; None for tasks without choices.
        effective_n: to how many equally weighted documents the stability weights amount.
        same_choice: share of documents on which both choose (or write) the same; None where the
            engine does not say.
        kappa: Cohen's kappa of the verdicts; None where it is undefined.
        answer_kappa: Cohen's kappa of the chosen answers, which is 0 where both models have one
            habit and nothing else; None without choices, and where both give one answer to all.
        chance: mean over documents of 1 / number of choices; None without choices.
        choices: shift of the choice distribution; None without choices.
        calibration: None without choices or known right choices.
        clusters: None where every document stands alone.
    """

    task: str
    filter: str
    output_type: str
    verdict: str
    n: int
    dense: Estimate
    pruned: Estimate
    difference: Estimate
    mcnemar_p: float
    mcnemar_mid_p: float
    agreement: Estimate
    stability: Estimate | None
    effective_n: float | None
    same_choice: float | None
    kappa: float | None
    answer_kappa: float | None = None
    flips: Flips
    chance: float | None = None
    choices: ChoiceShift | None = None
    calibration: Calibration | None = None
    clusters: Clusters | None = None


class _Summary(_Decided):
    """What several tasks have together: the mean of theirs (macro), or over all their documents.

    Chance-corrected accuracy is over ``corrected_tasks`` tasks, shifts of the choice distribution
    over ``choice_tasks``, calibration over ``calibration_tasks``: those that have it.

    Attributes:
        kappa: as for a task; macro: mean over the tasks where it is defined.
        choice_kl, choice_js, margin_shift: as in :class:`ChoiceShift`.
        dense_calibration_error, pruned_calibration_error: as in :class:`Calibration`; over all
            documents the bins are theirs.
        brier_shift: as in :class:`Calibration`.
    """

    kappa: float | None = None
    corrected_tasks: int = 0
    choice_tasks: int = 0
    choice_kl: Estimate | None = None
    choice_js: Estimate | None = None
    margin_shift: Estimate | None = None
    calibration_tasks: int = 0
    dense_calibration_error: float | None = None
    pruned_calibration_error: float | None = None
    brier_shift: Estimate | None = None


class Overall(_Summary):
    """Over all tasks: ``macro`` weighs tasks equally, ``micro`` documents.

    Stability is over the tasks that have one (``stability_tasks`` of them).

    Attributes:
        answer_kappa: macro: mean over the tasks where it is defined; None for micro.
        mcnemar_p: as for a task; None for macro.
        clusters: of all tasks together (micro), where any task has them.
    """

    tasks: int
    n: int
    stability_tasks: int
    dense: Estimate
    pruned: Estimate
    difference: Estimate
    agreement: Estimate
    stability: Estimate | None
    flips: Flips
    answer_kappa: float | None = None
    mcnemar_p: float | None = None
    clusters: Clusters | None = None


class GroupComparison(_Summary):
    """All documents of a group's tasks; its tasks (MMLU's subjects) are the clusters.

    Attributes:
        tasks: compared tasks of the group, at least two.
        dense, pruned: accuracy over documents; the standard error treats tasks as clusters.
        macro_dense, macro_pruned: mean over the tasks of their accuracies.
        stability: over all documents (None in mode ``reference_script``, which pools no tasks).
        macro_stability: mean over the tasks of their stabilities, as the paper averages subjects.
    """

    group: str
    tasks: tuple[str, ...]
    n: int
    dense: Estimate
    pruned: Estimate
    difference: Estimate
    agreement: Estimate
    flips: Flips
    clusters: Clusters
    macro_dense: float | None = None
    macro_pruned: float | None = None
    stability: Estimate | None = None
    macro_stability: Estimate | None = None


class Comparison(Frozen):
    """Everything one comparison of answers finds, and how.

    Attributes:
        macro, micro: None where no task has verdicts (perplexities only).
        not_compared: tasks without verdicts or grades, with the reason; such a task may be among
            ``perplexities`` or ``generations``.
        grades: metrics that are more than right or wrong, those that decide and others.
        formats: pairs of tasks that ask the same, with choices and freely.
        metrics: task -> metric that was asked for in place of the task's own.
        pairs: tasks that were declared to ask the same: free -> choice.
        aggregate_only: task -> metric -> why it is not compared document by document.
    """

    dense_run: str
    pruned_run: str
    mode: Mode
    ddof: int
    quantity: Quantity
    confidence: float
    draws: int
    seed: int
    margin: float | None = None
    tasks: tuple[TaskComparison, ...]
    macro: Overall | None
    micro: Overall | None
    not_compared: dict[str, str]
    groups: tuple[GroupComparison, ...] = ()
    perplexities: tuple[PerplexityComparison, ...] = ()
    generations: tuple[GenerationComparison, ...] = ()
    grades: tuple[GradeComparison, ...] = ()
    formats: tuple[FormatComparison, ...] = ()
    metrics: dict[str, str] = Field(default_factory=dict)
    pairs: dict[str, str] = Field(default_factory=dict)
    aggregate_only: dict[str, dict[str, str]] = Field(default_factory=dict)
