"""Groups of tasks (MMLU's subjects): all their documents, with the tasks as clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import add

import numpy as np

from streamline_bench.stability.comparison import Clusters, GroupComparison
from streamline_bench.stability.overall import (
    pooled_accuracies,
    pooled_choices,
    pooled_stability,
    square_and_add,
    total_flips,
)
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.estimates import paired_estimates
from streamline_bench.stability.statistics.paired import Outcomes, kappa
from streamline_bench.stability.statistics.resampled import resample_clusters
from streamline_bench.stability.task_comparison import ComparedTask

__all__ = ["compare_groups", "leaf_tasks"]


def compare_groups(
    compared: Sequence[ComparedTask], groups: Mapping[str, Sequence[str]], settings: Settings
) -> list[GroupComparison]:
    """Compare every group of which at least two tasks were compared, in the order of ``groups``.

    ``p_holm`` and ``decision`` are left open: they need all groups.
    """
    by_task = {item.result.task: item for item in compared}
    found = []
    for group in groups:
        members = [by_task[name] for name in leaf_tasks(group, groups) if name in by_task]
        if len(members) > 1:
            found.append(_compare(group, members, settings))
    return found


def leaf_tasks(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Tasks of a group, of its groups, and so on; each once."""
    return list(dict.fromkeys(_leaves(name, groups, frozenset())))


def _leaves(name: str, groups: Mapping[str, Sequence[str]], above: frozenset[str]) -> Iterator[str]:
    if not groups.get(name):
        yield name
        return
    for part in groups[name]:
        if part not in above:
            yield from _leaves(part, groups, above | {name})


def _compare(group: str, members: list[ComparedTask], settings: Settings) -> GroupComparison:
    outcomes: Outcomes = reduce(add, (item.outcomes for item in members))
    rows = [item.outcomes for item in members]
    sums = np.array(
        [
            [o.n, o.both_right + o.right_to_wrong, o.both_right + o.wrong_to_right,
             o.both_right + o.both_wrong]
            for o in rows
        ],
        dtype=np.float64,
    )  # fmt: skip
    resampled = resample_clusters(sums, "tasks", settings, group)
    net = sums[:, 2] - sums[:, 1]
    clusters = _by_task(members)
    dense, pruned = pooled_accuracies(members, clusters)
    chosen = [item for item in members if item.measures is not None]
    stable = [item for item in members if item.std is not None]
    known = [item.result.stability for item in stable if item.result.stability is not None]
    return GroupComparison(
        group=group,
        tasks=tuple(item.result.task for item in members),
        n=outcomes.n,
        dense=dense,
        pruned=pruned,
        flips=total_flips(members),
        clusters=clusters.shown,
        kappa=kappa(outcomes),
        macro_dense=float(np.mean([item.dense_accuracy for item in rows])),
        macro_pruned=float(np.mean([item.pruned_accuracy for item in rows])),
        stability=pooled_stability(stable, settings),
        macro_stability=square_and_add(known) if known else None,
        **paired_estimates(outcomes, settings, resampled, net),
        **pooled_choices(chosen, _by_task(chosen) if chosen else None, settings),
    )


def _by_task(members: Sequence[ComparedTask]) -> ClusterLabels:
    sizes = [item.outcomes.n for item in members]
    shown = Clusters(kind="tasks", count=len(sizes), largest=max(sizes))
    return ClusterLabels(np.repeat(np.arange(len(sizes)), sizes), shown)
