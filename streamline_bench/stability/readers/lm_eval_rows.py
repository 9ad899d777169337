"""One line of lm-eval's ``samples_*.jsonl`` as one row of the samples table.

lm-eval logs no chosen option: it is the argmax of the log-likelihoods (strings such as
``["-23.55", "False"]``), for acc_norm divided by the choice's length in characters without the
delimiter. The verdicts themselves are lm-eval's own metrics.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.readers.verdicts import NORM_METRIC, VERDICT_METRICS
from streamline_bench.stability.statistics.clusters import cluster_of

__all__ = ["TaskFacts", "parse_row", "task_facts"]

_REQUIRED = ("doc_id", "target", "arguments", "filtered_resps", "doc_hash", "prompt_hash",
             "target_hash")  # fmt: skip


@dataclass(frozen=True)
class TaskFacts:
    """What the results file says about a task and the rows do not."""

    name: str
    version: str
    output_type: str
    delimiter: str
    mutual_info: bool


@dataclass(frozen=True)
class _Options:
    """The choices of one question: as shown, and as scored."""

    prompt: str
    shown: list[str]
    scored: list[str]
    contexts_differ: bool


def task_facts(name: str, results: Mapping[str, Any]) -> TaskFacts:
    """Collect the facts of task ``name`` from a results file."""
    config = results["configs"][name]
    metrics = {str(entry.get("metric")) for entry in config.get("metric_list") or ()}
    return TaskFacts(
        name=name,
        version=str(results["versions"][name]),
        output_type=str(config.get("output_type") or "multiple_choice"),
        delimiter=_delimiter(config, bool(results.get("chat_template"))),
        mutual_info="acc_mutual_info" in metrics,
    )


def _delimiter(config: Mapping[str, Any], chat: bool) -> str:
    delimiter = str(config.get("target_delimiter", " "))
    if not chat:
        return delimiter
    prefix = config.get("gen_prefix") or ""
    return delimiter if prefix and not prefix[-1].isspace() else ""


def parse_row(line: Mapping[str, Any], facts: TaskFacts, where: str) -> dict[str, Any]:
    """Turn a parsed line into a row of the samples table.

    Its verdict is preliminary: whether a metric is one, all rows of the task say
    (:func:`streamline_bench.stability.readers.verdicts.with_verdicts`).

    Args:
        where: file and line, for messages.

    Raises:
        SamplesError: a field is missing or has another form than lm-eval's.
        NumericsError: a log-likelihood is NaN or infinite.
    """
    missing = [name for name in _REQUIRED if name not in line]
    if missing:
        raise SamplesError(f"{where}: field '{missing[0]}' is missing; was this made by lm-eval?")
    try:
        requests = _requests(line["arguments"])
        row = _identity(line, facts, requests)
        row["metrics"] = _metrics(line)
        row |= _verdicts(row["metrics"])
        if facts.output_type == "generate_until":
            return row | {"text": _text(line["filtered_resps"])}
        return row | _scores(line, facts, requests, row, where)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SamplesError(
            f"{where}: not a sample of lm-eval's form ({type(error).__name__}: {error})."
        ) from None


def _identity(
    line: Mapping[str, Any], facts: TaskFacts, requests: list[tuple[Any, ...]]
) -> dict[str, Any]:
    sent = json.dumps(requests, ensure_ascii=False, sort_keys=True)
    return {
        "task": facts.name,
        "task_version": facts.version,
        "output_type": facts.output_type,
        "filter": str(line.get("filter", "none")),
        "doc_id": int(line["doc_id"]),
        "doc_hash": str(line["doc_hash"]),
        "prompt_hash": str(line["prompt_hash"]),
        "target_hash": str(line["target_hash"]),
        "request_hash": hashlib.sha256(sent.encode("utf-8")).hexdigest(),
        "prompt": str(requests[0][0]),
        "target": str(line["target"]),
        "cluster": cluster_of(facts.name, line.get("doc")),
    }


def _requests(arguments: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    ordered = sorted(arguments, key=lambda name: int(name.rsplit("_", 1)[1]))
    return [tuple(arguments[name][part] for part in sorted(arguments[name])) for name in ordered]


def _metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers as they are; a pair such as (loglikelihood, words) as ``name.0`` and ``name.1``."""
    values: dict[str, float] = {}
    for name in line.get("metrics", ()):
        value = line.get(name)
        if isinstance(value, bool | int | float):
            values[name] = float(value)
        elif isinstance(value, list) and all(isinstance(part, int | float) for part in value):
            values |= {f"{name}.{index}": float(part) for index, part in enumerate(value)}
    return values


