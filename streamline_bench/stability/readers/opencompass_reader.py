"""Reads the predictions of OpenCompass (0.5) as a samples table.

Nothing is taken for whole on trust: entries must be numbered without a gap, parts of a data set
must follow each other, and an evaluation beside the predictions must be of these predictions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.opencompass_folder import Predictions
from streamline_bench.stability.readers.opencompass_results import Evaluation, read_evaluation
from streamline_bench.stability.readers.opencompass_rows import mode_of, parse_entry
from streamline_bench.stability.samples import RunInfo, Samples

__all__ = ["ENGINE", "SUBJECT_GROUPS", "read_opencompass"]

ENGINE = "opencompass"

SUBJECT_GROUPS = {
    "mmlu": "lukaemon_mmlu_",
    "cmmlu": "cmmlu-",
    "ceval": "ceval-",
    "bbh": "bbh-",
}
"""Benchmark -> how OpenCompass' configs begin the names of its subjects."""


@dataclass(frozen=True)
class _Loaded:
    """The predictions of one data set, parts joined, with file and key of each."""

    name: str
    entries: list[dict[str, Any]]
    where: list[str]


def read_opencompass(
    found: Predictions, *, run: str | None = None, progress: bool = True
) -> Samples:
    """Read the predictions of one model.

    Args:
        found: see :func:`streamline_bench.stability.readers.opencompass_folder.find_predictions`.
        run: label of the run; by default the model's abbreviation.

    Raises:
        SamplesError: a file is truncated, damaged or not OpenCompass'; file and entry are named.
        NumericsError: a score is NaN or infinite; the question is named.
    """
    label = run or found.model
    rows: list[dict[str, Any]] = []
    numbers: dict[str, dict[str, Any]] = {}
    total = sum(file.stat().st_size for files in found.files.values() for file in files)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="predictions", delay=2, disable=not progress
    ) as bar:
        for name, files in found.files.items():
            loaded = _load(name, files, bar)
            evaluation = read_evaluation(found.results[name]) if name in found.results else None
            rows += _rows(loaded, evaluation, found, label)
            numbers[name] = evaluation.numbers if evaluation else {}
    return Samples.from_rows(rows, _run_info(found, label, rows, numbers))


def _load(name: str, files: Sequence[Path], bar: tqdm[Any]) -> _Loaded:
    entries: list[dict[str, Any]] = []
    where: list[str] = []
    for file in files:
        part = _read(file)
        for number in range(len(part)):
            entry = part.get(str(number))
            if not isinstance(entry, dict):
                raise SamplesError(
                    f"{file} has {len(part)} entries, but none with the number {number}; the file "
                    "is truncated or was edited, run OpenCompass again."
                )
            entries.append(entry)
            where.append(f"{file}, question {number}")
        bar.update(file.stat().st_size)
    return _Loaded(name, entries, where)


def _read(file: Path) -> dict[str, Any]:
    try:
        payload = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except UnicodeDecodeError:
        raise SamplesError(f"{file} is not UTF-8 text; run OpenCompass again.") from None
    except json.JSONDecodeError as error:
        raise SamplesError(
            f"{file}, line {error.lineno}: not valid JSON ({error.msg}); the file looks truncated, "
            "run OpenCompass again."
        ) from None
    except _TwiceError as error:
        raise SamplesError(
            f"{file} holds question '{error}' twice; run OpenCompass again."
        ) from None
    if not isinstance(payload, dict) or not payload:
        raise SamplesError(f"{file} holds no predictions; run OpenCompass again.")
    result: dict[str, Any] = payload
    return result


class _TwiceError(ValueError):
    """A key that occurs twice in one object."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return found


def _rows(
    loaded: _Loaded, evaluation: Evaluation | None, found: Predictions, run: str
) -> list[dict[str, Any]]:
    mode = mode_of(loaded.entries[0], loaded.where[0])
    rows = [
        {"run": run, "task": loaded.name, **parse_entry(entry, mode, where)}
        for entry, where in zip(loaded.entries, loaded.where, strict=True)
    ]
    repetitions = _repetitions(loaded, rows, evaluation, found)
    for index, row in enumerate(rows):
        repetition, row["doc_id"] = divmod(index, len(rows) // repetitions)
        row["filter"] = "none" if repetitions == 1 else f"repetition {repetition + 1}"
    if evaluation is not None:
        evaluation.judge(rows, loaded.entries)
    return rows


def _repetitions(
    loaded: _Loaded,
    rows: Sequence[dict[str, Any]],
    evaluation: Evaluation | None,
    found: Predictions,
) -> int:
    """How many times each question was asked: by the config, the evaluation, or the prompts."""
    count = found.config.repetitions.get(loaded.name) if found.config else None
    if count is None and evaluation is not None and evaluation.repetitions > 1:
        count = evaluation.repetitions
    if count is None:
        count = _period([row["request_hash"] for row in rows])
    if len(rows) % count:
        raise SamplesError(
            f"{loaded.where[-1]}: {len(rows)} predictions are not {count} for every question; the "
            "file is truncated, run OpenCompass again."
        )
    return count


def _period(asked: Sequence[str]) -> int:
    """How often the same different questions follow each other; 1 where they do not."""
    questions = len(set(asked))
    count, rest = divmod(len(asked), questions)
    return count if not rest and list(asked) == list(asked[:questions]) * count else 1


def _run_info(
    found: Predictions,
    label: str,
    rows: Sequence[dict[str, Any]],
    numbers: dict[str, dict[str, Any]],
) -> RunInfo:
    groups = {
        group: [name for name in found.files if name.startswith(beginning)]
        for group, beginning in SUBJECT_GROUPS.items()
    }
    config = dict(found.config.models.get(found.model, {})) if found.config else {}
    return RunInfo(
        run=label,
        engine=ENGINE,
        source=str(found.folder),
        timestamp=found.timestamp,
        model=found.model,
        task_hashes=_task_hashes(rows),
        groups={group: names for group, names in groups.items() if len(names) > 1},
        config=config,
        results=numbers,
        files={name: ", ".join(map(str, files)) for name, files in found.files.items()},
        missing=dict(found.missing),
    )


def _task_hashes(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    digests: dict[str, Any] = {}
    for row in rows:
        digest = digests.setdefault(row["task"], hashlib.sha256())
        digest.update(f"{row['doc_hash']}{row['prompt_hash']}{row['target_hash']}".encode("ascii"))
    return {name: digest.hexdigest() for name, digest in digests.items()}
