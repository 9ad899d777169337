"""How the rows of a board stand to each other: folded, ranked, and tested against one another.

Every row has answered the same documents as its dense model, so that any two rows are a pair, too.
Rows of one recipe that differ in seed or calibration text only are folded into one entry. A leader
is named among entries of about equal size and equal cost, and each of them is tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np

from streamline_bench.report.fronts import Front, fronts
from streamline_bench.report.places import Between, Contest, Folded, Rank
from streamline_bench.report.row import Row
from streamline_bench.stability.align import AlignedPairs
from streamline_bench.stability.compare_answers import with_script_verdicts
from streamline_bench.stability.comparison import Comparison, VarianceParts
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.metrics import values_of
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics import BoolArray, FloatArray
from streamline_bench.stability.statistics.choices import choice_counts
from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.crossed import (
    CrossedError,
    CrossedTask,
    crossed_difference,
    crossed_error,
    crossed_estimate,
    method_variance,
)
from streamline_bench.stability.statistics.intervals import task_generator
from streamline_bench.stability.statistics.ranks import bootstrap_ranks
from streamline_bench.stability.statistics.score import POWER, PairedDifference, decide, holm
from streamline_bench.stability.statistics.stability import choice_spread, stability_weights
from streamline_bench.stability.task_comparison import paired_sample
from streamline_bench.stability.texts import MeasuredDivergence

SAME_SIZE = 0.02
"""Entries are of about equal size if their parameters differ by at most this share of the dense
model's, and their bytes, where both are known, by this share of the larger one's."""

_RANK_DRAWS = 2000
FOLDED_AXES = ("seed", "calibration")
"""Rows that differ in these alone are folded."""


@dataclass(frozen=True)
class TaskAnswers:
    """Verdicts or grades of a row and of its dense model on one task, in the order of documents.

    Attributes:
        documents: hashes of the documents.
        right, dense: bool [n]; float64 [n] of grades, higher being better.
        weights: float64 [n], of equation 6's stability; None for a task without choices.
    """

    documents: tuple[str, ...]
    right: BoolArray | FloatArray
    dense: BoolArray | FloatArray
    clusters: ClusterLabels | None
    weights: FloatArray | None

    @property
    def verdicts(self) -> BoolArray:
        """``right`` of a task with verdicts, bool [n]."""
        return self.right.astype(np.bool_)

    @property
    def labels(self) -> Any:
        """Clusters as int64 [n]; None if documents stand alone."""
        return None if self.clusters is None else self.clusters.labels


Answers = Mapping[str, TaskAnswers]
"""Task -> answers, of the tasks that a row's summaries are over."""


def answers_of(
    pairs: AlignedPairs, tasks: Iterable[str], settings: Settings, *, stable: bool = True
) -> Answers:
    """The verdicts on these tasks, each by the filter that the summaries use.

    Args:
        stable: with the weights of stability, which folded rows need.
    """
    pairs = with_script_verdicts(pairs, settings)
    found = {}
    for task in tasks:
        rows = (pairs.dense["task"] == task) & (pairs.dense["filter"] == pairs.first_filters[task])
        dense, pruned = pairs.dense[rows.to_numpy()], pairs.pruned[rows.to_numpy()]
        weights = None
        if stable and settings.mode == "paper" and (choice_counts(dense) > 1).any():
            weights = stability_weights(
                choice_spread(dense, quantity=settings.spread_quantity, ddof=settings.spread_ddof)
            )
        found[task] = TaskAnswers(
            documents=tuple(dense["doc_hash"]),
            right=pruned[settings.verdict].to_numpy(dtype=np.bool_),
            dense=dense[settings.verdict].to_numpy(dtype=np.bool_),
            clusters=cluster_labels(dense["cluster"]),
            weights=weights,
        )
    return found


def grades_of(pairs: AlignedPairs, result: Comparison) -> Answers:
    """The grades that judge tasks, each by the filter that counts.

    Args:
        result: the comparison of ``pairs``.
    """
    found = {}
    for grade in result.grades:
        if not grade.decides or grade.p_holm is None or grade.kind != "grade":
            continue  # what has no highest value has no place in a mean over tasks
        rows = (pairs.dense["task"] == grade.task) & (pairs.dense["filter"] == grade.filter)
        sign = 1.0 if grade.higher_is_better else -1.0
        dense, pruned = (
            sign * values_of(frame[rows.to_numpy()], grade.metric, info)
            for frame, info in (
                (pairs.dense, pairs.dense_info),
                (pairs.pruned, pairs.pruned_info),
            )
        )
        own = pairs.dense[rows.to_numpy()]
        clusters = cluster_labels(own["cluster"])
        found[grade.task] = TaskAnswers(tuple(own["doc_hash"]), pruned, dense, clusters, None)
    return found


