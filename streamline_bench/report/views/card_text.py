"""The text of a model card: what was removed, what it costs, how both were found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from streamline_bench.report.text.escaping import markdown_text, visible_text
from streamline_bench.report.text.formats import (
    MISSING,
    count,
    interval,
    percent,
    points,
    rate,
    significant,
    times,
    with_error,
)

__all__ = ["card_text"]


def card_text(board: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Markdown below the metadata; every string of a run is escaped."""
    origin = row["provenance"]
    parts = [
        f"# {markdown_text(row['label'])}",
        _what(row),
        "## Evaluation",
        _summary(board, row),
        _tasks(board, row),
        "## How it was made",
        _origin(origin),
    ]
    if origin["recipe"]:
        parts += ["Recipe:", _code(json.dumps(origin["recipe"], indent=2, ensure_ascii=False))]
    if origin["versions"]:
        listed = ", ".join(f"{name} {value}" for name, value in origin["versions"].items())
        parts.append(f"Versions: {markdown_text(listed)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(row: Mapping[str, Any]) -> str:
    origin = row["provenance"]
    made = markdown_text(row["title"] or row["method"] or "A compressed model")
    text = f"{made}, applied to {markdown_text(origin['source'] or 'an unnamed model')}"
    if row["layers_before"] is not None:
        text += (
            f": {row['layers_before']} → {row['layers']} layers, "
            f"{count(row['parameters_before'])} → {count(row['parameters'])} parameters "
            f"({percent(row['sparsity_reached'])} % removed)"
        )
    paper = (origin["recipe"] or {}).get("paper")
    return f"{text}." + (f" Method: {markdown_text(paper)}." if paper else "")


def _summary(board: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if not row["macro"]:
        return _perplexities(board, row)
    difference, micro = row["macro"]["difference"], row["micro"]
    text = (
        f"{with_error(row['accuracy_macro'])} % right, mean over {row['macro']['tasks']} tasks: "
        f"{points(difference['value'])} {interval(difference, signed=True)} points against "
        f"{markdown_text(board['dense'])}. {micro['flips']['right_to_wrong']} answers were lost "
        f"and {micro['flips']['wrong_to_right']} gained, of {micro['n']}."
    )
    speed = row["throughput"]
    if speed and speed["status"] == "ok":
        text += (
            f" {rate(speed['output_tokens_per_second'])} output tokens per second"
            + (f", {times(speed['ratio'])} of the dense model" if speed["ratio"] else "")
            + f" ({markdown_text(speed['engine'])} on {markdown_text(speed['device'])})."
        )
    return text


def _perplexities(board: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Where no task has right or wrong answers."""
    lines = [
        f"- {markdown_text(found['task'])}, perplexity per {markdown_text(found['unit'])}: "
        f"{significant(found['pruned'])}, {markdown_text(board['dense'])} has "
        f"{significant(found['dense'])}"
        for found in row["perplexities"]
    ]
    return "\n".join(["No task has right or wrong answers.", "", *lines]).strip()


def _tasks(board: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if not row["tasks"]:
        return ""
    lines = [
        f"| task | documents | {markdown_text(board['dense'])} | this model | difference "
        "| stability |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task in row["tasks"]:
        found = task["comparison"]
        stable = found["stability"]
        name = task["task"] if task["main"] else f"{task['task']} ({task['filter']})"
        cells = [
            markdown_text(name),
            str(task["n"]),
            with_error(found["dense"]),
            with_error(found["pruned"]),
            f"{points(found['difference']['value'])} {interval(found['difference'], signed=True)}",
            f"{percent(stable['value'])} {interval(stable)}" if stable else MISSING,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _origin(origin: Mapping[str, Any]) -> str:
    facts = {
        "Source weights": origin["source_weights_sha256"],
        "Weights": origin["weights_sha256"],
        "Calibration tokens": origin["calibration"].get("tokens"),
        "Calibration text": origin["calibration"].get("sha256"),
        "Evaluated with": origin["engine"],
        "Seed": origin["seed"],
    }
    return "\n".join(
        f"- {name}: {markdown_text(value)}" for name, value in facts.items() if value is not None
    )


def _code(text: str) -> str:
    """Indented code: no fence that its content could close."""
    return "\n".join(f"    {line}" for line in visible_text(text).splitlines())
