"""Reads the predictions of OpenCompass (0.5) as a samples table.

Nothing is believed without a check: entries must be numbered without a gap, parts of a data set
must follow each other, and an evaluation beside the predictions must be of these predictions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from streamline_bench.core.files import read_json
from streamline_bench.errors import SamplesError
from streamline_bench.stability.readers.opencompass_folder import DataSet, Predictions
from streamline_bench.stability.readers.opencompass_results import (
    Evaluation,
    judge,
    read_evaluation,
)
from streamline_bench.stability.readers.opencompass_rows import Entry, parse_entry, row_of
from streamline_bench.stability.samples import Row, RunInfo, Samples, task_hash, well_formed

ENGINE = "opencompass"

SUBJECT_GROUPS = {
    "mmlu": "lukaemon_mmlu_",
    "cmmlu": "cmmlu-",
    "ceval": "ceval-",
    "bbh": "bbh-",
}
"""Benchmark -> how OpenCompass' configs begin the names of its subjects."""

_AGAIN = "run OpenCompass again"


@dataclass(frozen=True)
class _Answers:
    """What is known of one data set."""

    rows: list[Row]
    evaluation: Evaluation | None


def read_opencompass(
    found: Predictions, *, run: str | None = None, progress: bool = True
) -> Samples:
    """Read the predictions of one model; data sets of its earlier runs are joined.

    Args:
        found: see :func:`streamline_bench.stability.readers.opencompass_folder.find_predictions`.
        run: label of the run; by default the model's abbreviation.

    Raises:
        SamplesError: a file is truncated, damaged or not OpenCompass', or runs contradict each
            other; file and entry are named.
        NumericsError: a score is NaN or infinite; the question is named.
    """
    runs = (found, *found.older)
    total = sum(
        file.stat().st_size for one in runs for each in one.sets.values() for file in each.files
    )
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="predictions", delay=2, disable=not progress
    ) as bar:
        answers = {name: _answers(name, each, bar) for name, each in found.sets.items()}
        for older in found.older:
            found = _joined(found, older, answers, bar)
    rows = [row for name in sorted(answers) for row in answers[name].rows]
    info = _run_info(found, run or found.model, answers)
    return Samples.from_rows(rows, info)


def _joined(
    found: Predictions, older: Predictions, answers: dict[str, _Answers], bar: tqdm[Any]
) -> Predictions:
    """Add the data sets of an earlier run that was made with the same settings.

    Raises:
        SamplesError: it has answers to a data set that is read, and nobody can know which count.
    """
    name = f"the run {older.timestamp}"
    twice = [each for each in older.sets if each in answers]
    differing = found.difference(older)
    if found.settings is None or older.settings is None:
        differing = "there is no config that says with which settings it was made"
    if differing and twice:
        raise SamplesError(
            f"'{older.folder}' and a newer run beside it both answer data set '{twice[0]}', and "
            f"contradict each other ({differing}); give one run instead of the work folder."
        )
    if differing:
        return replace(found, left_out={**found.left_out, name: differing})
    read = {each: _answers(each, files, bar) for each, files in older.sets.items()}
    for each in twice:
        if _asked(read[each].rows) != _asked(answers[each].rows):
            raise SamplesError(
                f"'{older.folder}' and a newer run beside it asked other questions of data set "
                f"'{each}'; give one run instead of the work folder."
            )
    answers |= {each: new for each, new in read.items() if each not in twice}
    unread = {f"{older.timestamp}/{file}": why for file, why in older.left_out.items()}
    if twice:
        unread[name] = f"a newer run has the same data sets ({', '.join(twice)})"
    sets = {**older.sets, **found.sets}
    return replace(
        found,
        sets=sets,
        left_out={**found.left_out, **unread},
        missing={k: v for k, v in {**older.missing, **found.missing}.items() if k not in sets},
    )


def _asked(rows: Sequence[Row]) -> list[tuple[str, int, str, str]]:
    return [(row.filter, row.doc_id, row.request_hash, row.target_hash) for row in rows]


def _answers(name: str, files: DataSet, bar: tqdm[Any]) -> _Answers:
    parts = [_entries(file, bar) for file in files.files]
    entries = [entry for part in parts for entry in part]
    where = [
        f"{file}, question {number}"
        for file, part in zip(files.files, parts, strict=True)
        for number in range(len(part))
    ]
    for entry, place in zip(entries, where, strict=True):
        if entry.mode != entries[0].mode:
            raise SamplesError(
                f"{place}: asked by {entry.mode}, the entries before it by {entries[0].mode}; the "
                f"file is damaged, {_AGAIN}."
            )
    rows = [row_of(entry, place) for entry, place in zip(entries, where, strict=True)]
    evaluation = read_evaluation(files.results, parts) if files.results else None
    count = files.repetitions
    if count is None:  # as the evaluation says, or else the prompts
        repeated = evaluation.repetitions if evaluation else 1
        count = repeated if repeated > 1 else _period([row.request_hash for row in rows])
    if len(rows) % count:
        raise SamplesError(
            f"{where[-1]}: {len(rows)} predictions are not {count} for every question; the file is "
            f"truncated, {_AGAIN}."
        )
    for index, row in enumerate(rows):
        repetition, row.doc_id = divmod(index, len(rows) // count)
        row.task = name
        row.filter = "none" if count == 1 else f"repetition {repetition + 1}"
    if evaluation is not None:
        judge(rows, evaluation, files.results[0])
    return _Answers(rows, evaluation)


def _entries(file: Path, bar: tqdm[Any]) -> list[Entry]:
    payload = read_json(file, SamplesError, f"the file looks truncated, {_AGAIN}")
    if not isinstance(payload, dict) or not payload:
        raise SamplesError(f"{file} holds no predictions; {_AGAIN}.")
    with well_formed(str(file), "a file of predictions", _AGAIN):
        json.loads(file.read_bytes(), object_pairs_hook=_without_twins)
    entries = []
    for number in range(len(payload)):
        entry = payload.get(str(number))
        if not isinstance(entry, dict):
            raise SamplesError(
                f"{file} has {len(payload)} entries, but none with the number {number}; the file "
                f"is truncated or was edited, {_AGAIN}."
            )
        entries.append(parse_entry(entry, f"{file}, question {number}"))
    bar.update(file.stat().st_size)
    return entries


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it holds '{twin}' twice")
    return found


def _period(asked: Sequence[str]) -> int:
    """How often the same different questions follow each other; 1 where they do not."""
    questions = len(set(asked))
    count, rest = divmod(len(asked), questions)
    return count if not rest and list(asked) == list(asked[:questions]) * count else 1


def _run_info(found: Predictions, label: str, answers: dict[str, _Answers]) -> RunInfo:
    groups = {
        group: [name for name in sorted(answers) if name.startswith(beginning)]
        for group, beginning in SUBJECT_GROUPS.items()
    }
    evaluations = {name: each.evaluation for name, each in answers.items()}
    return RunInfo(
        run=label,
        engine=ENGINE,
        source=str(found.folder),
        timestamp=found.timestamp,
        model=found.model,
        task_hashes={name: task_hash(each.rows) for name, each in answers.items()},
        groups={group: names for group, names in groups.items() if len(names) > 1},
        config=dict(found.settings or {}),
        # Named as lm-eval names its own: metric, then filter.
        results={
            name: {f"{key},none": value for key, value in each.numbers.items()} if each else {}
            for name, each in evaluations.items()
        },
        files={name: ", ".join(map(str, each.files)) for name, each in found.sets.items()},
        missing=dict(found.missing),
        left_out=dict(found.left_out),
    )
