"""The entries of a ranking: rows, and rows of seeds and calibrations folded into one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, geometric_mean

from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.places import Folded
from streamline_bench.report.row import Row
from streamline_bench.report.scores import GivenAnswer, GradeScore, TaskScore
from streamline_bench.stability.comparison import Overall
from streamline_bench.stability.estimate import Estimate


def shown(board: Leaderboard) -> list[Row]:
    """The rows of a board, those of one recipe over seeds and calibrations as one row."""
    runs = board.shown_as
    folds = {label: fold for fold in board.folded for label in fold.members}
    found = [row for row in board.rows if row.label not in folds]
    for fold in board.folded:
        members = [runs[label] for label in fold.members if label in runs]
        if members:
            found.append(_one_row(fold, members))
    return found


def by_size(rows: Sequence[Row]) -> list[tuple[str | None, list[Row]]]:
    """Compressed rows by the size that was asked of them, the largest model first.

    They keep their order. Those of which no size was asked, the size None, come last; where not
    two sizes were asked for, all rows are there as one.
    """
    compressed = [row for row in rows if not row.is_dense]
    found: dict[str | None, list[Row]] = {}
    for row in compressed:
        found.setdefault(row.size, []).append(row)
    if len(found.keys() - {None}) < 2:
        return [(None, compressed)]
    return sorted(
        found.items(),
        key=lambda item: (item[0] is None, -max(row.parameters or 0 for row in item[1])),
    )


def _one_row(fold: Folded, members: Sequence[Row]) -> Row:
    """The folded rows as one: means, with the intervals that the fold has; seconds of one run."""
    first = members[0]
    divergence = first.divergence
    if divergence and fold.token_kl:
        divergence = divergence.model_copy(
            update={"kl": fold.token_kl, "pruned_perplexity": _perplexity(members)}
        )
    distinct = list({row.label: row for row in members}.values())
    stages = dict.fromkeys(stage for row in distinct for stage in row.seconds)
    return first.model_copy(
        update={
            "label": fold.label,
            "title": f"{first.title or first.label}: {len(members)} runs",
            "accuracy_macro": fold.accuracy,
            "accuracy_micro": None,
            "macro": _macro(fold, [row.macro for row in members if row.macro]),
            "micro": None,
            "tasks": [
                _one_task(list(same)) for same in zip(*(row.tasks for row in members), strict=True)
            ],
            "divergence": divergence,
            "seconds": {
                stage: sum(row.seconds.get(stage, 0.0) for row in distinct) / len(distinct)
                for stage in stages
            },
            **{name: [] for name in ("worst_flips", "curve", "recovery_curve", "perplexities")},
            "scan": None,
            "groups": [],
            **{name: [] for name in ("generations", "formats", "solved")},
            "grades": [
                _one_grade([_graded(row, score) for row in members]) for score in first.grades
            ],
            "grade_change": fold.grade_change,
        }
    )


def _perplexity(members: Sequence[Row]) -> float | None:
    """Of the run's text, geometric mean; None where one of the runs has none."""
    found = [row.divergence.pruned_perplexity for row in members if row.divergence]
    known = [perplexity for perplexity in found if perplexity]
    return geometric_mean(known) if known and len(known) == len(members) else None


def _macro(fold: Folded, macros: Sequence[Overall]) -> Overall | None:
    """The summary over tasks with verdicts."""
    if fold.accuracy is None or not macros:
        return None
    retained = [macro.retention.value for macro in macros if macro.retention]
    ways = [macro.retention_above_chance for macro in macros]
    above = [way.value for way in ways if way]
    kappas = [macro.answer_kappa for macro in macros if macro.answer_kappa is not None]
    return macros[0].model_copy(
        update={
            "pruned": fold.accuracy,
            "difference": fold.difference,
            "p_value": fold.p_value,
            "decision": fold.decision,
            "stability": fold.stability,
            "agreement": _mean([macro.agreement.value for macro in macros]),
            "retention": _mean(retained) if retained else None,
            "retention_above_chance": _mean(above) if len(above) == len(macros) else None,
            "answer_kappa": fmean(kappas) if len(kappas) == len(macros) else None,
        }
    )


def runs_of(board: Leaderboard, rows: Sequence[Row]) -> list[Row]:
    """The rows that were run, in the order of the entries ``rows`` that they are shown as."""
    single, members = board.shown_as, {fold.label: fold.members for fold in board.folded}
    labels = (label for row in rows for label in members.get(row.label, [row.label]))
    found = {single[label].label: single[label] for label in labels if label in single}
    return list(found.values())


def _one_task(same: Sequence[TaskScore]) -> TaskScore:
    """One task of several runs: means without intervals."""
    compared = [task.comparison for task in same if task.comparison]
    comparison = compared[0] if compared else None
    if comparison is not None:
        stable = [found.stability.value for found in compared if found.stability]
        kappas = [found.answer_kappa for found in compared if found.answer_kappa is not None]
        comparison = comparison.model_copy(
            update={
                "difference": _mean([found.difference.value for found in compared]),
                "agreement": _mean([found.agreement.value for found in compared]),
                "stability": _mean(stable) if stable else None,
                "answer_kappa": fmean(kappas) if len(kappas) == len(compared) else None,
                "adjusted": None,
                "p_holm": None,
                "decision": None,
            }
        )
    accuracy = _mean([task.accuracy.value for task in same])
    given = max((task.given for task in same if task.given), key=_share, default=None)
    found = {"accuracy": accuracy, "comparison": comparison, "given": given}
    return same[0].model_copy(update=found)


def _share(given: GivenAnswer) -> float:
    """Of several runs, the one that gives one answer most often is shown."""
    return given.share


def _graded(row: Row, score: GradeScore) -> GradeScore:
    """The same metric of another run."""
    name = score.task, score.filter, score.metric
    same = (each for each in row.grades if (each.task, each.filter, each.metric) == name)
    return next(same, score)


def _one_grade(same: Sequence[GradeScore]) -> GradeScore:
    """One grade of several runs: means without intervals."""
    compared = [score.comparison for score in same if score.comparison]
    comparison = compared[0] if compared else None
    if comparison is not None:
        nothing = ("p_value", "p_holm", "adjusted", "noninferiority_p", "decision",
                   "noise_moved", "moved_above_noise")  # fmt: skip
        means = {
            name: _mean([found.value for found in each])
            for name in ("pruned", "difference", "ratio")
            if (each := [value for one in compared if (value := getattr(one, name)) is not None])
        }
        comparison = comparison.model_copy(update={**dict.fromkeys(nothing), **means})
    value = _mean([score.value.value for score in same])
    return same[0].model_copy(update={"value": value, "comparison": comparison})


def _mean(values: Sequence[float]) -> Estimate:
    return Estimate(value=sum(values) / len(values))