def _on_one_scale(answers: Mapping[str, Answers]) -> dict[str, Answers]:
    """Grades up to 100 brought to 1, by the highest grade that any row has in a task."""
    highest: dict[str, float] = {}
    for name, found in ((name, each) for row in answers.values() for name, each in row.items()):
        most = max(np.abs(found.right).max(), np.abs(found.dense).max())
        highest[name] = max(highest.get(name, 0.0), float(most))
    return {
        label: {
            name: replace(found, right=found.right / 100, dense=found.dense / 100)
            if highest[name] > 1
            else found
            for name, found in row.items()
        }
        for label, row in answers.items()
    }


@dataclass(frozen=True)
class Entry:
    """What is ranked: a row, or the rows of one recipe over seeds and calibrations.

    Attributes:
        row: the first of its rows.
        grid: answers by seed and calibration.
        members: labels of its runs.
    """

    label: str
    row: Row
    grid: tuple[tuple[Answers, ...], ...]
    members: tuple[str, ...]

    @property
    def single(self) -> Answers | None:
        """The answers of an entry that is one row."""
        return self.grid[0][0] if len(self.grid) == len(self.grid[0]) == 1 else None

    @property
    def answers(self) -> Answers:
        """Of any of its rows: documents, clusters and the dense model's verdicts are the same."""
        return self.grid[0][0]

    def crossed(self, of: str = "right") -> list[CrossedTask]:
        """Scores by task: ``right``, ``difference`` to the dense model, or ``stable``."""
        found = []
        for task, first in self.answers.items():
            scores = np.array([[_scores(one[task], of) for one in line] for line in self.grid])
            if of == "stable" and first.weights is None:
                continue
            weights = first.weights if of == "stable" else None
            found.append(CrossedTask(scores, first.labels, weights))
        return found

    @property
    def method_error(self) -> float:
        """Standard error of the mean that seeds and calibrations bring."""
        return math.sqrt(method_variance(self.crossed()))

    def mean(self) -> float:
        """Accuracy, or grade, mean over tasks."""
        return float(np.mean([task.scores.mean() for task in self.crossed()]))


def _scores(answers: TaskAnswers, of: str) -> FloatArray:
    if of == "stable":
        stable: FloatArray = (answers.right == answers.dense).astype(np.float64)
        return stable
    right: FloatArray = answers.right.astype(np.float64)
    found: FloatArray = right - answers.dense if of == "difference" else right
    return found


@dataclass(frozen=True)
class Standing:
    """What :func:`standing` finds, as the fields of a leaderboard, and the entries ranked."""

    entries: list[Entry]
    ranks: dict[str, Rank]
    grade_ranks: dict[str, Rank]
    folded: list[Folded]
    neighbours: list[Between]
    contests: list[Contest]
    fronts: list[Front]


def standing(
    rows: Sequence[Row],
    answers: Mapping[str, Answers],
    settings: Settings,
    grades: Mapping[str, Answers] | None = None,
    *,
    with_fronts: bool = False,
) -> Standing:
    """Fold, rank and test the rows that have answers; rows asked other documents are left out.

    Args:
        answers: label -> verdicts.
        grades: label -> grades that judge tasks. Rows are ranked by them apart from verdicts, with
            which they are never averaged.
        with_fronts: also find the Pareto fronts.
    """
    dense = next((row for row in rows if row.is_dense), None)
    entries = _entered(rows, answers, dense)
    ranks = _ranks(entries, settings)
    graded = _entered(rows, _on_one_scale(grades or {}), dense)
    by_grades = {entry.label: entry for entry in graded}
    shown = {run.label: run.row for run in _runs(rows)}
    pairs = [
        between(one, two, settings) for same in _by_size(entries) for one, two in pairwise(same)
    ]
    return Standing(
        entries=entries,
        ranks=ranks,
        grade_ranks=_ranks(graded, settings),
        folded=[
            _folded(
                entry if entries else None,
                by_grades.get(entry.label),
                [shown[label] for label in entry.members],
                settings,
            )
            for entry in entries or graded
            if entry.single is None
        ],
        neighbours=adjusted(pairs, settings),
        contests=[_contest(found, dense, settings) for found in contests_of(entries, dense)],
        fronts=fronts(entries, _dense_entry(dense, entries), settings) if with_fronts else [],
    )


