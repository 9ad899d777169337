"""``leaderboard.csv``: one line per row, numbers unrounded, shares between 0 and 1.

Of each task: ``difference_low_unadjusted`` and ``difference_high_unadjusted`` are the interval of
that task alone and ``p_unadjusted`` its test; ``difference_low_holm``, ``difference_high_holm`` and
``p_holm`` are adjusted over the row's tasks; ``decision_by_p_holm`` follows from ``p_holm`` and the
margin.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.places import Gain
from streamline_bench.report.row import Row
from streamline_bench.report.scores import GradeScore, TaskScore
from streamline_bench.report.text import csv_cell
from streamline_bench.stability.comparison import FormatComparison, Overall
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.texts import GenerationComparison

_NOT_SHOWN = ("error", "ratio_error", "accelerators", "served")
"""Of a speed: what its interval says already, and what has a row per load (throughput.json)."""


def to_csv(board: Leaderboard) -> str:
    """Render the leaderboard as CSV (RFC 4180, header line, UTF-8)."""
    gains = {gain.entry: gain for gain in board.gains}
    records = [_record(row) | _gain(gains.get(row.label)) for row in board.rows]
    columns = list(dict.fromkeys(name for record in records for name in record))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow([csv_cell(name) for name in columns])
    for record in records:
        writer.writerow([csv_cell(record.get(name)) for name in columns])
    return stream.getvalue()


def _record(row: Row) -> dict[str, Any]:
    names = ("label", "method", "replacement", "cost", "layers", "parameters",
             "sparsity_requested", "sparsity_reached", "failed")  # fmt: skip
    record: dict[str, Any] = {name: getattr(row, name) for name in names}
    record["seconds"] = row.total_seconds
    record |= {name: getattr(row, name) for name in ("reference", "group", "bytes")}
    record["same_weights"] = ", ".join(same.label for same in row.same_weights) or None
    record["made_elsewhere"] = (row.made_elsewhere or {}).get("name")
    record |= {f"axis_{name}": value for name, value in row.axes.items()}
    for scope, accuracy in (("macro", row.accuracy_macro), ("micro", row.accuracy_micro)):
        record[f"accuracy_{scope}"] = accuracy and accuracy.value
        record[f"accuracy_{scope}_se"] = accuracy and accuracy.standard_error
    record |= _overall(row.macro, "macro") | _overall(row.micro, "micro")
    for name, field in (("token_kl", "kl"), ("same_top_token", "same_top"),
                        ("nats_per_token", "nats_per_token")):  # fmt: skip
        record |= _with_ends(name, getattr(row.divergence, field, None))
    record["text_perplexity"] = row.divergence and row.divergence.pruned_perplexity
    for name, value in row.throughput or ():
        if name not in _NOT_SHOWN:
            record[f"throughput_{name}"] = value
    for task in row.tasks:
        record |= _task(task)
    if row.grade_change is not None:
        record |= _with_ends("grade_change", row.grade_change)
    for score in row.grades:
        record |= _grade(score)
    for text in row.generations:
        record |= _generation(text)
    for cost in row.solved:
        name = f":{cost.task}/{cost.filter}"
        record[f"seconds_per_solved{name}"] = cost.row
        record |= _with_ends("seconds_per_solved_ratio", cost.ratio, name)
    for pair in row.formats:
        record |= _format(pair)
    for found in row.perplexities:
        name = f":{found.task}/{found.unit}"
        record[f"perplexity{name}"] = found.pruned
        record |= _with_ends("perplexity_ratio", found.ratio, name)
        record[f"nats_per_unit{name}"] = found.nats_per_unit.value
    for name, metrics in row.other_metrics.items():
        record |= {f"{metric}:{name}": value for metric, value in metrics.items()}
    return record


def _gain(gain: Gain | None) -> dict[str, Any]:
    """What a row's patch adds to the row of the same selection without one."""
    if gain is None:
        return {}
    change = _with_ends("gain", gain.test.difference if gain.test else None)
    kl = _with_ends("token_kl_change", gain.token_kl_change)
    return {"without_patch": gain.without, **change, **kl}


def _with_ends(name: str, estimate: Estimate | None, end: str = "") -> dict[str, float | None]:
    """Value and interval as three columns."""
    fields = (("", "value"), ("_low", "low"), ("_high", "high"))
    return {f"{name}{column}{end}": getattr(estimate, key, None) for column, key in fields}


