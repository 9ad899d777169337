"""``leaderboard.md``: the leaderboard as GitHub Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamline_bench.report.escaping import markdown_text, visible_text
from streamline_bench.report.formats import (
    MISSING,
    count,
    duration,
    interval,
    p_value,
    percent,
    points,
    with_error,
)
from streamline_bench.report.summary import headline

__all__ = ["to_markdown"]


def to_markdown(board: Mapping[str, Any]) -> str:
    """Render the leaderboard as Markdown; every string of a run is escaped."""
    rows = [row for row in board["rows"] if not row["failed"]]
    level = f"{100 * board['method']['confidence']:g} %"
    parts = [
        f"# {markdown_text(board['title'])}",
        markdown_text(headline(board)),
        "## Leaderboard",
        _leaderboard(rows),
        f"Accuracy: mean over tasks ± standard error, in %. Difference to {_label(board)} in "
        f"points, with {level} interval. Stability: LLM-Streamline, equation 6. Flips: right to "
        "wrong / wrong to right. p: exact McNemar over all documents.",
        *_failures(board),
        "## Accuracy by task",
        _by_task(rows, lambda task: with_error(task["accuracy"])),
        "## Stability by task",
        _by_task(rows, _stability, skip_dense=True),
        "## How the numbers were made",
        _settings(board),
        _provenance(rows),
    ]
    if board["commands"]:
        parts += ["### Commands", _code(board["commands"])]
    if board["not_compared"]:
        parts.append(
            "Not compared: "
            + "; ".join(
                f"{markdown_text(task)} ({markdown_text(reason)})"
                for task, reason in board["not_compared"].items()
            )
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _label(board: Mapping[str, Any]) -> str:
    return markdown_text(board["dense"])


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["row", "cost", "layers", "parameters", "removed %", "accuracy %", "difference",
            "stability %", "agreement %", "flips", "p", "time"]  # fmt: skip
    return _table(head, [_line(row) for row in rows])


def _line(row: Mapping[str, Any]) -> list[str]:
    macro, micro = row["macro"] or {}, row["micro"] or {}
    flips, difference = micro.get("flips"), macro.get("difference")
    stability = macro.get("stability")
    return [
        markdown_text(row["label"]),
        markdown_text(row["cost"] or MISSING),
        str(row["layers"] or MISSING),
        count(row["parameters"]),
        percent(row["sparsity_reached"]),
        with_error(row["accuracy_macro"]),
        f"{points(difference['value'])} {interval(difference, signed=True)}"
        if difference
        else MISSING,
        f"{percent(stability['value'])} {interval(stability)}".strip() if stability else MISSING,
        percent(macro["agreement"]["value"]) if macro else MISSING,
        f"{flips['right_to_wrong']} / {flips['wrong_to_right']}" if flips else MISSING,
        p_value(micro.get("mcnemar_p")),
        duration(sum(row["seconds"].values()) or None),
    ]


def _failures(board: Mapping[str, Any]) -> list[str]:
    failed = [row for row in board["rows"] if row["failed"]]
    return [
        f"Failed: {markdown_text(row['label'])}: {markdown_text(row['failed'])}" for row in failed
    ]


def _by_task(rows: Sequence[Mapping[str, Any]], cell: Any, *, skip_dense: bool = False) -> str:
    shown = [row for row in rows if not (skip_dense and row["is_dense"])]
    if not shown:
        return ""
    tasks = [(task["task"], task["filter"], task["main"]) for task in rows[0]["tasks"]]
    body = []
    for name, filter_name, main in tasks:
        cells = [markdown_text(name if main else f"{name} ({filter_name})")]
        for row in shown:
            found = [t for t in row["tasks"] if (t["task"], t["filter"]) == (name, filter_name)]
            cells.append(cell(found[0]) if found else MISSING)
        body.append(cells)
    return _table(["task", *(markdown_text(row["label"]) for row in shown)], body)


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
                markdown_text(origin["calibration"].get("num_tokens", MISSING)),
                markdown_text(origin["engine"]),
                markdown_text(origin["results_file"]),
            ]
        )
    return _table(["row", "method", "weights", "tokens", "engine", "results"], body)


def _code(commands: Sequence[str]) -> str:
    """Indented code: no fence that a command could close."""
    return "\n".join(f"    {' '.join(visible_text(line).split())}" for line in commands)
