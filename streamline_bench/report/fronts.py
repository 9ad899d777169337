"""Which rows are on the Pareto front of accuracy against what they cost, and how surely.

The share of a row is that of the resamples in which it is on the front: documents are drawn as for
the ranks, the same for every row, and a measured speed is drawn by its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from streamline_bench.core.recipe.schema import Frozen

if TYPE_CHECKING:
    from streamline_bench.report.row import Row
    from streamline_bench.report.standing import Entry
    from streamline_bench.stability.settings import Settings

_DRAWS = 2000


class FrontPlace(Frozen):
    """An entry (row, or folded row) among those of a front.

    Attributes:
        cost: less is better.
        on: it is on the front of what was measured.
        share: of the resamples in which it is on the front.
    """

    label: str
    cost: float
    accuracy: float
    on: bool
    share: float


class Front(Frozen):
    """The Pareto front of accuracy against a cost, the cheapest entry first.

    Attributes:
        measure: ``memory``: bytes for the sequences of the target; ``time``: for the same tokens,
            as a multiple of the reference's; ``bytes`` and ``parameters``: of the weights.
    """

    measure: Literal["memory", "time", "bytes", "parameters"]
    places: list[FrontPlace]


@dataclass(frozen=True)
class Cost:
    """What a row costs.

    Attributes:
        value: less is better; None: not known.
        error: standard error of its logarithm.
    """

    value: Callable[[Row], float | None]
    error: Callable[[Row], float | None] = lambda row: 0.0


def _time(row: Row) -> float | None:
    """Time for the same tokens, as a multiple of the reference's."""
    if row.speed is None:
        return None
    if row.is_dense and row.speed.ratio is None:
        return 1.0
    return 1.0 / row.speed.ratio if row.speed.ratio else None


COSTS: dict[str, Cost] = {
    "memory": Cost(lambda row: row.memory),
    "time": Cost(_time, lambda row: row.speed.ratio_error if row.speed else 0.0),
    "bytes": Cost(lambda row: row.bytes),
    "parameters": Cost(lambda row: row.parameters),
}
"""What accuracy is set against: memory of the target, time of a measured speed, size."""


def fronts(entries: Sequence[Entry], dense: Entry | None, settings: Settings) -> list[Front]:
    """Return the front of each cost that at least three entries have, the dense one among them.

    Parameters are left out where bytes are known.

    Args:
        entries: what is ranked, all of them on the same documents.
        dense: the model that they come from.
    """
    every = [*([dense] if dense is not None else []), *entries]
    found: list[Front] = []
    for measure, cost in COSTS.items():
        known = [(entry, x) for entry in every if (x := cost.value(entry.row))]
        if len(known) < 3 or (measure == "parameters" and found and found[-1].measure == "bytes"):
            continue
        found.append(_front(measure, cost, known, settings))
    return found


def _front(
    measure: Any, cost: Cost, known: Sequence[tuple[Entry, float]], settings: Settings
) -> Front:
    import numpy as np

    from streamline_bench.stability.statistics.intervals import task_generator
    from streamline_bench.stability.statistics.ranks import bootstrap_means, on_front

    entries, values = [entry for entry, _ in known], np.array([x for _, x in known])
    crossed = [entry.crossed() for entry in entries]
    tasks = [
        (np.array([task.scores.mean(axis=(0, 1)) for task in same]), same[0].clusters)
        for same in zip(*crossed, strict=True)
    ]
    generator = task_generator(settings.seed, "fronts", measure)
    errors = np.array([entry.method_error for entry in entries])
    means = bootstrap_means(tasks, errors, draws=_DRAWS, generator=generator)
    spread = np.array([cost.error(entry.row) or 0.0 for entry in entries])
    costs = values * np.exp(spread * generator.standard_normal(means.shape))
    shares = on_front(costs, means).mean(axis=0)
    seen = np.array([[round(entry.mean(), 12) for entry in entries]])
    now = on_front(values[None, :], seen)[0]
    places = [
        FrontPlace(
            label=entry.label, cost=float(x), accuracy=entry.mean(), on=bool(on), share=float(share)
        )
        for (entry, x), on, share in zip(known, now, shares, strict=True)
    ]
    return Front(measure=measure, places=sorted(places, key=lambda each: each.cost))
