"""The results of a board as tables: tidy, one line per row of the ranking, and for a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamline_bench.report import text
from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.scores import GradeScore, TaskScore
from streamline_bench.report.views.entries import shown
from streamline_bench.report.views.guessing import beats_random, known_accuracy
from streamline_bench.report.views.headline import headline
from streamline_bench.report.views.overview import mean_grade, ranked
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.texts import GenerationComparison

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("row", "group", "cost", "method", "seed", "calibration", "sparsity", "runs", "scope", "n"),
    *("shots", "metric", "value", "standard_error", "low", "high", "p", "decision"),
)
"""``scope``: a task, ``mean over tasks``, ``all documents`` or ``model``. Shares are below 1.
``runs`` counts the runs that a folded row is the mean of. ``p`` and ``decision`` of a task are
adjusted over the row's tasks (Holm) and belong to the interval of ``difference_holm``; that of
``difference`` is of the task alone."""


def results(source: Leaderboard | Path | str) -> pd.DataFrame:
    """Return the results of a board as a tidy table (see :data:`COLUMNS`).

    Args:
        source: a run folder, its ``leaderboard.json``, or a board that was read.

    Raises:
        SamplesError: there is no board, or it is damaged.
    """
    import pandas as pd

    board = _board(source)
    lines = [line for row in board.rows for line in _of_row(board, row)]
    lines += _of_folds(board)
    return pd.DataFrame(lines, columns=list(COLUMNS))


def ranking(source: Leaderboard | Path | str) -> pd.DataFrame:
    """Return the ranking as a table: one line per row, those of seeds and calibrations folded.

    Shares are below 1; a row that failed has its reason in ``failed``. Raises as :func:`results`.
    """
    import pandas as pd

    return pd.DataFrame(ranking_records(_board(source)))


def ranking_records(board: Leaderboard) -> list[dict[str, Any]]:
    """The lines of :func:`ranking` as JSON-ready values."""
    return [_summary(board, row) for row in ranked(shown(board))]


def _summary(board: Leaderboard, row: Row) -> dict[str, Any]:
    rank, macro = board.shown_ranks.get(row.label), row.macro
    estimates = {
        "accuracy": row.accuracy_macro,
        "difference": macro and macro.difference,
        "stability": macro and macro.stability,
        "accuracy_known_tasks": known_accuracy(board, row),
        "retention_above_chance": macro and macro.retention_above_chance,
        "retention": macro and macro.retention,
        "grade_change": None if row.is_dense else mean_grade(row),
        "token_kl": row.divergence and row.divergence.kl,
    }
    line: dict[str, Any] = {"row": row.label, "cost": row.cost}
    line |= {"rank": rank and rank.place, "rank_low": rank and rank.low}
    line |= {"rank_high": rank and rank.high}
    for name, estimate in estimates.items():
        line[name] = estimate.value if estimate else None
        line[f"{name}_low"] = estimate.low if estimate else None
        line[f"{name}_high"] = estimate.high if estimate else None
    error = row.accuracy_macro and row.accuracy_macro.standard_error
    return line | {
        "accuracy_standard_error": error,
        "answer_kappa": macro.answer_kappa if macro else None,
        "beats_random": beats_random(board, row) or None,
        "verdict": macro.decision if macro else None,
        "speed_ratio": row.speed.ratio if row.speed else None,
        "parameters": row.parameters,
        "bytes": row.bytes,
        "sparsity_reached": row.sparsity_reached,
        "seconds": row.total_seconds,
        "failed": row.failed,
    }


def html_table(source: Leaderboard | Path | str) -> str:
    """The ranking as HTML for a notebook: the headline and a table; every string is escaped."""
    board = _board(source)
    rows = ranked(shown(board))
    judged = any(row.accuracy_macro for row in rows)
    measures = ("accuracy %", "difference", "stability %", "verdict") if judged else ("grades",)
    heads = ("model", "cost", "rank", *measures)
    lines = []
    for row in rows:
        rank, macro = board.shown_ranks.get(row.label), row.macro
        cells = [
            row.label,
            row.cost or ("reference" if row.is_dense else ""),
            f"{rank.place} [{rank.low}, {rank.high}]" if rank else "",
        ]
        if judged:
            cells += [
                row.failed or text.with_error(row.accuracy_macro),
                text.with_interval(macro.difference if macro else None, signed=True),
                text.with_interval(macro.stability if macro else None),
                (macro.decision if macro else None) or "",
            ]
        else:
            change = None if row.is_dense else mean_grade(row)
            cells.append(row.failed or text.with_interval(change, signed=True) or text.MISSING)
        lines.append("".join(f"<td>{escape(text.visible_text(cell))}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    said = escape(text.visible_text(headline(board)))
    return f"<p>{said}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _board(source: Leaderboard | Path | str) -> Leaderboard:
    if isinstance(source, Leaderboard):
        return source
    path = Path(source)
    return read_leaderboard(path / "leaderboard.json" if path.is_dir() else path)


def _of_row(board: Leaderboard, row: Row) -> Iterator[dict[str, Any]]:
    common = {
        "row": row.label, "group": row.group or row.label, "cost": row.cost,
        "method": "dense" if row.is_dense else row.method, "runs": 1,
        "seed": row.axes.get("seed", row.provenance.seed),
        "calibration": row.axes.get("calibration"),
        "sparsity": row.axes.get("sparsity", row.sparsity_requested),
    }  # fmt: skip
    for task in row.tasks:
        yield from (common | line for line in _of_task(task))
    for scope, accuracy, overall in (
        ("mean over tasks", row.accuracy_macro, row.macro),
        ("all documents", row.accuracy_micro, row.micro),
    ):
        here = common | {"scope": scope, "n": overall.n if overall else None}
        if accuracy:
            yield here | _line("accuracy", accuracy)
        if overall:
            decided = {"p": overall.p_value, "decision": overall.decision}
            yield here | _line("difference", overall.difference) | decided
            for name in ("stability", "retention", "agreement", "choice_kl", "flips_above_noise"):
                if (found := getattr(overall, name)) is not None:
                    yield here | _line(name, found)
    if row.grade_change is not None:
        yield common | {"scope": "mean over tasks"} | _line("grade_change", row.grade_change)
    yield from (common | line for line in _of_model(board, row))


def _of_task(task: TaskScore) -> Iterator[dict[str, Any]]:
    here = {"scope": task.name, "n": task.n, "shots": task.shots}
    yield here | _line("accuracy", task.accuracy)
    found = task.comparison
    if found is None:
        return
    decided = {"p": found.p_holm, "decision": found.decision}
    yield here | _line("difference", found.difference) | decided
    if found.adjusted is not None:
        yield here | _line("difference_holm", found.adjusted) | decided
    for name in ("stability", "retention", "agreement"):
        if (estimate := getattr(found, name)) is not None:
            yield here | _line(name, estimate)


def _of_grade(score: GradeScore) -> Iterator[dict[str, Any]]:
    here = {"scope": score.name, "n": score.n}
    yield here | _line(f"{score.kind}: {score.metric}", score.value)
    found = score.comparison
    if found is not None and found.difference is not None:
        decided = {"p": found.p_holm, "decision": found.decision}
        yield here | _line(f"difference: {score.metric}", found.difference) | decided
    if found is not None and found.moved_above_noise is not None:
        yield here | _line(f"moved_above_noise: {score.metric}", found.moved_above_noise)
    if found is not None and found.ratio is not None:
        yield here | _line(f"ratio: {score.metric}", found.ratio)


def _of_model(board: Leaderboard, row: Row) -> Iterator[dict[str, Any]]:
    here = {"scope": "model"}
    for name in ("parameters", "bytes", "layers", "sparsity_reached"):
        if (value := getattr(row, name)) is not None:
            yield here | {"metric": name, "value": float(value)}
    for stage, spent in row.seconds.items():
        yield here | {"metric": f"seconds: {stage}", "value": spent}
    yield from (here | line for line in _of_ranks(board, row.label))
    yield from (here | line for line in _of_gains(board, row.label))
    if row.divergence:
        for name, field in (("token_kl", "kl"), ("same_top_token", "same_top")):
            yield here | _line(name, getattr(row.divergence, field))
    if (speed := row.speed) is not None:
        yield here | {"metric": "tokens_per_second", "value": speed.output_tokens_per_second,
                      "low": speed.low, "high": speed.high}  # fmt: skip
        yield here | {"metric": "speed_ratio", "value": speed.ratio, "low": speed.ratio_low,
                      "high": speed.ratio_high}  # fmt: skip
    for score in row.grades:
        yield from _of_grade(score)
    for generation in row.generations:
        yield from (here | line for line in _of_generation(generation))
    for cost in row.solved:
        if cost.ratio:
            yield here | {"scope": cost.task} | _line("seconds_per_solved_ratio", cost.ratio)
    for pair in row.formats:
        both = {"scope": f"{pair.free}, {pair.choice}", "n": pair.n, "p": pair.p_value}
        yield here | both | _line("free_minus_choice", pair.gap)
    for found in row.perplexities:
        if found.ratio:
            yield (
                here | {"scope": found.task} | _line(f"perplexity_ratio_{found.unit}", found.ratio)
            )


def _of_ranks(board: Leaderboard, label: str) -> Iterator[dict[str, Any]]:
    for name, ranks in (("rank", board.shown_ranks), ("grade_rank", board.grade_ranks)):
        if (rank := ranks.get(label)) is not None:
            yield {"metric": name, "value": rank.place, "low": rank.low, "high": rank.high}


def _of_gains(board: Leaderboard, label: str) -> Iterator[dict[str, Any]]:
    """What a row's patch adds; the scope names the row without it."""
    for gain in board.gains:
        if gain.entry != label:
            continue
        here = {"scope": f"against {gain.without}"}
        if gain.test is not None:
            yield here | _line("gain", gain.test.difference) | {"p": gain.test.p_holm}
        if gain.token_kl_change is not None:
            yield here | _line("token_kl_change", gain.token_kl_change)


