"""One entry of an OpenCompass prediction file as one row of the samples table.

OpenCompass does not store the question, only the prompts made from it. What identifies a row is
therefore computed from them: the document's hash from the prompts without the in-context examples,
the prompt's from the prompts as sent.

- PPL: ``label: X`` holds ``PPL``, the mean token negative log-likelihood (not exponentiated) over
  the whole prompt; the lowest is the prediction.
- LL: ``label: X`` holds ``Loglikelihood``; the highest is the prediction. Whether it is summed or
  averaged over the tokens depends on the model class.
- CLP: ``prediction`` holds the probabilities of single-token ``choices``, normalised over them.
- GEN: ``prediction`` is text; ``gold`` is left out where it is empty, zero or false.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from streamline_bench.errors import NumericsError, SamplesError

__all__ = ["MODES", "mode_of", "parse_entry"]

MODES: Mapping[str, str] = {
    "PPL": "multiple_choice",
    "LL": "multiple_choice",
    "CLP": "multiple_choice",
    "GEN": "generate_until",
}
"""OpenCompass' way to ask -> output type of the samples table."""

_LABEL = "label: "


def mode_of(entry: Mapping[str, Any], where: str) -> str:
    """Tell how OpenCompass asked: a key of :data:`MODES`.

    Raises:
        SamplesError: the entry has none of the known forms.
    """
    scores = [value for key, value in entry.items() if key.startswith(_LABEL)]
    for name, key in (("PPL", "PPL"), ("LL", "Loglikelihood")):
        if scores and all(isinstance(score, dict) and key in score for score in scores):
            return name
    if not scores and "prediction" in entry:
        return "CLP" if {"choices", "pred_label"} <= set(entry) else "GEN"
    raise SamplesError(
        f"{where}: neither PPL, LL, CLP nor generation as OpenCompass writes them (its keys: "
        f"{', '.join(sorted(entry)[:6]) or 'none'}); the file is damaged, run OpenCompass again."
    )


def parse_entry(entry: Mapping[str, Any], mode: str, where: str) -> dict[str, Any]:
    """Turn an entry into a row without run, task, filter and document number.

    Args:
        mode: of the data set; an entry of another mode is an error.
        where: file and key, for messages.

    Raises:
        SamplesError: a field is missing or of another form than OpenCompass'.
        NumericsError: a score is NaN or infinite.
    """
    if mode_of(entry, where) != mode:
        raise SamplesError(
            f"{where}: asked by {mode_of(entry, where)}, the entries before it by {mode}; the file "
            "is damaged, run OpenCompass again."
        )
    try:
        row = {"PPL": _scored, "LL": _scored, "CLP": _conditional, "GEN": _generated}[mode](
            entry, where
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SamplesError(
            f"{where}: not an entry of OpenCompass' form ({type(error).__name__}: {error}); the "
            "file is damaged, run OpenCompass again."
        ) from None
    gold = entry.get("gold")
    return {
        "task_version": "",
        "output_type": MODES[mode],
        "target": "" if gold is None else _text(gold),
        "target_hash": _hash(gold),
        **row,
    }


def _scored(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    labels = sorted((key[len(_LABEL) :] for key in entry if key.startswith(_LABEL)), key=_natural)
    sent = [entry[_LABEL + label]["prompt"] for label in labels]
    prompts = [_text(prompt) for prompt in sent]
    name = "PPL" if "PPL" in entry[_LABEL + labels[0]] else "Loglikelihood"
    values = [float(entry[_LABEL + label][name]) for label in labels]
    _finite(values, labels, name, where)
    shared = _shared_beginning(prompts)
    endings = [prompt[len(shared) :].strip() for prompt in prompts]
    return {
        **_identity(entry, sent, labels),
        "prompt": shared,
        "choices": endings if all(endings) and len(set(endings)) == len(endings) else labels,
        "loglikelihoods": values if name == "Loglikelihood" else None,
        "mean_nll": values if name == "PPL" else None,
        **_verdict(entry, entry["prediction"], labels),
    }


def _conditional(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    choices = [_text(choice) for choice in entry["choices"]]
    shares = [float(value) for value in entry["prediction"]]
    if len(shares) != len(choices):
        raise ValueError(f"{len(shares)} probabilities for {len(choices)} choices")
    scores = [math.log(share) if share > 0 else -math.inf for share in shares]
    _finite(scores, choices, "log-probability", where)
    # A gold may be the choice or its number.
    index = int(entry["pred_label"])
    by_number = isinstance(entry.get("gold"), int)
    names = [str(number) for number in range(len(choices))] if by_number else choices
    return {
        **_identity(entry, [entry["prompt"]], choices),
        "prompt": _text(entry["prompt"]),
        "choices": choices,
        "loglikelihoods": scores,
        "mean_nll": [-score for score in scores],  # of one token, up to a constant per question
        **_verdict(entry, index if by_number else names[index], names),
    }


def _generated(entry: Mapping[str, Any], _where: str) -> dict[str, Any]:
    return {
        **_identity(entry, [entry["origin_prompt"]], []),
        "prompt": _text(entry["origin_prompt"]),
        "text": _text(entry["prediction"]),
        "metrics": {},
    }


def _identity(
    entry: Mapping[str, Any], prompts: Sequence[Any], labels: Sequence[str]
) -> dict[str, str]:
    examples = entry.get("in-context examples")
    own = list(prompts)
    if isinstance(examples, str) and examples:
        own = [text.replace(examples, "", 1) if isinstance(text, str) else text for text in own]
    return {
        "doc_hash": _hash(own),
        "prompt_hash": _hash(list(prompts)),
        "request_hash": _hash([list(labels), list(prompts)]),
    }


def _verdict(entry: Mapping[str, Any], prediction: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Right or wrong as OpenCompass says: equal as text; a list holds every right answer.

    ``same_value`` compares without conversion, as the script of the paper's authors does.
    """
    gold = entry.get("gold")
    rights = [_text(value) for value in gold] if isinstance(gold, list) else [_text(gold)]
    known = [labels.index(right) for right in rights if right in labels]
    correct = None if gold is None else _text(prediction) in rights
    return {
        "prediction": labels.index(_text(prediction)),
        "gold": known[0] if len(known) == 1 and gold is not None else None,
        "correct": correct,
        "verdict_metric": None if correct is None else "accuracy",
        "metrics": {}
        if correct is None
        else {"accuracy": float(correct), "same_value": float(prediction == gold)},
    }


def _finite(values: Sequence[float], names: Sequence[str], what: str, where: str) -> None:
    for value, name in zip(values, names, strict=True):
        if not math.isfinite(value):
            raise NumericsError(
                f"{where}: {what} of choice '{name}' is {value}; check the weights and the dtype "
                "of the model."
            )


def _natural(label: str) -> tuple[int, str]:
    """Numbers by value, then names: the order in which choices are usually listed."""
    return (int(label), "") if re.fullmatch(r"\d{1,9}", label) else (10**9, label)


def _shared_beginning(prompts: Sequence[str]) -> str:
    shared = os.path.commonprefix(list(prompts))  # noqa: RUF071 - characters are meant
    return shared.rstrip(string.ascii_letters + string.digits)  # choices begin with whole words


def _text(value: Any) -> str:
    """Text as it is, messages of a chat line by line, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        parts = [part.get("prompt", part.get("content")) for part in value]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(str(part) for part in parts)
    if isinstance(value, bool):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()