def _dense_entry(dense: Row | None, entries: Sequence[Entry]) -> Entry | None:
    """The dense model, with the verdicts that each row has of it."""
    if dense is None or not entries:
        return None
    own = {task: replace(found, right=found.dense) for task, found in entries[0].answers.items()}
    return Entry(dense.label, dense, ((own,),), (dense.label,))


def _entered(rows: Sequence[Row], answers: Mapping[str, Answers], dense: Row | None) -> list[Entry]:
    """What is ranked of the rows that have answers, the best first."""
    known = _of_one_board([row for row in rows if answers.get(row.label)], answers)
    entries = [
        entry
        for found in _groups(_runs([row for row in known if row is not dense])).items()
        for entry in _entries(*found, answers)
    ]
    # Not by the order of the rows: a merged board is that of one run.
    entries.sort(key=lambda entry: (-round(entry.mean(), 12), entry.label))
    return entries


def _of_one_board(rows: Sequence[Row], answers: Mapping[str, Answers]) -> list[Row]:
    """The rows that were asked the same documents as the first."""
    if not rows:
        return []
    asked = {task: found.documents for task, found in answers[rows[0].label].items()}
    return [
        row
        for row in rows
        if {task: found.documents for task, found in answers[row.label].items()} == asked
    ]


@dataclass(frozen=True)
class _Run:
    """One run of a recipe: its label and axes, and the row that shows what it gave.

    Runs that gave the same weights share a row.
    """

    label: str
    group: str | None
    axes: Mapping[str, Any]
    row: Row


def _runs(rows: Sequence[Row]) -> list[_Run]:
    """The rows, and those of the same weights that are shown with them."""
    found = []
    for row in rows:
        found.append(_Run(row.label, row.group, row.axes, row))
        found += [
            _Run(twin.label, twin.group, twin.axes, row)
            for twin in row.same_weights
            if _is_spanned(twin.group, twin.axes)
        ]
    return found


def _is_spanned(group: str | None, axes: Mapping[str, Any]) -> bool:
    return group is not None and bool(axes.keys() & set(FOLDED_AXES))


def _groups(runs: Sequence[_Run]) -> dict[tuple[Any, ...], list[_Run]]:
    """Runs of one recipe and size, in the order of the board."""
    found: dict[tuple[Any, ...], list[_Run]] = {}
    for run in runs:
        fixed = tuple((k, str(v)) for k, v in sorted(run.axes.items()) if k not in FOLDED_AXES)
        spanned = _is_spanned(run.group, run.axes)
        key = (run.group, fixed) if spanned else (run.label, None)
        found.setdefault(key, []).append(run)
    return found


def _entries(
    key: tuple[Any, ...], runs: Sequence[_Run], answers: Mapping[str, Answers]
) -> list[Entry]:
    """One entry of runs that form a whole grid of seeds and calibrations, else one of each row.

    Runs that all gave the weights of one row are that row, or another recipe's.
    """
    places = {tuple(str(run.axes.get(axis, "")) for axis in FOLDED_AXES): run for run in runs}
    seeds, calibrations = (sorted({place[axis] for place in places}) for axis in (0, 1))
    whole = len(places) == len(runs) and all(
        place in places for place in product(seeds, calibrations)
    )
    one_row = len({run.row.label for run in runs}) == 1
    if len(runs) < 2 or not whole or one_row:
        return [
            Entry(run.label, run.row, ((answers[run.label],),), (run.label,))
            for run in runs
            if run.label == run.row.label
        ]
    grid = tuple(
        tuple(answers[places[seed, text].row.label] for text in calibrations) for seed in seeds
    )
    group, fixed = key
    named = ", ".join(f"{name} {value}" for name, value in fixed)
    members = [places[place] for place in product(seeds, calibrations)]
    label = f"{group} ({named})" if named else group
    return [Entry(label, members[0].row, grid, tuple(run.label for run in members))]


