"""How many tokens an answer took. The harness does not log it; our models note it in the results.

The samples hold texts, cut at their stop sequence and, of a thinking model, without its thoughts.
Under :data:`ANSWER_TOKENS`, the configuration of the results has the tokens of every answer, by
:func:`request_key`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ANSWER_TOKENS = "answer_tokens"
"""Key of the configuration in a results file: request -> answers, each a list of three numbers."""


class AnswerTokens(NamedTuple):
    """One answer.

    Attributes:
        tokens: generated until the answer ended, thoughts included.
        thinking: those of them up to the marker that ends the thoughts; 0 without one.
        unfinished: 1 if the answer reached the limit of tokens without an end.
    """

    tokens: float
    thinking: float
    unfinished: float


def request_key(context: Any, arguments: Any) -> str:
    """Name of a request: its prompt and generation arguments."""
    text = json.dumps([context, arguments], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:20]


def noted_tokens(
    noted: Mapping[str, Sequence[Sequence[float]]], requests: Sequence[Sequence[Any]]
) -> AnswerTokens | None:
    """Tokens of a document's answer, mean over its repetitions; None where they are not noted.

    Args:
        noted: what stands under :data:`ANSWER_TOKENS`.
        requests: prompt and generation arguments of the document's requests.
    """
    answers = [each for request in requests for each in noted.get(request_key(*request[:2]), ())]
    if not answers:
        return None
    sums = [sum(float(answer[place]) for answer in answers) for place in range(3)]
    return AnswerTokens(*(each / len(answers) for each in sums))
