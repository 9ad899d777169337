"""Reads the output folder of lm-eval (0.4.x): ``results_*.json`` and its ``samples_*.jsonl``.

lm-eval writes ``<output_path>/<model name>/results_<timestamp>.json`` and, with ``--log_samples``,
``samples_<task>_<timestamp>.jsonl`` beside it (none for groups). The timestamp ties them together.
Nothing is taken for whole on trust: every task must have its file, every file as many documents as
the results say, and the hash over its rows must be the one in the results.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.lm_eval_rows import TaskFacts, parse_row, task_facts
from streamline_bench.stability.readers.verdicts import with_verdicts
from streamline_bench.stability.samples import RunInfo, Samples

__all__ = ["find_results", "read_lm_eval"]

_RESULTS = re.compile(r"^(?P<stem>.+)_(?P<timestamp>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)\.json$")


def read_lm_eval(
    path: Path, *, run: str | None = None, timestamp: str | None = None, progress: bool = True
) -> Samples:
    """Read one evaluation of lm-eval as a samples table.

    Raises:
        SamplesError: files are missing, truncated, foreign or ambiguous; file and line are named.
        NumericsError: a log-likelihood is NaN or infinite; the document is named.
    """
    results_file = find_results(path, timestamp)
    results = _read_json(results_file)
    info = _run_info(results, results_file, run)
    tasks = [name for name in results["configs"] if name in results["versions"]]
    rows: list[dict[str, Any]] = []
    files = {name: _samples_file(results_file, name) for name in tasks}
    total = sum(file.stat().st_size for file in files.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="samples", delay=2, disable=not progress
    ) as bar:
        for name, file in files.items():
            task_rows = list(_rows(file, task_facts(name, results), info.run, bar))
            if not task_rows:
                raise SamplesError(
                    f"{file} holds no samples: task '{name}' asked nothing; check its data and "
                    "--limit, or leave the task out."
                )
            _check_whole(task_rows, file, name, results)
            rows += with_verdicts(task_rows)
    return Samples.from_rows(rows, info)


def find_results(path: Path, timestamp: str | None = None) -> Path:
    """Return the results file that ``path`` means: itself, or the newest below the folder.

    Raises:
        SamplesError: there is none, or the folder holds the results of several models.
    """
    if path.is_file():
        return path
    found = {
        file: match["timestamp"]
        for file in sorted(path.rglob("*.json"))
        if (match := _RESULTS.match(file.name))
    }
    if not found:
        raise SamplesError(
            f"There is no results_<time>.json below '{path}'; give the folder that "
            "lm_eval --output_path names."
        )
    folders = sorted({file.parent for file in found})
    if len(folders) > 1:
        names = ", ".join(f"'{folder}'" for folder in folders[:4])
        raise SamplesError(f"'{path}' holds results of several models ({names}); name one of them.")
    if timestamp is None:
        return max(found, key=lambda file: found[file])
    chosen = [file for file, time in found.items() if time == timestamp]
    if not chosen:
        times = ", ".join(sorted(found.values()))
        raise SamplesError(f"'{path}' has no evaluation of {timestamp}; it has: {times}.")
    return chosen[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise SamplesError(f"{path} is not UTF-8 text; evaluate again.") from None
    except json.JSONDecodeError as error:
        raise SamplesError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); the file looks truncated, "
            "evaluate again."
        ) from None
    missing = {"results", "configs", "versions", "n-shot"} - set(
        payload if isinstance(payload, dict) else ()
    )
    if missing:
        raise SamplesError(f"{path} is not a results file of lm-eval: it has no {sorted(missing)}.")
    result: dict[str, Any] = payload
    return result


def _samples_file(results_file: Path, task: str) -> Path:
    match = _RESULTS.match(results_file.name)
    if match is None:
        raise SamplesError(
            f"{results_file}: the name carries no timestamp, so its samples cannot be found; keep "
            "the name that lm-eval gave it."
        )
    name = f"samples_{task}_{match['timestamp']}.jsonl"
    if Path(name).name != name:
        raise SamplesError(f"{results_file}: '{task}' is not a task name that lm-eval could save.")
    file = results_file.with_name(name)
    if not file.is_file():
        raise SamplesError(
            f"{file} is missing; evaluate task '{task}' again with --log_samples (and without "
            "deleting its output)."
        )
    return file


def _rows(
    file: Path, facts: TaskFacts, run: str, bar: tqdm[Any] | None
) -> Iterator[dict[str, Any]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file}, line {number}"
            yield {"run": run, **parse_row(_parse_line(line, where), facts, where)}
            if bar is not None:
                bar.update(len(line))


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SamplesError(
            f"{where}: not valid JSON ({error}); the file looks truncated, evaluate again."
        ) from None
    if not isinstance(row, dict):
        raise SamplesError(f"{where}: a sample must be a JSON object, not {type(row).__name__}.")
    return row


def _check_whole(
    rows: list[dict[str, Any]], file: Path, task: str, results: dict[str, Any]
) -> None:
    expected = results.get("n-samples", {}).get(task, {}).get("effective")
    documents = len({row["doc_id"] for row in rows})
    if expected is not None and documents != expected:
        raise SamplesError(
            f"{file} has {documents} documents, the results of task '{task}' were made from "
            f"{expected}; the file looks truncated, evaluate again."
        )
    recorded = results.get("task_hashes", {}).get(task)
    if recorded is not None and recorded != _task_hash(rows):
        raise SamplesError(
            f"{file} does not belong to its results file: the hash of task '{task}' differs; "
            "evaluate again."
        )


def _task_hash(rows: list[dict[str, Any]]) -> str:
    text = "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _run_info(results: dict[str, Any], file: Path, run: str | None) -> RunInfo:
    match = _RESULTS.match(file.name)
    config = results.get("config") or {}
    seconds = results.get("total_evaluation_time_seconds")
    limit = config.get("limit")
    versions = {
        name: str(results[key])
        for name, key in (("lm_eval", "lm_eval_version"), ("transformers", "transformers_version"))
        if results.get(key)
    }
    return RunInfo(
        run=run or file.parent.name,
        engine="lm-eval",
        engine_version=versions.get("lm_eval"),
        source=str(file),
        timestamp=match["timestamp"] if match else None,
        model=results.get("model_name"),
        task_versions={name: str(value) for name, value in results["versions"].items()},
        n_shot=results["n-shot"],
        task_hashes=results.get("task_hashes") or {},
        groups={name: list(tasks) for name, tasks in results.get("group_subtasks", {}).items()},
        chat_template=results.get("chat_template"),
        system_instruction=results.get("system_instruction"),
        fewshot_as_multiturn=results.get("fewshot_as_multiturn"),
        limit=limit if isinstance(limit, int | float) else None,
        config=config,
        results=results["results"],
        higher_is_better=results.get("higher_is_better") or {},
        seconds=float(seconds) if seconds else None,
        versions=versions,
    )
