"""The schema of ``leaderboard.json``, the source of every view of a report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from streamline_bench.stability.comparison import Estimate, Overall, TaskComparison

__all__ = [
    "CurvePoint",
    "Flip",
    "Leaderboard",
    "Method",
    "Provenance",
    "Row",
    "ScanResult",
    "TaskScore",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Method(_Frozen):
    """How the runs were compared (see :class:`streamline_bench.stability.settings.Settings`)."""

    mode: str
    ddof: int
    quantity: str
    verdict: str
    confidence: float
    draws: int
    seed: int


class TaskScore(_Frozen):
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


class Flip(_Frozen):
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


class ScanResult(_Frozen):
    """Similarity of layer boundaries (mean cosine, [L+1, L+1]) and the block that was chosen."""

    cosine: list[list[float]]
    num_tokens: int
    start: int | None
    n: int | None


class CurvePoint(_Frozen):
    """One validation of a training."""

    step: int
    train_loss: float | None
    val_loss: float | None


class Provenance(_Frozen):
    """Where the numbers of a row come from."""

    results_file: str
    model: str | None
    engine: str
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
    versions: dict[str, str] = Field(default_factory=dict)


class Row(_Frozen):
    """One model of the leaderboard.

    Attributes:
        cost: "no training", "calibrated" or "recovered"; None for the dense model.
        parameters: of the evaluated model; ``sparsity_reached`` is the share removed.
        accuracy_macro, accuracy_micro: over tasks with verdicts.
        macro, micro: against the dense row; None for the dense row itself.
        other_metrics: task -> metric -> value, for metrics without verdicts (perplexities).
        worst_flips: right before, wrong now; surest first.
    """

    label: str
    is_dense: bool
    title: str = ""
    method: str | None = None
    replacement: str | None = None
    cost: str | None = None
    layers: int | None = None
    layers_before: int | None = None
    parameters: int | None = None
    parameters_before: int | None = None
    sparsity_requested: float | None = None
    sparsity_reached: float | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    accuracy_macro: Estimate
    accuracy_micro: Estimate
    macro: Overall | None
    micro: Overall | None
    tasks: list[TaskScore]
    other_metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    worst_flips: list[Flip] = Field(default_factory=list)
    scan: ScanResult | None = None
    curve: list[CurvePoint] = Field(default_factory=list)
    provenance: Provenance


class Leaderboard(_Frozen):
    """Everything a report shows."""

    kind: Literal["streamline-bench leaderboard"] = "streamline-bench leaderboard"
    schema_version: Literal[1] = 1
    title: str
    dense: str
    method: Method
    rows: list[Row]
    not_compared: dict[str, str] = Field(default_factory=dict)
    commands: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