def _task(task: TaskScore) -> dict[str, Any]:
    name = task.task if task.main else f"{task.task}/{task.filter}"
    record: dict[str, Any] = {f"accuracy:{name}": task.accuracy.value, f"shots:{name}": task.shots}
    record[f"most_given_share:{name}"] = task.given and task.given.share
    found = task.comparison
    if found is None:
        return record
    return record | {
        f"difference:{name}": found.difference.value,
        f"difference_low_unadjusted:{name}": found.difference.low,
        f"difference_high_unadjusted:{name}": found.difference.high,
        f"stability:{name}": found.stability and found.stability.value,
        f"mcnemar_p:{name}": found.mcnemar_p,
        f"p_unadjusted:{name}": found.p_value,
        f"p_method:{name}": found.p_method,
        f"clusters:{name}": found.clusters and found.clusters.count,
        f"p_holm:{name}": found.p_holm,
        f"difference_low_holm:{name}": found.adjusted and found.adjusted.low,
        f"difference_high_holm:{name}": found.adjusted and found.adjusted.high,
        f"decision_by_p_holm:{name}": found.decision,
    }


def _grade(score: GradeScore) -> dict[str, Any]:
    """Grades as shares of the highest; other metrics as they are."""
    name = f":{score.task if score.main else f'{score.task}/{score.filter}'}/{score.metric}"
    found = score.comparison
    record: dict[str, Any] = {f"{score.kind}{name}": score.value.value}
    if found is None:
        return record
    if found.ratio is not None:
        record |= _with_ends("ratio_to_dense", found.ratio, name)
    if found.difference is not None:
        record |= _with_ends(f"{score.kind}_difference", found.difference, name)
    record |= {f"{what}{name}": getattr(found, what) for what in ("wins", "ties", "losses")}
    if found.moved_above_noise is not None:
        record[f"noise_moved{name}"] = found.noise_moved
        record |= _with_ends("moved_above_noise", found.moved_above_noise, name)
    if found.p_value is not None:
        record |= {f"p_unadjusted{name}": found.p_value, f"p_holm{name}": found.p_holm}
    return record | ({f"decision_by_p_holm{name}": found.decision} if score.decides else {})


def _generation(found: GenerationComparison) -> dict[str, Any]:
    """Shares and tokens of generated texts, and their paired changes."""
    name = f":{found.task}/{found.filter}"
    record: dict[str, Any] = {f"identical{name}": found.identical.value}
    if found.changed_above_noise is not None:
        record[f"noise_changed{name}"] = found.noise_changed
        record |= _with_ends("changed_above_noise", found.changed_above_noise, name)
    for what in ("empty", "repetition", "unfinished"):
        if (share := getattr(found, what)) is not None:
            record[f"{what}{name}"] = share.pruned
            record |= _with_ends(f"{what}_difference", share.difference, name)
    for what in ("tokens", "thinking", "tokens_per_solved"):
        if (length := getattr(found, what)) is not None:
            record[f"{what}{name}"] = length.pruned
            record |= _with_ends(f"{what}_ratio", length.ratio, name)
    return record


def _format(found: FormatComparison) -> dict[str, Any]:
    """Two tasks that ask the same: the row's quadrants, what was kept, and the gap."""
    name = f":{found.free}/{found.choice}"
    record: dict[str, Any] = {}
    for prefix, part in (("", found.pruned), ("kept_", found.kept)):
        record |= {f"{prefix}{key}{name}": value for key, value in part}
    record |= _with_ends("free_minus_choice", found.gap, name)
    return record | {f"free_minus_choice_p{name}": found.p_value, f"kept_p{name}": found.kept_p}


def _overall(overall: Overall | None, scope: str) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name in (
        "difference",
        "agreement",
        "stability",
        "retention",
        "retention_above_chance",
        "flips_above_noise",
    ):
        record |= _with_ends(f"{name}_{scope}", getattr(overall, name, None))
    for name in ("pruned_corrected", "choice_kl", "choice_js", "margin_shift", "brier_shift"):
        record[f"{name}_{scope}"] = getattr(getattr(overall, name, None), "value", None)
    for name in ("decision", "detectable", "noninferiority_p", "pruned_calibration_error"):
        record[f"{name}_{scope}"] = getattr(overall, name, None)
    if scope == "macro":
        names = ("p_value", "p_method", "kappa", "answer_kappa")
        return record | {f"{name}_macro": getattr(overall, name, None) for name in names}
    for name in ("right_to_wrong", "wrong_to_right", "wrong_to_other_wrong"):
        record[name] = overall and getattr(overall.flips, name)
    for name in ("mcnemar_p", "p_value", "p_method"):
        record[name] = getattr(overall, name, None)
    clusters = overall and overall.clusters and overall.clusters.count
    return record | {"clusters": clusters, "kappa": overall and overall.kappa}
