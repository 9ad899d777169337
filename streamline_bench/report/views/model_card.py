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

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.errors import OutputError
from streamline_bench.report.leaderboard import (
    Leaderboard,
    Provenance,
    Row,
    TaskScore,
    read_leaderboard,
)
from streamline_bench.report.provenance import is_hub_id
from streamline_bench.report.run_file import read_run_file
from streamline_bench.report.text import (
    MISSING,
    count,
    markdown_text,
    percent,
    rate,
    significant,
    times,
    visible_text,
    with_error,
)
from streamline_bench.report.views.markdown import markdown_code, table, with_interval


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
    return not row.is_dense and row.failed is None


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
    return f"---\n{_yaml(metadata)}---\n\n{_text(board, row)}"


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
    notes.append(str(row.provenance.engine))
    notes.append(f"streamline-bench {board.versions.get('streamline-bench', '')}".strip())
    return ", ".join(notes)


def _percent(share: float) -> float:
    return round(100 * share, 4)


# The text below the metadata ---------------------------------------------------------------------


def _text(board: Leaderboard, row: Row) -> str:
    origin = row.provenance
    parts = [
        f"# {markdown_text(row.label)}",
        _what(row),
        "## Evaluation",
        _summary(board, row) if row.macro else _perplexities(board, row),
        *_tasks(board, row),
        "## How it was made",
        _origin(origin),
    ]
    if origin.recipe:
        recipe = json.dumps(origin.recipe, indent=2, ensure_ascii=False)
        parts += ["Recipe:", markdown_code(recipe.splitlines())]
    if origin.versions:
        versions = ", ".join(f"{name} {value}" for name, value in origin.versions.items())
        parts.append(f"Versions: {markdown_text(versions)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(row: Row) -> str:
    origin = row.provenance
    made = markdown_text(row.title or row.method or "A compressed model")
    text = f"{made}, applied to {markdown_text(origin.source or 'an unnamed model')}"
    if row.layers_before is not None:
        text += (
            f": {row.layers_before} → {row.layers} layers, "
            f"{count(row.parameters_before)} → {count(row.parameters)} parameters "
            f"({percent(row.sparsity_reached)} % removed)"
        )
    paper = (origin.recipe or {}).get("paper")
    return f"{text}." + (f" Method: {markdown_text(paper)}." if paper else "")


def _summary(board: Leaderboard, row: Row) -> str:
    if row.macro is None or row.micro is None:
        return ""
    flips = row.micro.flips
    text = (
        f"{with_error(row.accuracy_macro)} % right, mean over {row.macro.tasks} tasks: "
        f"{with_interval(row.macro.difference, signed=True)} points against "
        f"{markdown_text(board.dense)}. {flips.right_to_wrong} answers were lost "
        f"and {flips.wrong_to_right} gained, of {row.micro.n}."
    )
    speed = row.speed
    if speed:
        text += (
            f" {rate(speed.output_tokens_per_second)} output tokens per second"
            + (f", {times(speed.ratio)} of the dense model" if speed.ratio else "")
            + f" ({markdown_text(speed.engine)} on {markdown_text(speed.device)})."
        )
    return text


def _perplexities(board: Leaderboard, row: Row) -> str:
    """Where no task has right or wrong answers."""
    lines = [
        f"- {markdown_text(found.task)}, perplexity per {markdown_text(found.unit)}: "
        f"{significant(found.pruned)}, {markdown_text(board.dense)} has "
        f"{significant(found.dense)}"
        for found in row.perplexities
    ]
    return "\n".join(["No task has right or wrong answers.", "", *lines]).strip()


def _tasks(board: Leaderboard, row: Row) -> list[str]:
    compared = [(task, task.comparison) for task in row.tasks if task.comparison]
    if not compared:
        return []
    body = [
        [
            markdown_text(task.name),
            str(task.n),
            with_error(found.dense),
            with_error(found.pruned),
            with_interval(found.difference, signed=True),
            with_interval(found.stability) or MISSING,
        ]
        for task, found in compared
    ]
    head = ["task", "documents", markdown_text(board.dense), "this model", "difference",
            "stability"]  # fmt: skip
    note = f"In % and points; {board.level} intervals, not adjusted for the number of tasks."
    return [table(head, body), note]


def _origin(origin: Provenance) -> str:
    facts = {
        "Source weights": origin.source_weights_sha256,
        "Weights": origin.weights_sha256,
        "Calibration tokens": origin.calibration.get("tokens"),
        "Calibration text": origin.calibration.get("sha256"),
        "Evaluated with": origin.engine,
        "Seed": origin.seed,
    }
    return "\n".join(
        f"- {name}: {markdown_text(value)}" for name, value in facts.items() if value is not None
    )


# Files -------------------------------------------------------------------------------------------


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
