"""``leaderboard.json``, the source of every view of a report: schema, reader and writer.

:func:`json_schema` gives it as JSON Schema; ``reports/leaderboard.schema.json`` holds the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from streamline_bench.core.files import read_json, validated
from streamline_bench.core.recipe.schema import Frozen, MethodParts, PublishedResult
from streamline_bench.errors import SamplesError
from streamline_bench.report.fronts import Front
from streamline_bench.stability.comparison import (
    Decision,
    FormatComparison,
    GradeComparison,
    GradedMetric,
    GroupComparison,
    NoiseFloor,
    Overall,
    TaskComparison,
    VarianceParts,
)
from streamline_bench.stability.estimate import Estimate, square_and_add
from streamline_bench.stability.texts import (
    GenerationComparison,
    LengthChange,
    PerplexityComparison,
    TokenDivergence,
)
from streamline_bench.throughput.speed import Speed


class Procedure(Frozen):
    """How the runs were compared (see :class:`streamline_bench.stability.settings.Settings`)."""

    mode: str
    ddof: int
    quantity: str
    verdict: str
    confidence: float
    draws: int
    seed: int
    margin: float | None = None
    metrics: dict[str, str] = Field(default_factory=dict)
    pairs: dict[str, str] = Field(default_factory=dict)


class TaskData(Frozen):
    """Where a task's documents come from; ``dataset`` is an id of the Hugging Face Hub."""

    dataset: str | None = None
    subset: str | None = None
    split: str | None = None
    shots: int | None = None


class TaskScore(Frozen):
    """One task of one row; ``comparison`` is None for the dense row.

    ``main`` marks the filter of a task that the summaries over tasks use.
    """

    task: str
    filter: str
    main: bool
    output_type: str
    verdict: str
    n: int
    accuracy: Estimate
    comparison: TaskComparison | None
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


class Rank(Frozen):
    """Place by accuracy among the compressed rows, rows of seeds and calibrations folded.

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
    """

    entry: str
    without: str
    parts: MethodParts
    size: str
    test: Between | None = None
    token_kl: Estimate | None = None
    token_kl_without: Estimate | None = None


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
    def total_seconds(self) -> float | None:
        """Everything the row took; None where nothing was timed."""
        return sum(self.seconds.values()) or None

    @property
    def speed(self) -> Speed | None:
        """The throughput, where it was measured without a failure."""
        return self.throughput if self.throughput and self.throughput.status == "ok" else None


class Leaderboard(Frozen):
    """Everything a report shows; the dense row always has a result.

    Version 4 adds ``grades`` and ``aggregate_only`` to rows and ``metrics`` to the method; a file
    of version 3 is one without them. Version 5 adds ``grade_ranks``, ``grade_change``,
    ``formats``, ``solved`` and ``memory`` to rows, ``computed_by`` to their provenance, numbers of
    tokens to ``generations``, grades to ``noise`` (whose other numbers may be missing then),
    ``pairs`` to the method, ``target`` and ``fronts``; what is folded has no accuracy where no task
    has verdicts. It may have ``parts`` of rows and ``gains``.
    A file of version 4 is one without them.

    Attributes:
        ranks: entry (row or folded row) -> its place by accuracy.
        grade_ranks: the same by the mean of the grades that judge tasks.
        folded: rows over seeds and calibrations.
        neighbours: every entry against the next one of the ranking, Holm's adjustment over all.
        contests: entries that may be compared, the largest group first.
        gains: what patches add, by healing, selection and size.
        target: what the sizes of rows were solved for, in words.
        fronts: of accuracy against costs; empty where neither a target nor a search was asked for.
        not_read: for files of the evaluations (``row: file``) why they are not read.
    """

    kind: Literal["streamline-bench leaderboard"] = "streamline-bench leaderboard"
    schema_version: Literal[3, 4, 5] = 5
    title: str
    dense: str
    method: Procedure
    rows: list[Row] = Field(min_length=1)
    ranks: dict[str, Rank] = Field(default_factory=dict)
    grade_ranks: dict[str, Rank] = Field(default_factory=dict)
    folded: list[Folded] = Field(default_factory=list)
    neighbours: list[Between] = Field(default_factory=list)
    contests: list[Contest] = Field(default_factory=list)
    gains: list[Gain] = Field(default_factory=list)
    target: str | None = None
    fronts: list[Front] = Field(default_factory=list)
    noise: NoiseFloor | None = None
    not_compared: dict[str, str] = Field(default_factory=dict)
    commands: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    failed_jobs: dict[str, str] = Field(default_factory=dict)
    ignored_options: list[str] = Field(default_factory=list)
    not_read: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _dense_row(self) -> Leaderboard:
        dense = {row.label: row for row in self.rows if row.is_dense}
        wanted = {self.dense, *(row.reference for row in self.rows if row.reference)}
        if missing := sorted(wanted - dense.keys()):
            raise ValueError(f"the row '{missing[0]}' must be marked as dense")
        for label, row in dense.items():
            if label in wanted and (row.failed or (row.tasks and row.accuracy_macro is None)):
                raise ValueError(f"the dense row '{label}' has no result")
        return self

    @property
    def shown_as(self) -> dict[str, Row]:
        """Label -> the row that shows it: runs that gave the same weights share one."""
        found = {row.label: row for row in self.rows}
        for row in self.rows:
            for twin in getattr(row, "same_weights", ()):
                found.setdefault(twin.label, row)
        return found

    @property
    def shown_ranks(self) -> dict[str, Rank]:
        """Places by accuracy; by grades where no task has right or wrong answers."""
        return self.ranks or self.grade_ranks

    @property
    def dense_row(self) -> Row:
        """The row that the others are compared with, where they name no other."""
        return next(row for row in self.rows if row.label == self.dense)

    def other_reference(self, row: Row) -> str | None:
        """The dense row that a row is compared with, where it is not the board's."""
        return row.reference if row.reference != self.dense and not row.is_dense else None

    @property
    def level(self) -> str:
        """The confidence of the intervals: ``95 %``."""
        return f"{100 * self.method.confidence:g} %"


def read_leaderboard(path: Path) -> Leaderboard:
    """Read and validate a ``leaderboard.json``.

    Raises:
        SamplesError: the file is missing, damaged or of another schema version.
    """
    return parse_leaderboard(read_json(Path(path), SamplesError, _ADVICE), str(path))


_ADVICE = "make the report again"


def parse_leaderboard(payload: Any, origin: str) -> Leaderboard:
    """Validate what a ``leaderboard.json`` holds; ``origin`` is named in errors.

    Raises:
        SamplesError: see :func:`read_leaderboard`.
    """
    return validated(Leaderboard, payload, origin, newest=5, error=SamplesError, advice=_ADVICE)


def to_json(board: Leaderboard) -> str:
    """The leaderboard as JSON without blanks, every number unrounded.

    Raises:
        SamplesError: a number is not finite; its place is named.
    """
    payload = board.model_dump(mode="json")
    try:
        return (
            json.dumps(payload, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
        )
    except ValueError:
        raise SamplesError(
            f"The leaderboard holds a number that is not finite, in {_not_finite(payload)}; no "
            "report is written."
        ) from None


def _not_finite(value: object, where: str = "") -> str:
    """The first place of such a number, e.g. ``rows.2.scan.cosine.0.1``."""
    if isinstance(value, float):
        return where if not math.isfinite(value) else ""
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        parts = list(enumerate(value))
    else:
        return ""
    inside = (_not_finite(part, f"{where}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, inside), "")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of ``leaderboard.json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Leaderboard.model_json_schema(),
    }
