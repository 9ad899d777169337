"""Train a replacement for each of several blocks of one model.

Objectives on hidden states (mse, relative_mse, cosine) train each block's replacement by itself, on
the states of the intact model around it, as if it were the only one. Objectives on the model's
output (lm, kd) train all of them at once, in the model in which every block is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.training.loop import STATE_ERRORS
from streamline_bench.core.training.students import states_by_cut
from streamline_bench.core.training.trainer import TrainingResult, train_together


@dataclass(frozen=True)
class TrainedCuts:
    """The trained replacements of several blocks.

    Attributes:
        states: for each block, as :attr:`TrainingResult.state`.
        curve: as :attr:`TrainingResult.curve`; of separate trainings, the mean of their losses.
        summary: what the manifest records; of separate trainings, with each of them in ``cuts``.
    """

    states: Sequence[Mapping[str, Tensor]]
    curve: list[dict[str, Any]]
    summary: dict[str, Any]


def train_replacements(
    model: nn.Module,
    blocks: Sequence[range],
    *,
    spec: ReplacementSpec,
    training: TrainingSpec,
    work: Path,
    tokens: CalibrationTokens,
    seed: int,
    **settings: Any,
) -> TrainedCuts:
    """Train a replacement for each of ``blocks``, runs of layers that do not touch, in order.

    Args:
        settings: the others of :func:`~streamline_bench.core.training.train_replacement`.

    Raises:
        StreamlineBenchError: as ``train_replacement`` does.
    """
    if len(blocks) > 1 and training.objective in STATE_ERRORS:
        # What their stored states may take up is shared.
        each = training.model_copy(update={"cache_gb": training.cache_gb / len(blocks)})
        results = [
            train_together(
                model, [block], spec=spec, training=each, work=work / f"cut-{number}",
                tokens=tokens, seed=seed, **settings,
            )
            for number, block in enumerate(blocks)
        ]  # fmt: skip
        return TrainedCuts([one.state for one in results], _mean_curve(results), _joined(results))
    result = train_together(
        model, blocks, spec=spec, training=training, work=work, tokens=tokens, seed=seed,
        **settings,
    )  # fmt: skip
    states: Sequence[Mapping[str, Tensor]] = [result.state]
    if len(blocks) > 1:
        states = states_by_cut(result.state, len(blocks))
    return TrainedCuts(states, result.curve, result.summary)


def _mean_curve(results: Sequence[TrainingResult]) -> list[dict[str, Any]]:
    """Return one curve of trainings of equal length on the same data: the mean of their losses."""
    found = []
    for rows in zip(*(result.curve for result in results), strict=True):
        losses = {
            name: None if any(row[name] is None for row in rows) else _mean(rows, name)
            for name in ("train_loss", "val_loss")
        }
        found.append({**rows[0], **losses, **_summed(rows)})
    return found


def _joined(results: Sequence[TrainingResult]) -> dict[str, Any]:
    summaries = [result.summary for result in results]
    first = summaries[0]
    same = {name: value for name, value in first.items() if all(
        other[name] == value for other in summaries
    )}  # fmt: skip
    losses = {name: _mean(summaries, name) for name in ("initial_loss", "best_loss")}
    return {**same, **losses, **_summed(summaries), "cuts": summaries}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


def _summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in ("tokens", "parameters", "seconds") if name in rows[0]]
    return {name: sum(row[name] for row in rows) for name in names}
