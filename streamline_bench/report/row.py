"""One model of a leaderboard: what it is, what it was asked, where its numbers come from."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from streamline_bench.core.recipe.schema import Frozen, MethodParts, PublishedResult
from streamline_bench.report.scores import Flip, GradeScore, SolvedCost, TaskScore
from streamline_bench.stability.comparison import FormatComparison, GroupComparison, Overall
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.texts import (
    GenerationComparison,
    PerplexityComparison,
    TokenDivergence,
)
from streamline_bench.throughput.speed import Speed


class ScanResult(Frozen):
    """Similarity of layer boundaries (mean cosine, [L+1, L+1]) and the layers that were removed.

    ``removed`` names the removed layers, ``n`` is their number; ``start`` is the first of them if
    they are neighbours, else None.
    """

    cosine: list[list[float]]
    num_tokens: int
    start: int | None
    n: int | None
    removed: list[int] = Field(default_factory=list)


class CurvePoint(Frozen):
    """One step of a training; a loss is None if it was not measured or is not finite."""

    step: int
    train_loss: float | None
    val_loss: float | None


class Published(PublishedResult):
    """A published number for the row's method on another model, and ours for comparison.

    ``task`` is the task or group of this report that the metric names; None where there is none.
    ``ours`` is the row's own share for it: accuracy on that task, or stability or retention over
    the row's tasks.
    """

    task: str | None = None
    ours: Estimate | None = None


ComputedBy = str | dict[str, str] | None
"""What computed the answers of a row, by task where that differs; None where nothing says."""


class Provenance(Frozen):
    """Where the numbers of a row come from; the first ones are None without an evaluation.

    ``date`` is when the evaluation ended (ISO 8601), ``machine`` what it ran on; ``computed_by``
    what computed the answers (transformers, vLLM), by task where that differs.
    """

    results_file: str | None
    date: str | None = None
    model: str | None
    engine: str | None
    computed_by: ComputedBy = None
    model_args: Any = None
    source: str | None = None
    source_revision: str | None = None
    source_weights_sha256: str | None = None
    weights_sha256: str | None = None
    recipe: dict[str, Any] | None = None
    chosen: dict[str, Any] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    seed: int | None = None
    machine: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def evaluated_with(self) -> str | None:
        """Harness, and what computed the answers where that is known."""
        by = self.computed_by
        names = dict.fromkeys(by.values()) if isinstance(by, dict) else [by]
        return ", ".join(filter(None, [self.engine, *names])) or None


class SameWeights(Frozen):
    """A row that gave the same weights as the one it is shown with, and was measured with it."""

    label: str
    title: str = ""
    recipe: dict[str, Any] | None = None
    group: str | None = None
    axes: dict[str, Any] = Field(default_factory=dict)


class Row(Frozen):
    """One model of the leaderboard.

    Attributes:
        reference: label of the dense row that it is compared with; None: the board's.
        same_weights: other rows with the same weights, which are not shown by themselves.
        made_elsewhere: of a checkpoint that was not made here: name, revision, how it was loaded,
            hashes and sizes; None for what was made here.
        group: label of the row before axes spanned it; rows of one group differ in ``axes`` only.
        axes: axis (sparsity, n_layers, seed, calibration, model) -> value of this row.
        bytes: of the files of its weights.
        memory: bytes of weights, cache and one pass for the sequences of the board's target.
        not_compared: what cannot be compared with the dense model -> why.
        failed: why there is no result; then accuracies are None and ``tasks`` is empty.
        parts: which layers go, what stands in for them, how the result is trained; None where the
            method cannot be divided so.
        cost: "no training", "calibrated" or "recovered"; None for the dense model.
        parameters: of the evaluated model; ``sparsity_reached`` is the share removed.
        accuracy_macro, accuracy_micro: over tasks with verdicts; None where there are none.
        scored_with: rows that share their lower layers with this one, itself included; numbers do
            not depend on it. Empty where none does.
        scored_alone: why the row shares no layer with the dense one or with any other.
        macro, micro: against the dense row; None for the dense row itself, and where no task has
            verdicts.
        groups, perplexities, generations: against the dense row, where the run has such tasks.
        grades: metrics of tasks that are more than right or wrong.
        grade_change: of those that judge tasks, mean over tasks, positive where they are better.
        formats: pairs of tasks that ask the same, with choices and freely, against the dense row.
        solved: seconds per solved question, where tokens were counted and speed was measured.
        aggregate_only: task -> metric -> why it is known over all documents only.
        divergence: of next-token distributions on the run's text, where the run has one.
        other_metrics: task -> metric -> value, for metrics without verdicts (perplexities).
        throughput: where it was measured.
        worst_flips: answers that were right and are wrong now; the surest first.
        curve, recovery_curve: losses of the replacement's training, and of the recovery's.
        curve_notes: what the curves leave out.
        published: numbers of the literature for this method.
    """

    label: str
    is_dense: bool
    reference: str | None = None
    same_weights: list[SameWeights] = Field(default_factory=list)
    made_elsewhere: dict[str, Any] | None = None
    group: str | None = None
    axes: dict[str, Any] = Field(default_factory=dict)
    bytes: int | None = None
    memory: int | None = None
    not_compared: dict[str, str] = Field(default_factory=dict)
    failed: str | None = None
    title: str = ""
    method: str | None = None
    replacement: str | None = None
    parts: MethodParts | None = None
    cost: str | None = None
    layers: int | None = None
    layers_before: int | None = None
    parameters: int | None = None
    parameters_before: int | None = None
    sparsity_requested: float | None = None
    sparsity_reached: float | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    scored_with: list[str] = Field(default_factory=list)
    scored_alone: str | None = None
    accuracy_macro: Estimate | None
    accuracy_micro: Estimate | None
    macro: Overall | None
    micro: Overall | None
    tasks: list[TaskScore]
    groups: list[GroupComparison] = Field(default_factory=list)
    perplexities: list[PerplexityComparison] = Field(default_factory=list)
    generations: list[GenerationComparison] = Field(default_factory=list)
    grades: list[GradeScore] = Field(default_factory=list)
    grade_change: Estimate | None = None
    formats: list[FormatComparison] = Field(default_factory=list)
    solved: list[SolvedCost] = Field(default_factory=list)
    aggregate_only: dict[str, dict[str, str]] = Field(default_factory=dict)
    divergence: TokenDivergence | None = None
    other_metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    throughput: Speed | None = None
    worst_flips: list[Flip] = Field(default_factory=list)
    scan: ScanResult | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    recovery_curve: list[CurvePoint] = Field(default_factory=list)
    curve_notes: list[str] = Field(default_factory=list)
    published: list[Published] = Field(default_factory=list)
    provenance: Provenance

    @property
    def overridden(self) -> dict[str, tuple[Any, Any]]:
        """Key of the recipe -> (the recipe's own value, the value that was used instead)."""
        found = (self.provenance.recipe or {}).get("overridden")
        pairs = found.items() if isinstance(found, dict) else ()
        return {str(key): (pair[0], pair[1]) for key, pair in pairs if len(pair) == 2}

    @property
    def size(self) -> str | None:
        """The size that was asked for, of a recipe at several: ``25 %`` or ``4 layers``."""
        if (layers := self.axes.get("n_layers")) is not None:
            return f"{layers} layer{'s' * (str(layers) != '1')}"
        share = self.axes.get("sparsity")
        return None if share is None else f"{100 * float(share):g} %"

    @property
    def total_seconds(self) -> float | None:
        """Everything the row took; None where nothing was timed."""
        return sum(self.seconds.values()) or None

    @property
    def speed(self) -> Speed | None:
        """The throughput, where it was measured without a failure."""
        return self.throughput if self.throughput and self.throughput.status == "ok" else None
