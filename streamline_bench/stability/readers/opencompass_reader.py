"""Reads the predictions of OpenCompass (0.5) as a samples table.

Nothing is believed without a check: entries must be numbered without a gap, parts of a data set
must follow each other, and an evaluation beside the predictions must be of these predictions.

Right or wrong per question comes from that evaluation (``results/<model>/<data set>.json``). Where
it states a verdict for every question, the verdict counts. Where it does not, choices are judged by
their gold, and generated answers by the extracted answers, if it has them; that must then give the
accuracy that the evaluation reports.

A further number per question (a score, an F1) is taken where its mean is a number that the
evaluation reports, and has its name. OpenCompass does not say whether higher is better; what it
reports are scores, for which it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from streamline_bench.core.files import read_json
from streamline_bench.errors import SamplesError
from streamline_bench.stability.metrics import is_verdict
from streamline_bench.stability.readers.opencompass_folder import DataSet, Predictions
from streamline_bench.stability.readers.opencompass_rows import Entry, parse_entry, row_of
from streamline_bench.stability.samples import (
    REPETITION,
    Row,
    RunInfo,
    Samples,
    task_hash,
    well_formed,
)

ENGINE = "opencompass"

SUBJECT_GROUPS = {
    "mmlu": "lukaemon_mmlu_",
    "cmmlu": "cmmlu-",
    "ceval": "ceval-",
    "bbh": "bbh-",
}
"""Benchmark -> how OpenCompass' configs begin the names of its subjects."""

_AGAIN = "run OpenCompass again"
_EVALUATE = "evaluate again (opencompass --mode eval --reuse)"
_VERDICTS = ("correct", "is_correct", "cascade_correct")
_TEXTS = frozenset(
    {"pred", "prediction", "predictions", "answer", "reference", "references", "gold"}
)
_OVER_REPETITIONS = frozenset({"example_abbr"})
_RUNS = re.compile(r" \(\d+ runs average\)$")
_ACCURACY = re.compile(r"^accuracy( \(\d+ runs average\))?$")


