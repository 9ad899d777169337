"""One line of lm-eval's ``samples_*.jsonl`` as one row of the samples table.

lm-eval logs no chosen option: it is the argmax of the log-likelihoods (strings such as
``["-23.55", "False"]``), for acc_norm divided by the choice's length in characters without the
delimiter. The verdicts themselves are lm-eval's own metrics.

Metrics of one name are verdicts in one task and grades in another (``acc`` of truthfulqa_mc2 is a
probability, ``em`` of coqa a mean over references), and a grade may happen to be 0 or 1: what
judges a task is decided once per task (:mod:`streamline_bench.stability.metrics`), not answer by
answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from streamline_bench.errors import NumericsError
from streamline_bench.stability.metrics import NORM_METRIC, deciding, is_verdict
from streamline_bench.stability.readers.answer_tokens import noted_tokens
from streamline_bench.stability.samples import Row, well_formed
from streamline_bench.stability.statistics.clusters import cluster_of

Request = tuple[Any, ...]


class LogFile(BaseModel):
    """A part of what lm-eval writes; keys that are null count as missing."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, payload: Any) -> Any:
        if isinstance(payload, Mapping):
            return {key: value for key, value in payload.items() if value is not None}
        return payload


class TaskConfig(LogFile):
    """A task's config, as far as the rows do not repeat it."""

    output_type: str = "multiple_choice"
    target_delimiter: str = " "
    gen_prefix: str = ""
    metric_list: list[dict[str, Any]] = []
    filter_list: list[dict[str, Any]] = []
    repeats: int = 1
    metadata: Any = None
    dataset_path: Any = None
    dataset_name: Any = None
    test_split: Any = None
    validation_split: Any = None

    @property
    def data(self) -> dict[str, str]:
        """The data set, its subset and the split that is asked, where they are named."""
        split = self.test_split or self.validation_split
        named = {"dataset": self.dataset_path, "subset": self.dataset_name, "split": split}
        return {key: str(value) for key, value in named.items() if value}

    @property
    def same_questions(self) -> str | None:
        """The task that asks the same as this one in another way, where the metadata name one."""
        told = self.metadata if isinstance(self.metadata, Mapping) else {}
        named = told.get("same_questions_as")
        return named if isinstance(named, str) else None

    @property
    def higher_is_better(self) -> dict[str, bool | None]:
        """The task's metrics in their order, as far as they have a name; None: it does not say."""
        found: dict[str, bool | None] = {}
        for entry in self.metric_list:
            name, higher = entry.get("metric"), entry.get("higher_is_better")
            if isinstance(name, str) and name.isprintable():  # a function is its source text
                found[name] = higher if isinstance(higher, bool) else None
        return found


@dataclass(frozen=True)
class TaskFacts:
    """What the results file says about a task and the rows do not.

    Attributes:
        chat: a chat template was applied.
        higher_is_better: its metrics in their order, and whether higher is better.
        answer_tokens: request -> tokens of its answers, where the model noted them.
    """

    name: str
    version: str
    config: TaskConfig
    chat: bool = False
    higher_is_better: Mapping[str, bool | None] = field(default_factory=dict)
    answer_tokens: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    @property
    def delimiter(self) -> str:
        """What stands between a prompt and each choice; the harness drops it in a chat."""
        prefix = self.config.gen_prefix
        kept = not self.chat or (prefix and not prefix[-1].isspace())
        return self.config.target_delimiter if kept else ""

    @property
    def mutual_info(self) -> bool:
        """Whether choices are scored without their context, too."""
        return any(m.get("metric") == "acc_mutual_info" for m in self.config.metric_list)

    @property
    def filters(self) -> list[str]:
        """Names of the task's filters, in order."""
        return [str(entry.get("name", "none")) for entry in self.config.filter_list] or ["none"]