def _verdicts(metrics: Mapping[str, float]) -> dict[str, Any]:
    named = [name for name in VERDICT_METRICS if metrics.get(name) in (0.0, 1.0)]
    norm = metrics.get(NORM_METRIC)
    return {
        "correct": bool(metrics[named[0]]) if named else None,
        "verdict_metric": named[0] if named else None,
        "correct_norm": bool(norm) if norm in (0.0, 1.0) else None,
    }


def _text(answers: Any) -> str:
    first = answers[0] if isinstance(answers, list) and len(answers) == 1 else answers
    return first if isinstance(first, str) else json.dumps(first, ensure_ascii=False)


def _scores(
    line: Mapping[str, Any],
    facts: TaskFacts,
    requests: list[tuple[Any, ...]],
    row: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    scores = [_loglikelihood(answer) for answer in line["filtered_resps"]]
    if len(scores) != len(requests):
        raise ValueError(f"{len(scores)} answers to {len(requests)} requests")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise NumericsError(
                f"{where}: task '{facts.name}', document {row['doc_id']}, choice {index} has "
                f"log-likelihood {score}; check the weights and the dtype of the model."
            )
    if facts.output_type == "loglikelihood_rolling":
        return {"loglikelihoods": scores}
    if facts.mutual_info:  # the second half are the choices without their context
        scores, requests = scores[: len(scores) // 2], requests[: len(requests) // 2]
    options = _options(requests, facts.delimiter)
    lengths = [len(text) for text in options.scored]
    found: dict[str, Any] = {
        "prompt": options.prompt,
        "choices": options.shown,
        "loglikelihoods": scores,
        "lengths": lengths,
        "byte_lengths": [len(text.encode("utf-8")) for text in options.scored],
    }
    if len(scores) > 1:
        found |= _predictions(scores, lengths, options, row)
    return found


def _loglikelihood(answer: Any) -> float:
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


def _options(requests: list[tuple[Any, ...]], delimiter: str) -> _Options:
    contexts = [str(request[0]) for request in requests]
    continuations = [str(request[1]) for request in requests]
    if delimiter and all(text.startswith(delimiter) for text in continuations):
        continuations = [text[len(delimiter) :] for text in continuations]
    if len(set(contexts)) == 1:
        return _Options(contexts[0], continuations, continuations, contexts_differ=False)
    # Tasks such as winogrande put the choice into the context and score the same ending.
    shared = _shared_beginning(contexts)
    shown = [
        f"{context[len(shared) :]} {text}"
        for context, text in zip(contexts, continuations, strict=True)
    ]
    return _Options(shared, shown, continuations, contexts_differ=True)


def _shared_beginning(texts: Sequence[str]) -> str:
    columns = zip(*texts, strict=False)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    beginning = texts[0][:same]
    return beginning[: beginning.rfind(" ") + 1]


def _predictions(
    scores: Sequence[float], lengths: Sequence[int], options: _Options, row: Mapping[str, Any]
) -> dict[str, Any]:
    prediction = int(np.argmax(scores))
    # lm-eval divides by the length of the choice, which is not what is scored in such tasks.
    norm = None
    if not options.contexts_differ and min(lengths) > 0:
        norm = int(np.argmax(np.asarray(scores) / np.asarray(lengths, dtype=np.float64)))
    by_acc = row["correct"] if row["verdict_metric"] == "acc" else None
    return {
        "prediction": prediction,
        "prediction_norm": norm,
        "gold": _gold(str(row["target"]), options, prediction, by_acc),
    }


def _gold(target: str, options: _Options, prediction: int, right: bool | None) -> int | None:
    """The index of the right choice: the target as an index or as text, never against ``acc``."""
    candidates = []
    if target.strip().isdigit() and int(target) < len(options.shown):
        candidates.append(int(target))
    candidates += [index for index, text in enumerate(options.shown) if text == target]
    for candidate in candidates:
        if right is None or (candidate == prediction) == right:
            return candidate
    if options.contexts_differ and right is not None and len(options.shown) == 2:
        return prediction if right else 1 - prediction
    return None