def _of_generation(found: GenerationComparison) -> Iterator[dict[str, Any]]:
    here = {"scope": found.task, "n": found.n}
    if found.changed_above_noise is not None:
        yield here | _line("changed_above_noise", found.changed_above_noise)
    for name in ("empty", "repetition", "unfinished"):
        if (share := getattr(found, name)) is not None:
            yield here | _line(f"difference: {name}", share.difference)
    for name in ("tokens", "thinking", "tokens_per_solved"):
        length = getattr(found, name)
        if length is not None and length.ratio is not None:
            yield here | _line(f"ratio: {name}", length.ratio)


def _of_folds(board: Leaderboard) -> Iterator[dict[str, Any]]:
    rows = board.shown_as
    for fold in board.folded:
        first = rows[fold.members[0]]
        here = {
            "row": fold.label, "group": first.group, "cost": first.cost, "method": first.method,
            "sparsity": first.axes.get("sparsity", first.sparsity_requested),
            "runs": len(fold.members), "scope": "mean over tasks",
        }  # fmt: skip
        decided = {"p": fold.p_value, "decision": fold.decision}
        tested = "difference" if fold.difference is not None else "grade_change"
        for name in ("accuracy", "difference", "grade_change", "stability", "token_kl"):
            if (found := getattr(fold, name)) is not None:
                yield here | _line(name, found) | (decided if name == tested else {})
        yield from (here | {"scope": "model"} | line for line in _of_ranks(board, fold.label))
        yield from (here | line for line in _of_gains(board, fold.label))
        for part in ("question", "seed", "calibration", "both"):
            if (value := getattr(fold.variance, part)) is not None:
                limit = fold.variance.limits.get(part)
                yield here | {"metric": f"variance: {part}", "value": value, "high": limit}


def _line(metric: str, estimate: Estimate) -> dict[str, Any]:
    ends = {name: getattr(estimate, name) for name in ("standard_error", "low", "high")}
    return {"metric": metric, "value": estimate.value, **ends}
