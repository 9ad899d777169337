"""The sweep over batch sizes: models take turns; after running out of memory, half the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamline_bench.throughput.contender import RunningModel
from streamline_bench.throughput.process import WorkerError
from streamline_bench.throughput.record import Round
from streamline_bench.throughput.workload import Workload


@dataclass
class Measured:
    """What one model gave at one point of the sweep."""

    batch_requested: int
    batch_size: int
    notes: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    reason: str | None = None


class _OutOfMemoryError(Exception):
    def __init__(self, model: RunningModel, reason: str) -> None:
        super().__init__(reason)
        self.model = model
        self.reason = reason


def sweep(
    models: Sequence[RunningModel], workload: Workload, advance: Callable[[], object]
) -> dict[str, list[Measured]]:
    """Measure all models at every batch size of the workload.

    Args:
        models: those to take turns; they are started and ended here.
        advance: called when a model was started, and after every round of every model.

    Returns:
        The points of each model, by label, in the workload's order.
    """
    points: dict[str, list[Measured]] = {model.contender.label: [] for model in models}
    try:
        for model in models:
            model.start()
            advance()
        for batch in workload.batch_sizes:
            for label, measured in _point(models, batch, workload, advance).items():
                points[label].append(measured)
    finally:
        for model in models:
            model.hang_up()  # all at once: an engine may take seconds to clean up
        for model in models:
            model.close()
    return points


def turns(models: Sequence[RunningModel], index: int) -> list[RunningModel]:
    """Return the order of a round: it rotates, so that no model always follows another."""
    first = index % len(models)
    return [*models[first:], *models[:first]]


def _point(
    models: Sequence[RunningModel],
    requested: int,
    workload: Workload,
    advance: Callable[[], object],
) -> dict[str, Measured]:
    """Measure one point, at the largest batch up to the requested one that every model holds."""
    batch, notes = requested, list[str]()
    while True:
        batch = _within_capacity(models, batch, notes)
        measured = {m.contender.label: Measured(requested, batch, [*notes]) for m in models}
        try:
            _rounds(models, measured, workload, advance)
        except _OutOfMemoryError as out:
            label = out.model.contender.label
            if batch == 1:
                # Only this model fails: the others may hold the requested batch.
                out.model.contender.fail(f"out of memory with a batch of one: {out.reason}")
                batch, notes = requested, []
                continue
            notes.append(
                f"{label} ran out of memory with a batch of {batch}; "
                f"{_who(models)} measured with {batch // 2}"
            )
            batch //= 2
            continue
        return measured


def _within_capacity(models: Sequence[RunningModel], batch: int, notes: list[str]) -> int:
    for model in models:
        limited = model.engine.sized_at_load and model.contender.alive
        if limited and model.capacity < batch:
            batch = model.capacity
            notes.append(
                f"{model.contender.label} could be started for a batch of {batch} only; "
                f"{_who(models)} measured with that"
            )
    return batch


def _who(models: Sequence[RunningModel]) -> str:
    return "all models were" if len(models) > 1 else "it was"


def _rounds(
    models: Sequence[RunningModel],
    measured: dict[str, Measured],
    workload: Workload,
    advance: Callable[[], object],
) -> None:
    for index in range(-workload.warmup_rounds, workload.rounds):
        for model in turns(models, index):
            point = measured[model.contender.label]
            if model.contender.alive:
                _one_round(model, point, workload, index)
            point.reason = model.contender.failure
            advance()


def _one_round(model: RunningModel, point: Measured, workload: Workload, index: int) -> None:
    try:
        found, peak = model.round(point.batch_size, workload, index)
    except WorkerError as failure:
        if failure.out_of_memory:
            raise _OutOfMemoryError(model, failure.reason) from failure
        model.contender.fail(failure.reason)
        return
    if index >= 0:
        point.rounds.append(found)
    if peak is not None:
        point.peak_memory_bytes = max(point.peak_memory_bytes or 0, peak)
