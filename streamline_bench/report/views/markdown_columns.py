"""The leaderboard of ``leaderboard.md``: its columns, and the note that explains them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamline_bench.report.text.escaping import markdown_text
from streamline_bench.report.text.formats import (
    MISSING,
    count,
    decimal,
    duration,
    interval,
    p_value,
    percent,
    points,
    rate,
    times,
    with_error,
)
from streamline_bench.report.views.ranking import perplexity_ratio

__all__ = ["columns_note", "leaderboard_table", "multiple", "table"]


def leaderboard_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row; a column in which every cell is empty is left out."""
    columns = [(name, cell) for name, cell in _COLUMNS if any(cell(row) for row in rows)]
    body = [[cell(row) or MISSING for _, cell in columns] for row in rows]
    return table([name for name, _ in columns], body)


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
    """The p that decides; boards of early versions know the exact test only."""
    micro = row["micro"]
    if not micro:
        return ""
    return p_value(micro["mcnemar_p"] if micro["p_value"] is None else micro["p_value"])


def _tests(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tests that the column p comes from, each once, in the order of the rows."""
    named = [(row["micro"] or {}).get("p_method") or "McNemar, exact" for row in rows]
    compared = [name for name, row in zip(named, rows, strict=True) if row["micro"]]
    return markdown_text("; ".join(dict.fromkeys(compared)))


def multiple(found: Mapping[str, Any] | None) -> str:
    """A ratio with its interval, or nothing."""
    if not found:
        return ""
    ends = f" [{times(found['low'])}, {times(found['high'])}]" if found["low"] is not None else ""
    return times(found["value"]) + ends


def _perplexity(row: Mapping[str, Any]) -> str:
    """Only where it ranks the rows; a table of its own shows it in any case."""
    return "" if row["accuracy_macro"] or row["is_dense"] else multiple(perplexity_ratio(row))


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


def columns_note(board: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], level: str) -> str:
    """What the columns of :func:`leaderboard_table` are."""
    dense = markdown_text(board["dense"])
    sentences = []
    if any(row["accuracy_macro"] for row in rows):
        sentences.append(_of_verdicts(dense, rows, level))
    else:
        sentences.append("No task has right or wrong answers.")
    if any(_perplexity(row) for row in rows):
        mean = f"multiple of {dense}'s, geometric mean over tasks, with {level} interval"
        sentences.append(f"Perplexity: {mean}.")
    if any(row["divergence"] for row in rows):
        sentences.append("Token KL: KL(dense || row) per token of the run's text, in nats.")
    return " ".join(sentences)


def _of_verdicts(dense: str, rows: Sequence[Mapping[str, Any]], level: str) -> str:
    noise = " Above noise: flips beyond those of the same model again, in points." * any(
        _above_noise(row) for row in rows
    )
    return (
        f"Accuracy: mean over tasks ± standard error, in %. Difference to {dense} in "
        f"points, with {level} interval. Stability: LLM-Streamline, equation 6. Flips: right to "
        f"wrong / wrong to right.{noise} p: of the test over all documents ({_tests(rows)})."
    )


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
