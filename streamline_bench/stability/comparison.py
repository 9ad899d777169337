"""The result of comparing two runs: one frozen model per task, and macro and micro summaries."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from streamline_bench.stability.metrics import Mode, Quantity

__all__ = ["Comparison", "Estimate", "Flips", "Overall", "TaskComparison"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Frozen):
    """A number with what is known of its error; ``method`` names the interval's."""

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    method: str | None = None


class Flips(_Frozen):
    """How many answers changed, by direction.

    ``wrong_to_other_wrong`` is None where the engine does not say what was chosen.
    """

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other_wrong: int | None


class TaskComparison(_Frozen):
    """Dense against pruned on one (task, filter).

    Attributes:
        n: documents.
        verdict: the metric that says right or wrong.
        dense, pruned: accuracy with standard error.
        difference: pruned - dense, with Newcombe's paired interval.
        mcnemar_p, mcnemar_mid_p: exact McNemar test, and its mid-p variant.
        agreement: share of equal verdicts, with Wilson's interval.
        stability: LLM-Streamline's equation 6; None for tasks without choices.
        effective_n: to how many equally weighted documents the stability weights amount.
        same_choice: share of documents on which both choose (or write) the same; None where the
            engine does not say.
        kappa: Cohen's kappa of the verdicts; None where it is undefined.
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
    flips: Flips


class Overall(_Frozen):
    """Over all tasks: ``macro`` weighs tasks equally, ``micro`` documents.

    Stability is over the tasks that have one (``stability_tasks`` of them).
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
    mcnemar_p: float | None = None
    kappa: float | None = None


class Comparison(_Frozen):
    """Everything :func:`streamline_bench.stability.compare.compare` finds, and how."""

    dense_run: str
    pruned_run: str
    mode: Mode
    ddof: int
    quantity: Quantity
    confidence: float
    draws: int
    seed: int
    tasks: tuple[TaskComparison, ...]
    macro: Overall
    micro: Overall
    not_compared: dict[str, str]
