"""Model cards: a README with ``model-index`` metadata, and the Hub's evaluation result files.

::

    <folder>/<label>/README.md                   metadata and text
    <folder>/<label>/.eval_results/<task>.yaml   one for each task on a data set of the Hub

or, for the checkpoints of a run, beside their weights. ``hf upload OWNER/NAME FOLDER`` puts either
on the Hub, whose formats these are (https://huggingface.co/docs/hub/model-cards and
https://huggingface.co/docs/hub/eval-results).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.errors import OutputError
from streamline_bench.report.data.datasets import is_hub_id
from streamline_bench.report.data.run_folder import read_run_file
from streamline_bench.report.text.escaping import visible_text
from streamline_bench.report.views.card_text import card_text
from streamline_bench.report.views.write import read_leaderboard

__all__ = [
    "evaluation_results",
    "model_card",
    "model_index",
    "write_checkpoint_cards",
    "write_model_card",
    "write_model_cards",
]


def write_model_cards(board: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the card of every compressed model with a result; return their folders.

    Raises:
        OutputError: the folder cannot be written.
    """
    written: list[Path] = []
    for row in board["rows"]:
        if row["is_dense"] or row["failed"]:
            continue
        target = Path(folder) / _file_name(row["label"], {path.name for path in written})
        write_model_card(board, row, target)
        written.append(target)
    return written


def write_checkpoint_cards(run: Path) -> list[Path]:
    """Write the card of every checkpoint of a run into it; return their README.md.

    The run's ``leaderboard.json`` is there. Checkpoints outside the run folder, and rows without a
    result, get none. The manifest of a checkpoint does not name its card, so it stays true.

    Raises:
        SamplesError: run.json or leaderboard.json is missing or damaged.
        OutputError: a checkpoint cannot be written to.
    """
    run = Path(run)
    board = read_leaderboard(run / "leaderboard.json")
    folders = {row.label: run / row.checkpoint for row in read_run_file(run).rows if row.checkpoint}
    return [
        write_model_card(board, row, folders[row["label"]])
        for row in board["rows"]
        if not (row["is_dense"] or row["failed"])
        and row["label"] in folders
        and folders[row["label"]].resolve().is_relative_to(run.resolve())
    ]


def write_model_card(board: Mapping[str, Any], row: Mapping[str, Any], folder: Path) -> Path:
    """Write the card of one compressed row with a result into ``folder``; return its README.md.

    Raises:
        OutputError: the folder cannot be written.
    """
    entries = evaluation_results(board, row)
    results = folder / ".eval_results"
    try:
        (results if entries else folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The model card cannot be written to '{folder}' ({error.strerror})."
        ) from None
    for task, entry in entries.items():
        atomic_write_text(results / f"{_file_name(task, set())}.yaml", _yaml([entry]))
    atomic_write_text(folder / "README.md", model_card(board, row))
    return folder / "README.md"


def model_card(board: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """README.md of one row: YAML metadata, then text; every string of a run is escaped."""
    source = row["provenance"]["source"] or ""
    metadata: dict[str, Any] = {}
    if "/" in source and is_hub_id(source):
        metadata["base_model"] = source
    metadata |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "streamline-bench", *([row["method"]] if row["method"] else [])],
        "model-index": model_index(row),
    }
    return f"---\n{_yaml(metadata)}---\n\n{card_text(board, row)}"


def model_index(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ``model-index`` of a row: one result a task, accuracies in percent."""
    results = []
    for task in row["tasks"]:
        data = task["data"] or {}
        dataset = {
            "type": data.get("dataset") or task["task"],
            "name": task["task"],
            "config": data.get("subset"),
            "split": data.get("split"),
            "args": None if data.get("shots") is None else {"num_few_shot": data["shots"]},
        }
        metric = {
            "type": task["verdict"],
            "name": f"{task['verdict']}, %" + ("" if task["main"] else f" ({task['filter']})"),
            "value": _percent(task["accuracy"]["value"]),
        }
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {name: value for name, value in dataset.items() if value is not None},
                "metrics": [metric],
            }
        )
    return [{"name": row["label"], "results": results}]


def evaluation_results(
    board: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Task -> entry of ``.eval_results/<task>.yaml``, for tasks on data sets of the Hub.

    The Hub shows those that are registered as benchmarks; accuracies are in percent.
    """
    entries = {}
    for task in row["tasks"]:
        data = task["data"] or {}
        if not task["main"] or not data.get("dataset"):
            continue
        entry: dict[str, Any] = {
            "dataset": {"id": data["dataset"], "task_id": task["task"]},
            "value": _percent(task["accuracy"]["value"]),
        }
        if row["provenance"]["date"]:
            entry["date"] = row["provenance"]["date"]
        entry["notes"] = _notes(board, row, task, data)
        entries[task["task"]] = entry
    return entries


def _notes(
    board: Mapping[str, Any],
    row: Mapping[str, Any],
    task: Mapping[str, Any],
    data: Mapping[str, Any],
) -> str:
    error = task["accuracy"]["standard_error"]
    said = [f"{task['verdict']} in %"]
    if error is not None:
        said.append(f"standard error {_percent(error)}")
    said.append(f"{task['n']} documents")
    if data.get("shots") is not None:
        said.append(f"{data['shots']}-shot")
    said.append(str(row["provenance"]["engine"]))
    said.append(f"streamline-bench {board['versions'].get('streamline-bench', '')}".strip())
    return ", ".join(said)


def _percent(share: float) -> float:
    return round(100 * share, 4)


def _yaml(payload: Any) -> str:
    return yaml.safe_dump(_clean(payload), sort_keys=False, allow_unicode=True, width=100)


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {visible_text(key, keep=""): _clean(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(part) for part in value]
    return visible_text(value, keep="") if isinstance(value, str) else value


def _file_name(label: str, taken: set[str]) -> str:
    """A name without separators that is no hidden file and not ``taken``."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", label).lstrip(".")[:100] or "model"
    number, unique = 2, name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique
