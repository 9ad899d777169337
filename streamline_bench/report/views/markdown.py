"""``leaderboard.md``: the leaderboard as GitHub Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamline_bench.report.text.escaping import markdown_text, visible_text
from streamline_bench.report.text.formats import (
    MISSING,
    decimal,
    interval,
    percent,
    significant,
    stored,
    with_error,
)
from streamline_bench.report.views.commands import commands_by_stage
from streamline_bench.report.views.markdown_columns import (
    columns_note,
    leaderboard_table,
    multiple,
    table,
)
from streamline_bench.report.views.ranking import ranked
from streamline_bench.report.views.summary import headline

__all__ = ["to_markdown"]


def to_markdown(board: Mapping[str, Any]) -> str:
    """Render the leaderboard as Markdown; every string of a run is escaped."""
    rows = [row for row in ranked(board["rows"]) if not row["failed"]]
    level = f"{100 * board['method']['confidence']:g} %"
    parts = [
        f"# {markdown_text(board['title'])}",
        markdown_text(headline(board)),
        "## Leaderboard",
        leaderboard_table(rows),
        columns_note(board, rows, level),
        _noise(board["noise"]),
        *_failures(board),
        *_missing(board),
        *_headed("## Accuracy by task", _by_task(rows, lambda task: with_error(task["accuracy"]))),
        *_headed("## Stability by task", _by_task([r for r in rows if r["macro"]], _stability)),
        *_headed("## Perplexity", _perplexities(board, rows)),
        *_published(rows),
        "## How the numbers were made",
        _settings(board),
        _provenance(rows),
    ]
    if board["commands"]:
        parts.append("### Commands")
        for stage, lines in commands_by_stage(board["commands"]).items():
            parts += [f"{stage}:", _code(lines)]
    if board["not_compared"]:
        parts.append(
            "Not compared: "
            + "; ".join(
                f"{markdown_text(task)} ({markdown_text(reason)})"
                for task, reason in board["not_compared"].items()
            )
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _noise(noise: Mapping[str, Any] | None) -> str:
    if noise is None:
        return ""
    return (
        f"Noise floor: {percent(noise['flips']['value'], 2)} % of {noise['n']} verdicts flip when "
        f"{markdown_text(noise['dense_run'])} is evaluated again "
        f"({markdown_text(', '.join(noise['repeats']))})."
    )


def _missing(board: Mapping[str, Any]) -> list[str]:
    missing = board.get("failed_jobs") or {}
    lines = [f"- {markdown_text(job)}: {markdown_text(why)}" for job, why in missing.items()]
    return ["## Asked for, and missing", "\n".join(lines)] if lines else []


def _failures(board: Mapping[str, Any]) -> list[str]:
    failed = [row for row in board["rows"] if row["failed"]]
    return [
        f"Failed: {markdown_text(row['label'])}: {markdown_text(row['failed'])}" for row in failed
    ]


def _headed(heading: str, table: str) -> list[str]:
    """Nothing where the table is empty."""
    return [heading, table] if table else []


def _perplexities(board: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        [
            markdown_text(row["label"]),
            markdown_text(f"{found['task']} per {found['unit']}"),
            str(found["n"]),
            significant(found["dense"]),
            significant(found["pruned"]),
            multiple(found["ratio"]) or MISSING,
            decimal(found["nats_per_unit"]["value"], signed=True),
        ]
        for row in rows
        for found in row["perplexities"]
    ]
    head = [
        "row",
        "text",
        "documents",
        markdown_text(board["dense"]),
        "row's",
        "ratio",
        "nats more per unit",
    ]
    return table(head, body) if body else ""


def _by_task(rows: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> str:
    """One line per row, one column per task of any row."""
    tasks: dict[tuple[str, str], str] = {}
    for row in rows:
        for task in row["tasks"]:
            name = task["task"] if task["main"] else f"{task['task']} ({task['filter']})"
            tasks.setdefault((task["task"], task["filter"]), markdown_text(name))
    if not tasks:
        return ""
    body = []
    for row in rows:
        found = {(task["task"], task["filter"]): cell(task) for task in row["tasks"]}
        body.append([markdown_text(row["label"]), *(found.get(key, MISSING) for key in tasks)])
    return table(["row", *tasks.values()], body)


def _published(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    body = [
        [
            markdown_text(row["label"]),
            markdown_text(item["model"]),
            markdown_text(item["metric"]),
            markdown_text(f"{stored(item['value'])} {item['unit']}"),
            _ours(item),
            percent(item["sparsity"]),
            percent(row["sparsity_reached"]) if item["ours"] else MISSING,
            markdown_text(item["source"]),
        ]
        for row in rows
        for item in row["published"]
    ]
    if not body:
        return []
    head = ["row", "published on", "metric", "published", "ours %", "removed % there",
            "removed % here", "source"]  # fmt: skip
    note = "Ours: this run's model on the benchmark of that name; stability and retention over all "
    note += "tasks. Another model, other prompts and calibration text: an order, no reproduction."
    return ["## Published numbers beside ours", table(head, body), note]


def _ours(item: Mapping[str, Any]) -> str:
    if not item["ours"]:
        return MISSING
    return f"{with_error(item['ours'])} ({markdown_text(item['task'] or 'all tasks')})"


def _stability(task: Mapping[str, Any]) -> str:
    found = task["comparison"] and task["comparison"]["stability"]
    return f"{percent(found['value'])} {interval(found)}".strip() if found else MISSING


def _settings(board: Mapping[str, Any]) -> str:
    method = board["method"]
    return (
        f"Stability mode {markdown_text(method['mode'])}, spread of "
        f"{markdown_text(method['quantity'])} over the choices (ddof {method['ddof']}); "
        f"{method['draws']} bootstrap draws, seed {method['seed']}; versions: "
        + ", ".join(
            f"{markdown_text(name)} {markdown_text(value)}"
            for name, value in board["versions"].items()
        )
        + "."
    )


def _provenance(rows: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for row in rows:
        origin = row["provenance"]
        weights = origin["weights_sha256"] or origin["source_weights_sha256"]
        body.append(
            [
                markdown_text(row["label"]),
                markdown_text(row["method"] or MISSING),
                markdown_text((weights or MISSING)[:12]),
                markdown_text(origin["calibration"].get("tokens", MISSING)),
                markdown_text(origin["engine"]),
                markdown_text(origin["results_file"]),
            ]
        )
    return table(["row", "method", "weights", "tokens", "engine", "results"], body)


def _code(commands: Sequence[str]) -> str:
    """Indented code: no fence that a command could close."""
    return "\n".join(f"    {' '.join(visible_text(line).split())}" for line in commands)
