"""Model cards: a README with ``model-index`` metadata, and the Hub's evaluation result files.

::

    <folder>/<label>/README.md                   metadata and text
    <folder>/<label>/.eval_results/<task>.yaml   one for each task on a data set of the Hub

or, for the checkpoints of a run, next to their weights. ``hf upload OWNER/NAME FOLDER`` puts either
on the Hub, whose formats these are (https://huggingface.co/docs/hub/model-cards and
https://huggingface.co/docs/hub/eval-results).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from streamline_bench.core.files import atomic_write_text
from streamline_bench.errors import OutputError
from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.provenance import is_hub_id
from streamline_bench.report.row import Row
from streamline_bench.report.run_file import read_run_file
from streamline_bench.report.scores import TaskScore
from streamline_bench.report.text import visible_text
from streamline_bench.report.views.markdown import render_markdown


def write_model_cards(board: Leaderboard, folder: Path) -> list[Path]:
    """Write the card of every compressed model with a result; return their folders.

    Raises:
        OutputError: the folder cannot be written.
    """
    written: list[Path] = []
    for row in board.rows:
        if _has_card(row):
            target = Path(folder) / _file_name(row.label, {path.name for path in written})
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
        write_model_card(board, row, folder)
        for row in board.rows
        if _has_card(row)
        and (folder := folders.get(row.label)) is not None
        and folder.resolve().is_relative_to(run.resolve())
    ]


def _has_card(row: Row) -> bool:
    return not row.is_dense and row.failed is None and row.made_elsewhere is None


def write_model_card(board: Leaderboard, row: Row, folder: Path) -> Path:
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


def model_card(board: Leaderboard, row: Row) -> str:
    """README.md of one row: YAML metadata, then text; every string of a run is escaped."""
    source = row.provenance.source or ""
    metadata: dict[str, Any] = {}
    if "/" in source and is_hub_id(source):
        metadata["base_model"] = source
    metadata |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "streamline-bench", *([row.method] if row.method else [])],
        "model-index": model_index(row),
    }
    recipe = json.dumps(row.provenance.recipe, indent=2, ensure_ascii=False).splitlines()
    given = {"board": board, "row": row, "origin": row.provenance, "recipe": recipe}
    return f"---\n{_yaml(metadata)}---\n\n{render_markdown('model_card.md.j2', **given)}"


def model_index(row: Row) -> list[dict[str, Any]]:
    """The ``model-index`` of a row: one result a task, accuracies in percent."""
    results = []
    for task in row.tasks:
        data = task.data
        dataset = {
            "type": (data and data.dataset) or task.task,
            "name": task.task,
            "config": data and data.subset,
            "split": data and data.split,
            "args": None if task.shots is None else {"num_few_shot": task.shots},
        }
        metric = {
            "type": task.verdict,
            "name": f"{task.verdict}, %" + ("" if task.main else f" ({task.filter})"),
            "value": _percent(task.accuracy.value),
        }
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {name: value for name, value in dataset.items() if value is not None},
                "metrics": [metric],
            }
        )
    return [{"name": row.label, "results": results}]


def evaluation_results(board: Leaderboard, row: Row) -> dict[str, dict[str, Any]]:
    """Task -> entry of ``.eval_results/<task>.yaml``, for tasks on data sets of the Hub.

    The Hub shows those that are registered as benchmarks; accuracies are in percent.
    """
    date = row.provenance.date
    return {
        task.task: {
            "dataset": {"id": task.data.dataset, "task_id": task.task},
            "value": _percent(task.accuracy.value),
            **({"date": date} if date else {}),
            "notes": _notes(board, row, task),
        }
        for task in row.tasks
        if task.main and task.data and task.data.dataset
    }


def _notes(board: Leaderboard, row: Row, task: TaskScore) -> str:
    notes = [f"{task.verdict} in %"]
    if task.accuracy.standard_error is not None:
        notes.append(f"standard error {_percent(task.accuracy.standard_error)}")
    notes.append(f"{task.n} documents")
    if task.shots is not None:
        notes.append(f"{task.shots}-shot")
    notes.append(str(row.provenance.evaluated_with))
    notes.append(f"streamline-bench {board.versions.get('streamline-bench', '')}".strip())
    return ", ".join(notes)


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
    """A name without separators, not hidden and not ``taken``."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", label).lstrip(".")[:100] or "model"
    number, unique = 2, name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique
