"""Noise floor: what changes between dense and dense again, at another batch size, dtype or engine.

Sums in another order differ in their last bits, and a close call flips. Flips of a pruned model
mean something only above that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from streamline_bench.errors import SamplesError
from streamline_bench.stability.compare import compare
from streamline_bench.stability.comparison import (
    Comparison,
    Estimate,
    Flips,
    GroupComparison,
    NoiseFloor,
    NoiseTask,
    Overall,
    TaskComparison,
)
from streamline_bench.stability.overall import square_and_add
from streamline_bench.stability.paired import wilson
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

__all__ = ["above_noise", "flips_above", "noise_floor"]


def noise_floor(
    dense: Samples,
    repeats: Sequence[Samples],
    *,
    tasks: Sequence[str] | None = None,
    common_only: bool = False,
    settings: Settings | None = None,
) -> NoiseFloor:
    """Compare the dense run with its repetitions.

    Shares are means over the repetitions; their intervals are Wilson's at the number of documents
    (repetitions on the same documents are not independent).

    Args:
        tasks, common_only, settings: as for :func:`streamline_bench.stability.compare.compare`.

    Raises:
        SamplesError: there is no repetition, or no task has verdicts; otherwise as ``compare``.
    """
    if not repeats:
        raise SamplesError(
            f"A noise floor of '{dense.info.run}' needs at least one repetition; evaluate the "
            "dense model again at another batch size or dtype."
        )
    settings = settings or Settings()
    found = [
        compare(dense, again, tasks=tasks, common_only=common_only, settings=settings)
        for again in repeats
    ]
    by_task = {
        key: [task for result in found for task in result.tasks if (task.task, task.filter) == key]
        for key in ((task.task, task.filter) for task in found[0].tasks)
    }
    floor = tuple(_task(parts, settings) for parts in by_task.values())
    micros = [result.micro for result in found if result.micro is not None]
    macros = [result.macro for result in found if result.macro is not None]
    if not micros:
        raise SamplesError(
            f"No task of '{dense.info.run}' has right or wrong answers that could flip; leave the "
            "noise floor out, or add a task with acc or exact_match."
        )
    share = _mean([_share(micro.flips, micro.n) for micro in micros])
    n = micros[0].n
    divergences = [macro.choice_kl.value for macro in macros if macro.choice_kl is not None]
    return NoiseFloor(
        dense_run=dense.info.run,
        repeats=tuple(again.info.run for again in repeats),
        tasks=floor,
        n=n,
        flips=_estimate(share, n, settings),
        agreement=_estimate(1 - share, n, settings),
        macro_flips=_mean([1 - macro.agreement.value for macro in macros]),
        choice_kl=_mean(divergences) if divergences else None,
    )


def above_noise(comparison: Comparison, floor: NoiseFloor) -> Comparison:
    """The comparison with ``noise_flips`` and ``flips_above_noise`` filled in.

    Tasks that the floor does not know stay as they are; the summaries are filled only if it knows
    all the tasks they are over.
    """
    known = {(task.task, task.filter): task for task in floor.tasks}
    tasks = tuple(
        _filled(task, known[key], comparison.confidence)
        if (key := (task.task, task.filter)) in known
        else task
        for task in comparison.tasks
    )
    groups = tuple(_group(group, tasks, comparison.confidence) for group in comparison.groups)
    filled: dict[str, Any] = {"tasks": tasks, "groups": groups}
    micro, macro = comparison.micro, comparison.macro
    all_known = all((task.task, task.filter) in known for task in comparison.tasks)
    if micro is None or macro is None or not all_known:
        return comparison.model_copy(update=filled)
    update = {
        "noise_flips": floor.flips.value,
        "flips_above_noise": flips_above(
            _share(micro.flips, micro.n), floor.flips.value, micro.n, comparison.confidence
        ),
    }
    return comparison.model_copy(
        update=filled
        | {
            "micro": micro.model_copy(update=update),
            "macro": _macro(macro, tasks, floor),
        }
    )


def flips_above(share: float, floor: float, n: int, confidence: float) -> Estimate:
    """Excess of a share of flips over the floor, both of the same ``n`` documents.

    Wilson's intervals of both, square-and-add without their correlation: a document that flips by
    noise is likelier to flip by pruning too, so that this errs on the wide side.
    """
    low, high = wilson(share * n, n, confidence)
    floor_low, floor_high = wilson(floor * n, n, confidence)
    excess = share - floor
    return Estimate(
        value=excess,
        low=excess - math.hypot(share - low, floor_high - floor),
        high=excess + math.hypot(high - share, floor - floor_low),
        method="square-and-add of Wilson's",
    )


def _filled(task: TaskComparison, floor: NoiseTask, confidence: float) -> TaskComparison:
    excess = flips_above(_share(task.flips, task.n), floor.flips.value, task.n, confidence)
    return task.model_copy(update={"noise_flips": floor.flips.value, "flips_above_noise": excess})


def _group(
    group: GroupComparison, tasks: tuple[TaskComparison, ...], confidence: float
) -> GroupComparison:
    """As it is if the floor does not know one of its tasks."""
    members = [task for task in _counted(tasks) if task.task in group.tasks]
    if any(task.noise_flips is None for task in members):
        return group
    floor = sum(task.n * (task.noise_flips or 0.0) for task in members) / group.n
    excess = flips_above(_share(group.flips, group.n), floor, group.n, confidence)
    return group.model_copy(update={"noise_flips": floor, "flips_above_noise": excess})


def _counted(tasks: tuple[TaskComparison, ...]) -> list[TaskComparison]:
    """Those that the summaries are over: without the other filters of a task."""
    return [task for task in tasks if task.p_holm is not None]


def _macro(macro: Overall, tasks: tuple[TaskComparison, ...], floor: NoiseFloor) -> Overall:
    excess = [
        task.flips_above_noise for task in _counted(tasks) if task.flips_above_noise is not None
    ]
    return macro.model_copy(
        update={"noise_flips": floor.macro_flips, "flips_above_noise": square_and_add(excess)}
    )


def _task(parts: list[TaskComparison], settings: Settings) -> NoiseTask:
    first = parts[0]
    share = _mean([_share(part.flips, part.n) for part in parts])
    choices = [part.same_choice for part in parts if part.same_choice is not None]
    divergences = [part.choices.kl.value for part in parts if part.choices is not None]
    return NoiseTask(
        task=first.task,
        filter=first.filter,
        n=first.n,
        flips=_estimate(share, first.n, settings),
        agreement=_estimate(1 - share, first.n, settings),
        same_choice=_mean(choices) if choices else None,
        choice_kl=_mean(divergences) if divergences else None,
    )


def _share(flips: Flips, n: int) -> float:
    return (flips.right_to_wrong + flips.wrong_to_right) / n


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _estimate(share: float, n: int, settings: Settings) -> Estimate:
    low, high = wilson(share * n, n, settings.confidence)
    return Estimate(value=share, low=low, high=high, method="Wilson")