class Evaluation(BaseModel):
    """What OpenCompass found on one data set, or on a part of it; numbers are further keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    details: dict[str, Any] | list[Any] | None = None

    @property
    def numbered(self) -> bool:
        """Whether the details stand by the number of the question."""
        return isinstance(self.details, dict)

    @cached_property
    def listed(self) -> list[Any]:
        """The details, in order."""
        if isinstance(self.details, dict):
            numbers = sorted((key for key in self.details if re.fullmatch("[0-9]{1,9}", key)),
                             key=int)  # fmt: skip
            return [self.details[key] for key in numbers]
        return self.details or []

    @property
    def repetitions(self) -> int:
        """How many times each question was asked, as far as the details tell."""
        if self.numbered or not self.listed:
            return 1
        first = self.listed[0]
        if (verdicts := _verdicts(first)) is not None or not isinstance(first, dict):
            return len(verdicts or [True])
        # OpenCompass makes a list of every field of a question, with an entry per repetition.
        fields = [value for key, value in first.items() if key not in _OVER_REPETITIONS]
        lengths = {len(value) for value in fields if isinstance(value, list)}
        whole = len(lengths) == 1 and all(isinstance(value, list) for value in fields)
        return max(1, lengths.pop()) if whole else 1

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Numbers over all questions, by OpenCompass' names."""
        return {
            name: float(value)
            for name, value in (self.model_extra or {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    @cached_property
    def graded(self) -> dict[str, list[float]]:
        """Numbers per prediction whose mean, or 100 times it, is reported; by the reported name."""
        details = [detail for detail in self.listed if isinstance(detail, dict)]
        if not details or len(details) < len(self.listed):
            return {}
        found: dict[str, list[float]] = {}
        for key in details[0]:
            values = [_numbers(detail.get(key)) for detail in details]
            if key in _TEXTS or any(len(value) != self.repetitions for value in values):
                continue
            # In the order of predictions: first repetition of every question, then the second.
            numbers = [value[number] for number in range(self.repetitions) for value in values]
            mean = sum(numbers) / len(numbers)
            named = [name for name, value in self.numbers.items() if _is_mean(value, mean)]
            for name in sorted(named, key=lambda name: _RUNS.sub("", name) != key)[:1]:
                found.setdefault(_RUNS.sub("", name), numbers)
        return found

    @property
    def accuracy(self) -> float | None:
        """Per cent; None where several are reported and differ."""
        found = {value for name, value in self.numbers.items() if _ACCURACY.match(name)}
        return found.pop() if len(found) == 1 else None

    @property
    def stated(self) -> list[bool] | None:
        """A verdict per prediction, where every question has one for each time it was asked."""
        found = [_verdicts(detail) for detail in self.listed]
        if not found or any(value is None or len(value) != self.repetitions for value in found):
            return None
        return [value[number] for number in range(self.repetitions) for value in found if value]

    @property
    def derived(self) -> list[bool] | None:
        """Whether the extracted answers are the references, as accuracy evaluators compare them.

        None where that does not give the accuracy.
        """
        if not self.numbered or not self.listed or self.accuracy is None:
            return None
        pairs = [
            (detail.get("predictions"), detail.get("references"))
            for detail in self.listed
            if isinstance(detail, dict)
        ]
        same = [str(answer) == str(right) for answer, right in pairs]
        return same if same and _gives(same, self.accuracy) else None


class _Answers(NamedTuple):
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
    evaluation = _read_evaluation(files.results, parts) if files.results else None
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
        row.filter = "none" if count == 1 else f"{REPETITION} {repetition + 1}"
    if evaluation is not None:
        _judge(rows, evaluation, files.results[0])
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
        computed_by=dict.fromkeys(answers, found.computed_by) if found.computed_by else {},
        metrics={
            name: [*_verdict_first(each.rows), *each.evaluation.graded]
            for name, each in answers.items()
            if each.evaluation
        },
        higher_is_better={
            name: dict.fromkeys(each.evaluation.graded, True)
            for name, each in answers.items()
            if each.evaluation
        },
        # Named as lm-eval names its own: metric, then filter.
        results={
            name: {f"{key},none": value for key, value in each.numbers.items()} if each else {}
            for name, each in evaluations.items()
        },
        files={name: ", ".join(map(str, each.files)) for name, each in found.sets.items()},
        missing=dict(found.missing),
        left_out=dict(found.left_out),
    )


def _verdict_first(rows: Sequence[Row]) -> list[str]:
    """What says right or wrong counts before a grade."""
    return [rows[0].verdict_metric] if rows[0].verdict_metric else []


def _read_evaluation(paths: Sequence[Path], entries: Sequence[Sequence[Entry]]) -> Evaluation:
    """Read the evaluation of one data set, made from these predictions, part by part.

    Its parts become one: all details in order, and the accuracy over all questions.
    """
    if len(paths) == 1:
        entries = [[entry for part in entries for entry in part]]
    if len(paths) != len(entries):
        raise SamplesError(
            f"{paths[0]} is one of {len(paths)} parts of an evaluation, of {len(entries)} parts of "
            f"predictions; {_EVALUATE}."
        )
    parts = [_read(path, part) for path, part in zip(paths, entries, strict=True)]
    if len(parts) == 1:
        return parts[0]
    forms = {(part.numbered, bool(part.listed)) for part in parts}
    if len(forms) > 1 or any(part.repetitions > 1 for part in parts):
        raise SamplesError(
            f"{paths[0]} and the other parts cannot be joined, because their details differ in "
            f"form or repeat questions; {_EVALUATE} without splitting the data set."
        )
    details = [detail for part in parts for detail in part.listed]
    known = [(part.accuracy, len(own)) for part, own in zip(parts, entries, strict=True)]
    accuracy = [value * count for value, count in known if value is not None]
    total = sum(count for _, count in known)
    payload: dict[str, Any] = {
        "details": dict(zip(map(str, range(len(details))), details, strict=True))
        if parts[0].numbered
        else details
    }
    if len(accuracy) == len(parts) and total:
        payload["accuracy"] = sum(accuracy) / total
    for name in parts[0].graded:
        if all(name in part.graded for part in parts):
            sums = (part.numbers[name] * len(part.listed) for part in parts)
            payload.setdefault(name, sum(sums) / len(details))
    return Evaluation.model_validate(payload)


def _read(path: Path, entries: Sequence[Entry]) -> Evaluation:
    payload = read_json(path, SamplesError, f"the file looks truncated, {_EVALUATE}")
    with well_formed(str(path), "an evaluation that OpenCompass wrote", _EVALUATE):
        found = Evaluation.model_validate(payload)
        expected, _, _ = len(found.listed) * found.repetitions, found.numbers, found.graded
    if found.listed and expected != len(entries):
        raise SamplesError(
            f"{path} was made from {expected} predictions, beside it are {len(entries)}: one is "
            f"truncated or of another run; run OpenCompass again, or {_EVALUATE}."
        )
    for number, (detail, entry) in enumerate(zip(found.listed, entries, strict=False)):
        # Details by number repeat the predictions that they are about.
        judged = detail.get("origin_prediction") if isinstance(detail, dict) else None
        if found.numbered and not _is_about(judged, entry):
            raise SamplesError(
                f"{path}: question {number} was judged on another prediction than the one beside "
                f"it; {_EVALUATE}."
            )
    return found


def _judge(rows: Sequence[Row], evaluation: Evaluation, path: Path) -> None:
    """Set ``correct`` of the rows, in place; rows stay as they are where nothing is known.

    The rows are in the order of predictions: first repetition of every question, then the second.
    """
    for name, values in evaluation.graded.items():
        for row, value in zip(rows, values, strict=True):
            row.metrics.setdefault(name, value)
    stated = evaluation.stated
    if stated is None and rows[0].output_type == "generate_until":
        stated = evaluation.derived
    if stated is not None and len(stated) == len(rows):
        for row, verdict in zip(rows, stated, strict=True):
            row.correct, row.verdict_metric = verdict, "accuracy"
            row.metrics["accuracy"] = float(verdict)
        return
    own = [row.correct for row in rows if row.correct is not None]
    for name, values in () if own else evaluation.graded.items():
        if is_verdict(values):
            for row, value in zip(rows, values, strict=True):
                row.correct, row.verdict_metric = bool(value), name
            return
    accuracy = evaluation.accuracy
    if accuracy is not None and len(own) == len(rows) and not _gives(own, accuracy):
        raise SamplesError(
            f"{path} reports accuracy {accuracy:.4f}, the predictions beside it give "
            f"{100 * sum(own) / len(own):.4f}: it was made from others; {_EVALUATE}."
        )


def _numbers(value: Any) -> list[float]:
    """A number of a question, or those of its repetitions; empty for anything else."""
    found = value if isinstance(value, list) else [value]
    return [float(part) for part in found] if all(isinstance(p, int | float) for p in found) else []


def _verdicts(detail: Any) -> list[bool] | None:
    """The verdicts on one question, one per repetition; None if it has none, or a grade."""
    for name in _VERDICTS:
        value = detail.get(name) if isinstance(detail, dict) else None
        if value is not None:
            found = value if isinstance(value, list) else [value]
            return [bool(part) for part in found] if all(part in (0, 1) for part in found) else None
    return None


def _is_about(judged: Any, entry: Entry) -> bool:
    if isinstance(judged, str):
        return bool(judged == entry.prediction)
    if not isinstance(judged, Mapping):
        return True
    own = {label: score.ppl for label, score in entry.scores.items()}
    return all(
        score.get("PPL") == own[label]
        for label, score in judged.items()
        if label in own and isinstance(score, Mapping)
    )


def _is_mean(reported: float, mean: float) -> bool:
    """Whether a number is this mean, as a share or per cent, maybe rounded to two digits."""
    return any(
        math.isclose(reported, value, abs_tol=1e-6) or reported == round(value, 2)
        for value in (mean, 100 * mean)
    )


def _gives(verdicts: Sequence[bool], accuracy: float) -> bool:
    return math.isclose(100 * sum(verdicts) / len(verdicts), accuracy, abs_tol=1e-6)
