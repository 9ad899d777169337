"""Dense against pruned on one task: verdicts, and perplexities of given texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.comparison import Flips, TaskComparison
from streamline_bench.stability.estimate import Estimate, exponential, exponentiated
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics import BoolArray, FloatArray
from streamline_bench.stability.statistics.choices import (
    ChoiceMeasures,
    calibration,
    choice_shift,
    measure_choices,
)
from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.guessing import (
    Answers,
    answer_kappa,
    chosen,
    retention_above_chance,
)
from streamline_bench.stability.statistics.intervals import mean_estimate, mean_per_unit
from streamline_bench.stability.statistics.paired import (
    Outcomes,
    PairedSample,
    kappa,
    mcnemar,
    retention,
    wilson_estimate,
)
from streamline_bench.stability.statistics.score import PairedDifference
from streamline_bench.stability.statistics.stability import (
    choice_spread,
    effective_sample_size,
    stability_estimate,
)
from streamline_bench.stability.texts import PerplexityComparison

Unit = Literal["word", "byte", "answer"]

# lm-eval logs (log-likelihood, number of units) per document under these names.
_METRICS: dict[Unit, tuple[str, ...]] = {
    "word": ("word_perplexity",),
    "byte": ("byte_perplexity", "bits_per_byte"),
}
_ANSWER = "perplexity"  # one log-likelihood per document

PERPLEXITIES = frozenset({_ANSWER, *(name for names in _METRICS.values() for name in names)})
"""Metrics that :func:`compare_perplexities` compares."""


@dataclass(frozen=True)
class ComparedTask:
    """One compared task, with what the summaries over tasks need of it.

    Attributes:
        sample: the verdicts, counted.
        right, right_now: bool [n], verdicts of the dense and of the pruned model.
        std: float64 [n], spread of the dense model's choices; None for tasks without choices.
        measures: of the choices, per document; None likewise.
        clusters: None where every document stands alone.
    """

    result: TaskComparison
    sample: PairedSample
    right: BoolArray
    right_now: BoolArray
    std: FloatArray | None
    measures: ChoiceMeasures | None
    clusters: ClusterLabels | None

    @property
    def agree(self) -> BoolArray:
        """Same verdict, bool [n]."""
        same: BoolArray = self.right == self.right_now
        return same


def compare_task(dense: pd.DataFrame, pruned: pd.DataFrame, settings: Settings) -> ComparedTask:
    """Compare aligned rows of one (task, filter); every row has a verdict.

    Raises:
        NumericsError: a log-likelihood or a spread is not finite; the document is named.
    """
    first = dense.iloc[0]
    names = (str(first["task"]), str(first["filter"]))
    right = dense[settings.verdict].to_numpy(dtype=np.bool_)
    right_now = pruned[settings.verdict].to_numpy(dtype=np.bool_)
    measures = measure_choices(dense, pruned)
    clusters = cluster_labels(dense["cluster"])
    std = stable = None
    if measures is not None:
        std = choice_spread(dense, quantity=settings.spread_quantity, ddof=settings.spread_ddof)
        stable = stability_estimate(std, right == right_now, settings, *names, clusters=clusters)
    sample = paired_sample(right, right_now, clusters)
    outcomes = sample.outcomes
    verdict = str(first["verdict_metric"] if settings.verdict == "correct" else "acc_norm")
    answers = _answers_of_both(dense, pruned, verdict)
    same = None if answers is None else answers[0] == answers[1]
    moved = None if same is None else int((~right & ~right_now & ~same).sum())
    accuracies = accuracy_estimate(right, clusters), accuracy_estimate(right_now, clusters)
    result = TaskComparison(
        task=names[0],
        filter=names[1],
        output_type=str(first["output_type"]),
        verdict=verdict,
        n=outcomes.n,
        dense=accuracies[0],
        pruned=accuracies[1],
        mcnemar_p=mcnemar(outcomes),
        mcnemar_mid_p=mcnemar(outcomes, mid_p=True),
        stability=stable,
        effective_n=effective_sample_size(std) if std is not None else None,
        same_choice=None if same is None else float(same.mean()),
        kappa=kappa(outcomes),
        answer_kappa=answer_kappa(*answers) if answers and measures is not None else None,
        retention_above_chance=_above_chance(sample, measures, settings),
        flips=Flips(
            right_to_wrong=outcomes.right_to_wrong,
            wrong_to_right=outcomes.wrong_to_right,
            wrong_to_other_wrong=moved,
        ),
        clusters=None if clusters is None else clusters.shown,
        **paired_estimates(sample, settings),
        **choice_estimates(measures, accuracies, clusters, settings),
    )
    return ComparedTask(result, sample, right, right_now, std, measures, clusters)


def _answers_of_both(
    dense: pd.DataFrame, pruned: pd.DataFrame, verdict: str
) -> tuple[Answers, Answers] | None:
    """What both models chose or wrote, [n] each; None if it is not recorded."""
    first, second = chosen(dense, verdict), chosen(pruned, verdict)
    if first is None or second is None or first.name != second.name:
        return None
    return first.to_numpy(), second.to_numpy()


def _above_chance(
    sample: PairedSample, measures: ChoiceMeasures | None, settings: Settings
) -> Estimate | None:
    if measures is None:
        return None
    return retention_above_chance([sample], [mean_chance(measures)], settings.confidence)


def mean_chance(measures: ChoiceMeasures) -> float:
    """Mean over documents of 1 / number of choices."""
    return float(np.nanmean(measures.chance))


def accuracy_estimate(right: BoolArray, clusters: ClusterLabels | None = None) -> Estimate:
    """Accuracy with its standard error: sample deviation / sqrt(n), as lm-eval gives it.

    With clusters the error is the cluster-robust one (:func:`mean_estimate`). None for one verdict:
    it says nothing about its own error.

    Args:
        right: bool [n].
    """
    labels = None if clusters is None else clusters.labels
    found = mean_estimate(right.astype(np.float64), 0.95, labels)
    return Estimate(value=found.value, standard_error=found.standard_error)


def chance_corrected(accuracy: Estimate, chance: float) -> Estimate:
    """(accuracy - chance) / (1 - chance): 0 is guessing, 1 is all right."""
    error = accuracy.standard_error
    return Estimate(
        value=(accuracy.value - chance) / (1 - chance),
        standard_error=None if error is None else error / (1 - chance),
    )


def paired_sample(
    right: BoolArray, right_now: BoolArray, clusters: ClusterLabels | None
) -> PairedSample:
    """Count the verdicts of both models, bool [n] each, in all and per cluster."""
    outcomes = Outcomes.of(right, right_now)
    if clusters is None:
        return PairedSample(outcomes)
    table = clusters.sums(np.ones(len(right)), right, right_now, right == right_now)
    return PairedSample(outcomes, (table,), clusters.shown.kind)


def paired_estimates(sample: PairedSample, settings: Settings) -> dict[str, Any]:
    """Difference, agreement, retention, p and what could be found; the decision comes after Holm.

    p is below 1 - confidence exactly where the interval of the difference excludes 0.
    """
    confidence, outcomes = settings.confidence, sample.outcomes
    difference = PairedDifference((sample,))
    design = sample.design(same=1.0)
    n = outcomes.n / design.effect
    return {
        "difference": difference.interval(confidence, settings.margin),
        "agreement": wilson_estimate(outcomes.agreement, n, confidence, design.freedom),
        "retention": retention_estimate([sample], confidence),
        "p_value": difference.p_value(),
        "p_method": difference.method,
        "margin": settings.margin,
        "noninferiority_p": difference.tail(-settings.margin),
        "detectable": difference.detectable(confidence),
    }


def retention_estimate(samples: Sequence[PairedSample], confidence: float) -> Estimate | None:
    """Mean pruned accuracy / mean dense accuracy, with its interval."""
    ends = retention(samples, confidence)
    if ends is None:
        return None
    pruned = sum(sample.outcomes.pruned_accuracy for sample in samples)
    value = pruned / sum(sample.outcomes.dense_accuracy for sample in samples)
    return Estimate(value=value, low=ends[0], high=ends[1], method="paired ratio (square-and-add)")


def choice_estimates(
    measures: ChoiceMeasures | None,
    accuracies: Sequence[Estimate],
    clusters: ClusterLabels | None,
    settings: Settings,
) -> dict[str, Any]:
    """What needs choices, as the fields of a task; nothing for generated text."""
    if measures is None:
        return {}
    chance = mean_chance(measures)
    labels = None if clusters is None else clusters.labels
    return {
        "chance": chance,
        "dense_corrected": chance_corrected(accuracies[0], chance),
        "pruned_corrected": chance_corrected(accuracies[1], chance),
        "choices": choice_shift(measures, settings.confidence, labels),
        "calibration": calibration(measures, settings.confidence, labels),
    }


def compare_perplexities(
    dense: pd.DataFrame, pruned: pd.DataFrame, confidence: float
) -> list[PerplexityComparison]:
    """Compare aligned rows of one (task, filter): one result per unit that the engine counted.

    Raises:
        SamplesError: only some documents have the numbers.
        NumericsError: a log-likelihood is NaN or infinite; run, task and document are named.
    """
    found = []
    for unit, name in _recorded(dense):
        first, units = _values(dense, name)
        second, _ = _values(pruned, name)
        log = mean_per_unit(first - second, units, confidence)
        found.append(
            PerplexityComparison(
                task=str(dense.iloc[0]["task"]),
                filter=str(dense.iloc[0]["filter"]),
                unit=unit,
                n=len(dense),
                units=float(units.sum()),
                dense=exponential(-float(first.sum() / units.sum())),
                pruned=exponential(-float(second.sum() / units.sum())),
                ratio=exponentiated(log),
                nats_per_unit=log,
            )
        )
    return found


def _recorded(frame: pd.DataFrame) -> Iterator[tuple[Unit, str]]:
    first = frame.iloc[0]["metrics"]
    names = set(first) if isinstance(first, dict) else set()
    for unit, metrics in _METRICS.items():
        known = [name for name in metrics if {f"{name}.0", f"{name}.1"} <= names]
        if known:
            yield unit, known[0]
    if _ANSWER in names:
        yield "answer", _ANSWER


def _values(frame: pd.DataFrame, name: str) -> tuple[FloatArray, FloatArray]:
    """Log-likelihoods and units, float64 [n] each."""
    records = frame["metrics"].tolist()
    keys = [name] if name == _ANSWER else [f"{name}.0", f"{name}.1"]
    for row, record in enumerate(records):
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            bad = frame.iloc[row]
            raise SamplesError(
                f"Run '{bad['run']}' has no '{name}' on document {bad['doc_id']} of task "
                f"'{bad['task']}', but on others; evaluate again."
            )
    values = np.array([[record[key] for key in keys] for record in records], dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        bad = frame.iloc[row]
        raise NumericsError(
            f"Run '{bad['run']}': Task '{bad['task']}', document {bad['doc_id']} has {name} "
            f"{values[row].tolist()}; check the weights and the dtype of the model."
        )
    units = np.ones(len(values)) if name == _ANSWER else values[:, 1]
    return values[:, 0], units