class _Line(BaseModel):
    """One line; a metric is one more key, which ``metrics`` names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    doc_id: Annotated[int, Field(ge=0, lt=2**63)]
    doc: Any = None
    target: Any
    arguments: dict[str, dict[str, Any]] = Field(min_length=1)
    filtered_resps: list[Any]
    resps: list[Any] = []
    filter: str | None = None
    metrics: list[str] = []
    doc_hash: str
    prompt_hash: str
    target_hash: str

    @property
    def requests(self) -> list[Request]:
        """What was sent, one tuple per request, in order."""
        ordered = sorted(self.arguments.items(), key=lambda item: int(item[0].rsplit("_", 1)[1]))
        return [tuple(parts[name] for name in sorted(parts)) for _, parts in ordered]

    def numbers(self, repeats: int) -> dict[str, float]:
        """Metrics; a pair such as (loglikelihood, words) as ``name.0`` and ``name.1``.

        A list with one number for each repetition of the document is its mean as well: the
        repetitions of a document belong together, so that the document is what is drawn.
        """
        values: dict[str, float] = {}
        for name in self.metrics:
            value = (self.model_extra or {}).get(name)
            if (number := _number(value)) is not None:
                values[name] = number
            elif isinstance(value, list):
                parts = [part for part in map(_number, value) if part is not None]
                if len(parts) < len(value) or not parts:
                    continue
                if repeats > 1 and len(parts) == repeats:
                    values[name] = sum(parts) / repeats
                else:
                    values |= {f"{name}.{index}": part for index, part in enumerate(parts)}
        return values


def _number(value: Any) -> float | None:
    """A number as lm-eval logs it: numpy's bool and float32 are text there."""
    if isinstance(value, int | float):
        return float(value)
    if value in ("True", "False"):
        return float(value == "True")
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        return float(value)
    return None


_FLOAT = re.compile(r"-?\d+(\.\d*)?(e[+-]?\d+)?|-?inf|nan")


@dataclass(frozen=True)
class _Options:
    """The choices of one question: as shown, and as scored."""

    prompt: str
    shown: list[str]
    scored: list[str]
    contexts_differ: bool


def parse_row(line: bytes, facts: TaskFacts, where: str) -> Row:
    """Turn a line into a row of the samples table; one without a filter has filter "".

    Its verdict is preliminary: whether a metric is one, all rows of the task say
    (:func:`with_verdicts`).

    Args:
        where: file and line, for messages.

    Raises:
        SamplesError: the line is no JSON, or a field is missing or has another form than lm-eval's.
        NumericsError: a log-likelihood is NaN or infinite.
    """
    with well_formed(where, "a sample that lm-eval wrote", "the file is damaged, evaluate again"):
        return _row(_Line.model_validate_json(line), facts, where)


def _row(line: _Line, facts: TaskFacts, where: str) -> Row:
    requests = line.requests
    sent = json.dumps(requests, ensure_ascii=False, sort_keys=True)
    numbers = line.numbers(facts.config.repeats)
    verdict = deciding(tuple(facts.higher_is_better), facts.higher_is_better, [numbers])
    if verdict is not None and not is_verdict([numbers[verdict]]):
        verdict = None
    norm = numbers.get(NORM_METRIC)
    row = Row(
        task=facts.name,
        task_version=facts.version,
        output_type=facts.config.output_type,
        filter=line.filter or "",
        doc_id=line.doc_id,
        doc_hash=line.doc_hash,
        prompt_hash=line.prompt_hash,
        target_hash=line.target_hash,
        request_hash=hashlib.sha256(sent.encode("utf-8")).hexdigest(),
        prompt=str(requests[0][0]),
        target=str(line.target),
        cluster=cluster_of(facts.name, line.doc),
        metrics=numbers,
        correct=None if verdict is None else bool(numbers[verdict]),
        verdict_metric=verdict,
        correct_norm=bool(norm) if norm in (0.0, 1.0) else None,
    )
    if facts.config.output_type == "generate_until":
        row.text = _text(line.filtered_resps)
        answer = _first_text(line.resps)
        row.answer = None if answer == row.text else answer
        if (counted := noted_tokens(facts.answer_tokens, requests)) is not None:
            row.tokens, row.thinking, row.unfinished = counted
    else:
        _score(row, line, facts, where)
    return row


def _text(answers: list[Any]) -> str:
    first = answers[0] if len(answers) == 1 else answers
    return first if isinstance(first, str) else json.dumps(first, ensure_ascii=False)


def _first_text(responses: Any) -> str | None:
    """The first answer of lists of them; None where it is no text."""
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return responses if isinstance(responses, str) else None


