"""``leaderboard.csv``: one line per row, numbers unrounded, shares between 0 and 1."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from streamline_bench.report.text.escaping import csv_cell

__all__ = ["to_csv"]


def to_csv(board: Mapping[str, Any]) -> str:
    """Render the leaderboard as CSV (RFC 4180, header line, UTF-8)."""
    records = [_record(row) for row in board["rows"]]
    columns = list(dict.fromkeys(name for record in records for name in record))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow([csv_cell(name) for name in columns])
    for record in records:
        writer.writerow([csv_cell(record.get(name)) for name in columns])
    return stream.getvalue()


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    record = {
        name: row[name]
        for name in (
            *("label", "method", "replacement", "cost", "layers", "parameters"),
            *("sparsity_requested", "sparsity_reached", "failed"),
        )
    }
    record["seconds"] = sum(row["seconds"].values()) or None
    for scope in ("macro", "micro"):
        accuracy = row[f"accuracy_{scope}"] or {}
        record[f"accuracy_{scope}"] = accuracy.get("value")
        record[f"accuracy_{scope}_se"] = accuracy.get("standard_error")
    for scope in ("macro", "micro"):
        record |= _overall(row[scope], scope)
    record |= _divergence(row["divergence"])
    for name, value in (row["throughput"] or {}).items():
        record[f"throughput_{name}"] = value
    for task in row["tasks"]:
        name = task["task"] if task["main"] else f"{task['task']}/{task['filter']}"
        record[f"accuracy:{name}"] = task["accuracy"]["value"]
        found = task["comparison"]
        if found:
            record[f"stability:{name}"] = found["stability"] and found["stability"]["value"]
            record[f"mcnemar_p:{name}"] = found["mcnemar_p"]
            record[f"p_value:{name}"] = found["p_value"]
            record[f"p_method:{name}"] = found["p_method"]
            record[f"clusters:{name}"] = found["clusters"] and found["clusters"]["count"]
            record[f"holm_p:{name}"] = found["p_holm"]
            record[f"decision:{name}"] = found["decision"]
    for found in row["perplexities"]:
        record |= _perplexity(found)
    for task, metrics in row["other_metrics"].items():
        record |= {f"{metric}:{task}": value for metric, value in metrics.items()}
    return record


def _perplexity(found: Mapping[str, Any]) -> dict[str, Any]:
    name = f"{found['task']}/{found['unit']}"
    ratio = found["ratio"] or {}
    return {
        f"perplexity:{name}": found["pruned"],
        **{
            f"perplexity_ratio{'' if part == 'value' else f'_{part}'}:{name}": ratio.get(part)
            for part in ("value", "low", "high")
        },
        f"nats_per_unit:{name}": found["nats_per_unit"]["value"],
    }


def _divergence(found: Mapping[str, Any] | None) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, column in (
        ("kl", "token_kl"),
        ("same_top", "same_top_token"),
        ("nats_per_token", "nats_per_token"),
    ):
        for part in ("value", "low", "high"):
            suffix = "" if part == "value" else f"_{part}"
            record[f"{column}{suffix}"] = found and found[name][part]
    record["text_perplexity"] = found and found["pruned_perplexity"]
    return record


def _overall(overall: Mapping[str, Any] | None, scope: str) -> dict[str, Any]:
    names = ("difference", "agreement", "stability", "retention", "flips_above_noise")
    record: dict[str, Any] = {}
    for name in names:
        estimate = (overall or {}).get(name) or {}
        for part in ("value", "low", "high"):
            suffix = "" if part == "value" else f"_{part}"
            record[f"{name}_{scope}{suffix}"] = estimate.get(part)
    for name in ("pruned_corrected", "choice_kl", "choice_js", "margin_shift", "brier_shift"):
        record[f"{name}_{scope}"] = ((overall or {}).get(name) or {}).get("value")
    for name in ("decision", "detectable", "noninferiority_p", "pruned_calibration_error"):
        record[f"{name}_{scope}"] = (overall or {}).get(name)
    if scope == "macro":
        for name in ("p_value", "p_method", "kappa"):
            record[f"{name}_macro"] = (overall or {}).get(name)
    if scope == "micro":
        flips = (overall or {}).get("flips") or {}
        for name in ("right_to_wrong", "wrong_to_right", "wrong_to_other_wrong"):
            record[name] = flips.get(name)
        for name in ("mcnemar_p", "p_value", "p_method"):
            record[name] = (overall or {}).get(name)
        record["clusters"] = ((overall or {}).get("clusters") or {}).get("count")
        record["kappa"] = (overall or {}).get("kappa")
    return record