def between(first: Entry, second: Entry, settings: Settings) -> Between:
    """Test two entries on the same documents; ``p_holm`` is of this one test until adjusted."""
    one, two = first.single, second.single
    n = sum(len(task.documents) for task in first.answers.values())
    apart = [
        np.abs(a.scores.mean(axis=(0, 1)) - b.scores.mean(axis=(0, 1)))
        for a, b in zip(first.crossed(), second.crossed(), strict=True)
    ]
    fields: dict[str, Any] = {
        "first": first.label, "second": second.label, "n": n,
        "discordance": float(np.concatenate(apart).mean()),
    }  # fmt: skip
    if one is not None and two is not None:
        paired = PairedDifference(
            tuple(
                paired_sample(two[task].verdicts, one[task].verdicts, one[task].clusters)
                for task in one
            )
        )
        p = paired.p_value()
        return Between(
            **fields, difference=paired.interval(settings.confidence), p_value=p, p_holm=p,
            p_method=paired.method, needed=paired.needed(settings.confidence),
        )  # fmt: skip
    value, error = crossed_difference(first.crossed(), second.crossed())
    name = "Student over questions, seeds and calibrations"
    p = error.p_value(value)
    return Between(
        **fields, p_value=p, p_holm=p, p_method=name,
        difference=_within(error.interval(value, settings.confidence, name), -1.0),
        needed=error.needed(value, n, settings.confidence, POWER) if value else None,
    )  # fmt: skip


def adjusted(pairs: Sequence[Between], settings: Settings) -> list[Between]:
    """Holm's adjustment over the tests of one family."""
    found = holm([pair.p_value for pair in pairs], 1 - settings.confidence)
    return [
        pair.model_copy(update={"p_holm": p}) for pair, (p, _) in zip(pairs, found, strict=True)
    ]


