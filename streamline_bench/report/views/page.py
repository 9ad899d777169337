"""``leaderboard.html``: one offline file from ``reports/templates``; autoescape does the escaping.

Style and script are inlined; a content security policy allows that one script by its hash, and no
request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from streamline_bench.report.data.removed_layers import named_layers
from streamline_bench.report.figures.axes import Axis
from streamline_bench.report.figures.forest import forest
from streamline_bench.report.figures.heat_map import heat_map
from streamline_bench.report.figures.pareto import pareto
from streamline_bench.report.figures.training_and_scan import curve_svg, matrix_svg
from streamline_bench.report.text import formats
from streamline_bench.report.text.escaping import visible_text
from streamline_bench.report.views.commands import commands_by_stage
from streamline_bench.report.views.ranking import perplexity_ratio, ranked
from streamline_bench.report.views.summary import headline
from streamline_bench.resources import resource

__all__ = ["to_html"]


def to_html(board: Mapping[str, Any]) -> str:
    """Render the leaderboard as one self-contained page."""
    templates = resource("reports") / "templates"
    script = (templates / "leaderboard.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    rows = _rows(board["rows"])
    scored = [row for row in rows if not row["failed"]]
    return (
        _environment(templates)
        .get_template("leaderboard.html.j2")
        .render(
            board=board,
            rows=rows,
            scored=scored,
            compared=[row for row in rows if row["macro"]],
            measured=[row for row in scored if not row["is_dense"]],
            lines=_lines,
            perplexity_ratio=perplexity_ratio,
            groups=Counter(row["cost"] for row in rows if not row["is_dense"]),
            has=_has(rows),
            throughput=next((row["throughput"] for row in rows if row["throughput"]), None),
            headline=headline(board),
            pareto=pareto(rows),
            forest=forest(rows),
            heat=heat_map(scored),
            metrics=_metrics(scored),
            scans=_scans(rows),
            curves=_curves(rows),
            literature=[row for row in rows if row["published"]],
            commands=commands_by_stage(board["commands"]),
            level=f"{100 * board['method']['confidence']:g} %",
            style=Markup((templates / "leaderboard.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=digest,
        )
    )


def _environment(templates: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in formats.__all__:
        if name.islower():
            environment.filters[name] = getattr(formats, name)
    environment.filters["pretty"] = _pretty
    environment.filters["breakable"] = _breakable
    environment.filters["ending"] = _ending
    return environment


def _ending(text: str, size: int = 120) -> str:
    """The last words of a prompt, where its question is."""
    line = " ".join(text.split())
    if len(line) <= size:
        return line
    kept = line[-size:]
    return f"\N{HORIZONTAL ELLIPSIS} {kept[kept.find(' ') + 1 :]}"


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as ranked, each with its place, its anchor and its inline error bar."""
    shown = [
        {
            **row,
            "index": index,
            "id": f"row-{index}",
            "by_task": {task["task"]: task for task in row["tasks"] if task["main"]},
        }
        for index, row in enumerate(ranked(rows))
    ]
    bars = {row["index"]: _bar(row["accuracy_macro"]) for row in shown if row["accuracy_macro"]}
    # Without accuracies there is no bar to place.
    axis = Axis.around([end for bar in bars.values() for end in bar] or [0.0], 0.0, 100.0)
    for row in shown:
        if row["index"] in bars:
            low, value, high = (axis.place(end) for end in bars[row["index"]])
            row["range"] = {"low": low, "at": value, "width": round(high - low, 2)}
    return shown


def _lines(row: Mapping[str, Any]) -> list[tuple[str, str | None, Mapping[str, Any]]]:
    """Name, what it is if not a task's own filter, and comparison: of every task, every group."""
    tasks = [
        (task["task"], None if task["main"] else task["filter"], task["comparison"])
        for task in row["tasks"]
    ]
    groups = [
        (group["group"], f"{len(group['tasks'])} tasks together", group) for group in row["groups"]
    ]
    return tasks + groups


def _bar(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
    error = estimate["standard_error"] or 0.0
    return estimate["value"] - error, estimate["value"], estimate["value"] + error


def _has(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Which optional columns have something to show."""
    macros = [row["macro"] for row in rows if row["macro"]]
    return {
        "accuracy": any(row["accuracy_macro"] for row in rows),
        "decision": any(macro["decision"] for macro in macros),
        "retention": any(macro["retention"] for macro in macros),
        "choices": any(macro["choice_kl"] for macro in macros),
        "calibration": any(macro["pruned_calibration_error"] is not None for macro in macros),
        "throughput": any(row["throughput"] for row in rows),
        "perplexities": any(row["perplexities"] for row in rows),
        "divergence": any(row["divergence"] for row in rows),
        "generations": any(row["generations"] for row in rows),
        "ours": any(item["ours"] for row in rows for item in row["published"]),
    }


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every (task, metric) without verdicts, in the order in which rows name them."""
    return list(
        dict.fromkeys(
            (task, name)
            for row in rows
            for task, metrics in row["other_metrics"].items()
            for name in metrics
        )
    )


def _visible(value: Any) -> Any:
    """No control characters or direction overrides in anything the template prints."""
    return (
        visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, default=str)


def _breakable(name: str) -> Markup:
    """Escaped; a long name may break after an underscore, a slash or a hyphen."""
    return Markup(re.sub(r"([_/-])", r"\1<wbr>", str(escape(visible_text(name)))))


def _scans(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each matrix and block once, with the rows that share it."""
    grouped: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["scan"] is None:
            continue
        key = json.dumps(row["scan"], sort_keys=True)
        grouped.setdefault(key, {"scan": row["scan"], "rows": []})["rows"].append(row)
    return [
        {
            **entry,
            "svg": matrix_svg(entry["scan"]),
            "removed": named_layers(entry["scan"]["removed"]),
        }
        for entry in grouped.values()
    ]


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every training of every row, with what its curve leaves out."""
    return [
        {
            "row": row,
            "training": training,
            "svg": curve_svg(row[name], training),
            "notes": [note for note in row["curve_notes"] if note.startswith(training)],
        }
        for row in rows
        for training, name in (("replacement", "curve"), ("recovery", "recovery_curve"))
        if row[name]
    ]
