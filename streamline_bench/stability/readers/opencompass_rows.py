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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.samples import Row, well_formed

Mode = Literal["PPL", "LL", "CLP", "GEN"]
"""How OpenCompass asks."""

_LABEL = "label: "
_AGAIN = "the file is damaged, run OpenCompass again"


class Score(BaseModel):
    """What OpenCompass says of one label."""

    model_config = ConfigDict(frozen=True)

    prompt: Any
    ppl: float | None = Field(None, alias="PPL")
    loglikelihood: float | None = Field(None, alias="Loglikelihood")


class Entry(BaseModel):
    """One question; ``scores`` has what stands under ``label: X``, by X."""

    model_config = ConfigDict(frozen=True)

    scores: dict[str, Score] = {}
    examples: Any = Field(None, alias="in-context examples")
    origin_prompt: Any = None
    prompt: Any = None
    prediction: Any
    choices: list[Any] | None = None
    pred_label: int | None = None
    gold: Any = None

    @model_validator(mode="before")
    @classmethod
    def _gather_labels(cls, payload: Any) -> Any:
        if not isinstance(payload, Mapping):
            return payload
        labels = {key[len(_LABEL) :]: key for key in payload if key.startswith(_LABEL)}
        return {**payload, "scores": {name: payload[key] for name, key in labels.items()}}

    @property
    def mode(self) -> Mode | None:
        """How OpenCompass asked; None if the entry has none of the known forms."""
        scores = self.scores.values()
        if scores and all(score.ppl is not None for score in scores):
            return "PPL"
        if scores and all(score.loglikelihood is not None for score in scores):
            return "LL"
        if scores:
            return None
        return "GEN" if self.choices is None or self.pred_label is None else "CLP"

    @property
    def labels(self) -> list[str]:
        """Labels in the order in which choices are usually listed: numbers by value, then names."""
        return sorted(
            self.scores,
            key=lambda x: (int(x), "") if re.fullmatch(r"[0-9]{1,9}", x) else (10**9, x),
        )


def parse_entry(payload: Any, where: str) -> Entry:
    """Validate an entry.

    Raises:
        SamplesError: it has none of the forms that OpenCompass writes.
    """
    with well_formed(where, "an entry that OpenCompass wrote", _AGAIN):
        entry = Entry.model_validate(payload)
    if entry.mode is None:
        raise SamplesError(f"{where}: the labels have neither all PPL nor all LL; {_AGAIN}.")
    return entry


def row_of(entry: Entry, where: str) -> Row:
    """Return an entry as a row without run, task, filter and document number.

    Args:
        where: file and key, for messages.

    Raises:
        SamplesError: a field is missing or of another form than OpenCompass'.
        NumericsError: a score is NaN or infinite.
    """
    with well_formed(where, "an entry that OpenCompass wrote", _AGAIN):
        if entry.mode != "PPL" and entry.mode != "LL":
            needed = "origin_prompt" if entry.mode == "GEN" else "prompt"
            if needed not in entry.model_fields_set:
                raise ValueError(f"it has no '{needed}'")
        if entry.mode == "GEN":
            row = _row(entry, [entry.origin_prompt], [])
            row.prompt, row.text = _text(entry.origin_prompt), _text(entry.prediction)
            return row
        return _conditional(entry, where) if entry.mode == "CLP" else _scored(entry, where)


def _row(entry: Entry, sent: Sequence[Any], labels: Sequence[str]) -> Row:
    """A row with what identifies it."""
    own, examples = list(sent), entry.examples
    if isinstance(examples, str) and examples:
        own = [text.replace(examples, "", 1) if isinstance(text, str) else text for text in own]
    return Row(
        task="",
        output_type="generate_until" if entry.mode == "GEN" else "multiple_choice",
        doc_hash=_hash(own),
        prompt_hash=_hash(list(sent)),
        target_hash=_hash(entry.gold),
        request_hash=_hash([list(labels), list(sent)]),
        prompt="",
        target="" if entry.gold is None else _text(entry.gold),
    )


def _scored(entry: Entry, where: str) -> Row:
    labels = entry.labels
    scores = [entry.scores[label] for label in labels]
    row = _row(entry, [score.prompt for score in scores], labels)
    prompts = [_text(score.prompt) for score in scores]
    name = "PPL" if entry.mode == "PPL" else "Loglikelihood"
    values = [score.ppl if name == "PPL" else score.loglikelihood for score in scores]
    found = _finite(values, labels, name, where)
    row.loglikelihoods, row.mean_nll = (None, found) if name == "PPL" else (found, None)
    row.prompt = _shared_beginning(prompts)
    endings = [prompt[len(row.prompt) :].strip() for prompt in prompts]
    row.choices = endings if all(endings) and len(set(endings)) == len(endings) else labels
    _judge(row, entry, entry.prediction, labels)
    return row


def _conditional(entry: Entry, where: str) -> Row:
    choices = [_text(choice) for choice in entry.choices or ()]
    shares = [float(value) for value in entry.prediction]
    if len(shares) != len(choices):
        raise ValueError(f"{len(shares)} probabilities for {len(choices)} choices")
    scores = [math.log(share) if share > 0 else -math.inf for share in shares]
    row = _row(entry, [entry.prompt], choices)
    row.prompt, row.choices = _text(entry.prompt), choices
    row.loglikelihoods = _finite(scores, choices, "log-probability", where)
    row.mean_nll = [-score for score in scores]  # of one token, up to a constant per question
    # A gold may be the choice or its number.
    by_number = isinstance(entry.gold, int)
    names = [str(number) for number in range(len(choices))] if by_number else choices
    index = entry.pred_label or 0
    _judge(row, entry, index if by_number else names[index], names)
    return row


def _judge(row: Row, entry: Entry, prediction: Any, labels: Sequence[str]) -> None:
    """Right or wrong as OpenCompass says: equal as text; a list holds every right answer.

    ``same_value`` compares without conversion, as the script of the paper's authors does.
    """
    row.prediction = labels.index(_text(prediction))
    gold = entry.gold
    if gold is None:
        return
    rights = [_text(value) for value in gold] if isinstance(gold, list) else [_text(gold)]
    known = [labels.index(right) for right in rights if right in labels]
    row.gold = known[0] if len(known) == 1 else None
    row.correct, row.verdict_metric = _text(prediction) in rights, "accuracy"
    row.metrics = {"accuracy": float(row.correct), "same_value": float(prediction == gold)}


def _finite(
    values: Sequence[float | None], names: Sequence[str], what: str, where: str
) -> list[float]:
    for value, name in zip(values, names, strict=True):
        if value is None or not math.isfinite(value):
            raise NumericsError(
                f"{where}: {what} of choice '{name}' is {value}; check the weights and the dtype "
                "of the model."
            )
    return [value for value in values if value is not None]


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