def _by_size(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The entries by the size that was asked of them, where the board has several sizes.

    They keep their order; what no other has the size of is left out then.
    """
    found: dict[str | None, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.row.size, []).append(entry)
    if len(found.keys() - {None}) < 2:
        return [list(entries)]
    return [same for same in found.values() if len(same) > 1]


def _ranks(entries: Sequence[Entry], settings: Settings) -> dict[str, Rank]:
    """The places of every size."""
    return {
        label: rank
        for same in _by_size(entries)
        for label, rank in _ranks_of(same, settings).items()
    }


def _ranks_of(entries: Sequence[Entry], settings: Settings) -> dict[str, Rank]:
    if not entries:
        return {}
    every = [entry.crossed() for entry in entries]
    errors = [entry.method_error for entry in entries]
    tasks = [
        (np.array([task.scores.mean(axis=(0, 1)) for task in same]), same[0].clusters)
        for same in zip(*every, strict=True)
    ]
    found = bootstrap_ranks(
        tasks,
        np.array(errors),
        draws=_RANK_DRAWS,
        confidence=settings.confidence,
        generator=task_generator(settings.seed, "ranks"),
    )
    means = [round(entry.mean(), 12) for entry in entries]
    return {
        entry.label: Rank(
            place=1 + sum(other > mean for other in means),
            low=int(low), high=int(high), first=float(first),
        )
        for entry, mean, low, high, first in zip(
            entries, means, found.low, found.high, found.first, strict=True
        )
    }  # fmt: skip


def contests_of(entries: Sequence[Entry], dense: Row | None) -> list[list[Entry]]:
    """The best entry of a cost with those of about its size, then the best of the rest, and so on.

    Best first; the largest such group first. An entry of unknown size is in no group. Another dense
    model costs nothing to make: it stands with every cost, so that a pruned large model meets a
    small one.

    Args:
        entries: the best first.
    """
    whole = dense.parameters if dense is not None else None
    sized = [entry for entry in entries if whole and entry.row.parameters]
    costs = dict.fromkeys(entry.row.cost or "" for entry in sized if not entry.row.is_dense)
    found = []
    for cost in costs:
        left = [one for one in sized if one.row.is_dense or (one.row.cost or "") == cost]
        while left:
            leader = left[0].row
            group = [one for one in left if _same_size(leader, one.row, whole or 1)]
            left = [one for one in left if not _same_size(leader, one.row, whole or 1)]
            found.append(group)
    order = {entry.label: place for place, entry in enumerate(entries)}
    several = [
        group for group in found if len(group) > 1 and not all(one.row.is_dense for one in group)
    ]
    return sorted(several, key=lambda group: (-len(group), order[group[0].label]))


def _same_size(one: Row, two: Row, whole: int) -> bool:
    if abs((one.parameters or 0) - (two.parameters or 0)) > SAME_SIZE * whole:
        return False
    sizes = sorted(row.bytes for row in (one, two) if row.bytes)
    return len(sizes) < 2 or sizes[1] - sizes[0] <= SAME_SIZE * sizes[1]


def _contest(entries: Sequence[Entry], dense: Row | None, settings: Settings) -> Contest:
    leader, *others = entries
    tests = adjusted([between(leader, other, settings) for other in others], settings)
    parameters = [entry.row.parameters or 0 for entry in entries]
    whole = (dense.parameters if dense is not None else None) or 1
    return Contest(
        cost=next((entry.row.cost for entry in entries if not entry.row.is_dense), None),
        removed=(1 - max(parameters) / whole, 1 - min(parameters) / whole),
        entries=[entry.label for entry in entries],
        accuracy=leader.mean(),
        tests=tests,
    )


def _folded(
    judged: Entry | None, graded: Entry | None, rows: Sequence[Row], settings: Settings
) -> Folded:
    """One entry over seeds and calibrations, by its verdicts and by its grades; not both None."""
    confidence = settings.confidence
    found: dict[str, Any] = {}
    for entry, name in ((graded, "grade_change"), (judged, "difference")):
        if entry is None:
            continue
        mean, parts = crossed_estimate(entry.crossed(), confidence)
        value = mean.value - _dense_mean(entry.answers)
        error = crossed_error(entry.crossed("difference"))
        method = (
            f"Student over questions, {parts.seeds} seeds and {parts.calibrations} calibrations"
        )
        change = _within(error.interval(value, confidence, method), -1.0)
        p = error.p_value(value)
        found |= {
            "label": entry.label, "members": list(entry.members), name: change, "p_value": p,
            "decision": decide(change, settings.margin, significant=p < 1 - confidence),
            "variance": parts,
        }  # fmt: skip
        if entry is judged:
            found["accuracy"] = _within(mean, 0.0)
            if stable := entry.crossed("stable"):
                mean, found["stability_variance"] = crossed_estimate(stable, confidence)
                found["stability"] = _within(mean, 0.0)
    return Folded(**found, **_token_kl(rows, found["variance"], confidence))


def _token_kl(rows: Sequence[Row], parts: VarianceParts, confidence: float) -> dict[str, Any]:
    """Mean KL of the runs, in the order of their grid; its variance where documents are known."""
    found = [row.divergence for row in rows if row.divergence]
    measured = [one for one in found if isinstance(one, MeasuredDivergence) and one.by_document]
    tokens = {tuple(count for count, _ in one.by_document) for one in measured}
    if len(measured) < len(rows) or len(tokens) != 1 or len({one.window for one in measured}) != 1:
        return {"token_kl": _mean_of([one.kl for one in found], confidence)}
    weights = np.array(tokens.pop(), dtype=np.float64)
    sums = np.array([[nats for _, nats in one.by_document] for one in measured])
    scores = (sums / weights).reshape(parts.seeds, parts.calibrations, -1)
    mean, variance = crossed_estimate([CrossedTask(scores, weights=weights)], confidence)
    return {"token_kl": _not_negative(mean), "token_kl_variance": variance}


def _not_negative(estimate: Estimate) -> Estimate:
    """The interval without what a divergence cannot be."""
    low = None if estimate.low is None else max(0.0, estimate.low)
    return estimate.model_copy(update={"low": low})


def _within(estimate: Estimate, least: float) -> Estimate:
    """The interval without what a share (from 0) or a difference of shares (from -1) cannot be."""
    if estimate.low is None or estimate.high is None:
        return estimate
    ends = {"low": max(least, estimate.low), "high": min(1.0, estimate.high)}
    return estimate.model_copy(update=ends)


def _dense_mean(answers: Answers) -> float:
    return float(np.mean([task.dense.mean() for task in answers.values()]))


def _mean_of(estimates: Sequence[Estimate], confidence: float) -> Estimate | None:
    """Mean divergence of several runs on the same text, with what the text and runs add."""
    count = len(estimates)
    if count < 2:
        return estimates[0] if estimates else None
    values = np.array([one.value for one in estimates])
    errors = [one.standard_error for one in estimates]
    text = max((error for error in errors if error is not None), default=0.0)
    error = CrossedError((text**2, math.inf), ((float(values.var(ddof=1)) / count, count - 1),))
    name = f"Student over {count} runs, and the text"
    return _not_negative(error.interval(float(values.mean()), confidence, name))