def _score(row: Row, line: _Line, facts: TaskFacts, where: str) -> None:
    """Fill in what was chosen from, the scores, and what they predict."""
    requests = line.requests
    scores = [
        float(answer[0] if isinstance(answer, list) else answer) for answer in line.filtered_resps
    ]
    if len(scores) != len(requests):
        raise ValueError(f"{len(scores)} answers to {len(requests)} requests")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise NumericsError(
                f"{where}: task '{facts.name}', document {row.doc_id}, choice {index} has "
                f"log-likelihood {score}; check the weights and the dtype of the model."
            )
    if facts.config.output_type == "loglikelihood_rolling":
        row.loglikelihoods = scores
        return
    if facts.mutual_info:  # the second half are the choices without their context
        scores, requests = scores[: len(scores) // 2], requests[: len(requests) // 2]
    options = _options(requests, facts.delimiter)
    row.prompt, row.choices, row.loglikelihoods = options.prompt, options.shown, scores
    row.lengths = [len(text) for text in options.scored]
    row.byte_lengths = [len(text.encode("utf-8")) for text in options.scored]
    if len(scores) > 1:
        row.prediction = int(np.argmax(scores))
        # lm-eval divides by the length of the choice, which is not what is scored in such tasks.
        if not options.contexts_differ and min(row.lengths) > 0:
            row.prediction_norm = int(np.argmax(np.asarray(scores) / np.asarray(row.lengths)))
        acc = row.metrics.get("acc")
        by_acc = bool(acc) if acc in (0.0, 1.0) else None
        row.gold = _gold(row.target, options, row.prediction, by_acc)


def _options(requests: Sequence[Request], delimiter: str) -> _Options:
    contexts = [str(request[0]) for request in requests]
    continuations = [str(request[1]) for request in requests]
    if delimiter and all(text.startswith(delimiter) for text in continuations):
        continuations = [text[len(delimiter) :] for text in continuations]
    if len(set(contexts)) == 1:
        return _Options(contexts[0], continuations, continuations, contexts_differ=False)
    # Tasks such as winogrande put the choice into the context and score the same ending.
    shared = os.path.commonprefix(contexts)  # noqa: RUF071 - characters are meant
    shared = shared[: shared.rfind(" ") + 1]
    shown = [
        f"{context[len(shared) :]} {text}"
        for context, text in zip(contexts, continuations, strict=True)
    ]
    return _Options(shared, shown, continuations, contexts_differ=True)


def _gold(target: str, options: _Options, prediction: int, right: bool | None) -> int | None:
    """The index of the right choice: the target as an index or as text, never against ``acc``."""
    candidates = []
    if target.strip().isdecimal() and int(target) < len(options.shown):
        candidates.append(int(target))
    candidates += [index for index, text in enumerate(options.shown) if text == target]
    for candidate in candidates:
        if right is None or (candidate == prediction) == right:
            return candidate
    if options.contexts_differ and right is not None and len(options.shown) == 2:
        return prediction if right else 1 - prediction
    return None


def with_verdicts(
    rows: Sequence[Row], higher_is_better: Mapping[str, bool | None] | None = None
) -> None:
    """Judge the rows of one task, each filter by one metric, where that says right or wrong.

    A graded ``acc`` says nothing of the right choice either: where ``gold`` was read with its help,
    it is unknown.

    Args:
        higher_is_better: the task's metrics in their order.
    """
    higher = higher_is_better or {}
    by_filter: dict[str, list[Row]] = {}
    for row in rows:
        by_filter.setdefault(row.filter, []).append(row)
    for part in by_filter.values():
        records = [row.metrics for row in part]
        name = deciding(tuple(higher), higher, records)
        verdict = name if name and is_verdict(each.get(name) for each in records) else None
        norm = all(each.get(NORM_METRIC, 0.0) in (0.0, 1.0) for each in records)
        acc = all(each.get("acc", 0.0) in (0.0, 1.0) for each in records)
        for row in part:
            row.correct = None if verdict is None else bool(row.metrics[verdict])
            row.verdict_metric = verdict
            row.correct_norm = row.correct_norm if norm else None
            row.gold = row.gold if acc else None


_NOT_ASKED = -1.0
"""What RULER logs for lengths that a document does not have."""


def without_placeholders(
    rows: Sequence[Row], printed: Mapping[str, Any], names: Sequence[str]
) -> str | None:
    """Drop numbers that say that a metric is not of this document; return what stands for it.

    They are those without which the mean is the number that the harness prints. If every document
    then has exactly one of several metrics, that number also gets a name for all: ``4096 or 8192``.

    Args:
        printed: metric -> number over all documents.
        names: metrics in the order of the configuration.
    """
    dropped = False
    for name in names:
        values = [row.metrics[name] for row in rows if name in row.metrics]
        kept = [value for value in values if value != _NOT_ASKED]
        aggregate = printed.get(name)
        if len(kept) == len(values) or not isinstance(aggregate, int | float):
            continue
        expected = sum(kept) / len(kept) if kept else _NOT_ASKED
        if math.isclose(aggregate, expected, abs_tol=1e-9):
            dropped = True
            for row in rows:
                if row.metrics.get(name) == _NOT_ASKED:
                    del row.metrics[name]
    own = [[name for name in names if name in row.metrics] for row in rows]
    together = [name for name in names if any(name in each for each in own)]
    if not dropped or len(together) < 2 or any(len(each) != 1 for each in own):
        return None
    joined = " or ".join(together)
    for row, (name,) in zip(rows, own, strict=True):
        row.metrics[joined] = row.metrics[name]
    return joined
