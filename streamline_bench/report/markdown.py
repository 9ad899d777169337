"""``leaderboard.md``: the leaderboard as GitHub Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamline_bench.report.commands import commands_by_stage
from streamline_bench.report.escaping import markdown_text, visible_text
from streamline_bench.report.formats import (
    MISSING,
    count,
    decimal,
    duration,
    interval,
    p_value,
    percent,
    points,
    rate,
    significant,
    stored,
    times,
    with_error,
)
from streamline_bench.report.ranking import perplexity_ratio, ranked
from streamline_bench.report.summary import headline

__all__ = ["to_markdown"]


def to_markdown(board: Mapping[str, Any]) -> str:
    """Render the leaderboard as Markdown; every string of a run is escaped."""
    rows = [row for row in ranked(board["rows"]) if not row["failed"]]
    level = f"{100 * board['method']['confidence']:g} %"
    parts = [
        f"# {markdown_text(board['title'])}",
        markdown_text(headline(board)),
        "## Leaderboard",
        _leaderboard(rows),
        _columns_note(board, rows, level) + _text_note(rows),
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


def _columns_note(board: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], level: str) -> str:
    dense = _label(board)
    if not any(row["accuracy_macro"] for row in rows):
        return (
            f"No task has right or wrong answers. Perplexity: multiple of {dense}'s, geometric "
            f"mean over tasks, with {level} interval."
        )
    noise = " Above noise: flips beyond those of the same model again, in points." * any(
        _above_noise(row) for row in rows
    )
    return (
        f"Accuracy: mean over tasks ± standard error, in %. Difference to {dense} in "
        f"points, with {level} interval. Stability: LLM-Streamline, equation 6. Flips: right to "
        f"wrong / wrong to right.{noise} p: McNemar's test over all documents, in brackets which: "
        "exact, mid-p where few answers changed, over clusters where documents belong together."
    )


def _text_note(rows: Sequence[Mapping[str, Any]]) -> str:
    if not any(row["divergence"] for row in rows):
        return ""
    return " Token KL: KL(dense || row) per token of the run's text, in nats."


def _label(board: Mapping[str, Any]) -> str:
    return markdown_text(board["dense"])


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _leaderboard(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [(name, cell) for name, cell in _COLUMNS if any(cell(row) for row in rows)]
    body = [[cell(row) or MISSING for _, cell in columns] for row in rows]
    return _table([name for name, _ in columns], body)


def _difference(row: Mapping[str, Any]) -> str:
    found = (row["macro"] or {}).get("difference")
    return f"{points(found['value'])} {interval(found, signed=True)}".strip() if found else ""


def _estimate(name: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        found = (row["macro"] or {}).get(name)
        return f"{percent(found['value'])} {interval(found)}".strip() if found else ""

    return cell


def _flips(row: Mapping[str, Any]) -> str:
    flips = (row["micro"] or {}).get("flips")
    return f"{flips['right_to_wrong']} / {flips['wrong_to_right']}" if flips else ""


def _above_noise(row: Mapping[str, Any]) -> str:
    found = (row["micro"] or {}).get("flips_above_noise")
    return f"{points(found['value'])} {interval(found, signed=True)}".strip() if found else ""


def _p(row: Mapping[str, Any]) -> str:
    """The p that decides, and of which test; boards of early versions know the exact test only."""
    micro = row["micro"]
    if not micro:
        return ""
    if micro["p_value"] is None:
        return p_value(micro["mcnemar_p"])
    test = (micro["p_method"] or "").removeprefix("McNemar").removeprefix(" over").lstrip(", ")
    return f"{p_value(micro['p_value'])} ({markdown_text(test)})"


def _ratio(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    ends = f" [{times(found['low'])}, {times(found['high'])}]" if found["low"] is not None else ""
    return times(found["value"]) + ends


def _perplexity(row: Mapping[str, Any]) -> str:
    """Only where it ranks the rows; a table of its own shows it in any case."""
    return "" if row["accuracy_macro"] or row["is_dense"] else _ratio(perplexity_ratio(row))


def _token_kl(row: Mapping[str, Any]) -> str:
    found = row["divergence"]
    return decimal(found["kl"]["value"]) if found else ""


def _speed(row: Mapping[str, Any]) -> str:
    found = row["throughput"]
    if not found:
        return ""
    if found["status"] == "failed":
        return "failed"
    ratio = f" ({times(found['ratio'])})" if found["ratio"] is not None else ""
    return f"{rate(found['output_tokens_per_second'])}{ratio}"


_COLUMNS: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
    ("row", lambda row: markdown_text(row["label"])),
    ("cost", lambda row: markdown_text(row["cost"] or "")),
    ("accuracy %", lambda row: with_error(row["accuracy_macro"]) if row["accuracy_macro"] else ""),
    ("difference", _difference),
    ("verdict", lambda row: markdown_text((row["macro"] or {}).get("decision") or "")),
    ("stability %", _estimate("stability")),
    ("retention %", _estimate("retention")),
    ("agreement %", _estimate("agreement")),
    ("flips", _flips),
    ("above noise", _above_noise),
    ("p", _p),
    ("perplexity", _perplexity),
    ("token KL", _token_kl),
    ("tokens/s", _speed),
    ("parameters", lambda row: count(row["parameters"]) if row["parameters"] else ""),
    ("removed %", lambda row: percent(row["sparsity_reached"]) if row["sparsity_reached"] else ""),
    ("layers", lambda row: str(row["layers"] or "")),
    ("time", lambda row: duration(sum(row["seconds"].values())) if row["seconds"] else ""),
)
"""Heading and cell; a column in which every cell is empty is left out."""


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
            _ratio(found["ratio"]) or MISSING,
            decimal(found["nats_per_unit"]["value"], signed=True),
        ]
        for row in rows
        for found in row["perplexities"]
    ]
    head = ["row", "text", "documents", _label(board), "row's", "ratio", "nats more per unit"]
    return _table(head, body) if body else ""


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
    return _table(["row", *tasks.values()], body)


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
    return ["## Published numbers beside ours", _table(head, body), note]


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
                markdown_text(origin["calibration"].get("num_tokens", MISSING)),
                markdown_text(origin["engine"]),
                markdown_text(origin["results_file"]),
            ]
        )
    return _table(["row", "method", "weights", "tokens", "engine", "results"], body)


def _code(commands: Sequence[str]) -> str:
    """Indented code: no fence that a command could close."""
    return "\n".join(f"    {' '.join(visible_text(line).split())}" for line in commands)
