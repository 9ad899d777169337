"""What the OpenCompass classes ask of whatever runs the model: texts to score, answers to write.

PPL, as OpenCompass calls it, is the mean negative log-likelihood per token in nats, not its
exponential. Every token after the first is predicted, and the sum is divided by the number of
**all** tokens, the first one (usually BOS) included: n - 1 terms over n. With a mask of m tokens,
the tokens from number m on are scored and the sum is divided by n - m. Tokens equal to the padding
token count neither in the sum nor in the divisor, wherever they stand (OpenCompass 0.5.4,
``HuggingFaceBaseModel.get_ppl``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria

from streamline_bench.errors import StreamlineBenchError


@dataclass(frozen=True)
class ScoredText:
    """A token sequence, the parts of it to score, and what to divide by.

    Attributes:
        ids: token ids of the whole text.
        spans: ``(start, end)`` of the tokens to score; ``1 <= start < end <= len(ids)``.
        divisor: number of tokens the mean is over.
    """

    ids: Sequence[int]
    spans: tuple[tuple[int, int], ...]
    divisor: int

    @classmethod
    def whole(
        cls, ids: Sequence[int], *, masked: int = 0, padding: int | None = None
    ) -> ScoredText:
        """All of a text but its first ``masked`` tokens (at least one), as OpenCompass scores it.

        Raises:
            StreamlineBenchError: no token is left to divide by.
        """
        counted = sum(token != padding for token in ids) - masked
        if counted < 1:
            raise StreamlineBenchError(
                f"A prompt of {len(ids)} tokens, {masked} of them masked, has no perplexity; check "
                "the prompt template (an empty prompt, or one that ends before the answer)."
            )
        return cls(ids, spans_between(ids, max(1, masked), len(ids), padding=padding), counted)


def spans_between(
    ids: Sequence[int], start: int, end: int, *, padding: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Return the runs of tokens in ``[start, end)`` that are no padding tokens."""
    spans: list[tuple[int, int]] = []
    for at in range(start, end):
        if ids[at] == padding:
            continue
        if spans and spans[-1][1] == at:
            spans[-1] = (spans[-1][0], at + 1)
        else:
            spans.append((at, at + 1))
    return tuple(spans)


def mean_nll(text: ScoredText, logprob: float) -> float:
    """Return the perplexity in OpenCompass's sense from the summed log-probability of the spans."""
    return -logprob / text.divisor


def continuation_start(text: str, continuation: str) -> int:
    """Return the character at which a continuation starts: it must end the text.

    Raises:
        StreamlineBenchError: it does not.
    """
    if not continuation or not text.endswith(continuation):
        shown = text if len(text) <= 80 else f"...{text[-77:]}"
        raise StreamlineBenchError(
            f"The continuation '{continuation}' is not the end of the prompt '{shown}'; the data "
            "set's column 'cont' must be what the prompt template ends with."
        )
    return len(text) - len(continuation)


class StopWords(StoppingCriteria):  # type: ignore[misc]
    """Stops each row by itself; the prompt is not looked at.

    Args:
        words: texts that end an answer.
        tokenizer: decodes the last tokens.
        prompt_length: tokens per row that belong to the prompt (padding included).
    """

    def __init__(self, words: Sequence[str], tokenizer: Any, prompt_length: int) -> None:
        self._words = list(words)
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        # A word that has just become complete lies within its last bytes' worth of tokens: a
        # token that shows anything shows at least one byte.
        self._look_back = max(len(word.encode()) for word in words) + 4

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any
    ) -> torch.BoolTensor:
        """Return ``[rows]`` bool: whether a row is complete."""
        new = input_ids[:, max(self._prompt_length, input_ids.shape[1] - self._look_back) :]
        texts = self._tokenizer.batch_decode(new)
        ended = [any(word in text for word in self._words) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def cut_at(text: str, words: Sequence[str]) -> str:
    """Return the text before the first stop word in it."""
    ends = [at for at in (text.find(word) for word in words) if at >= 0]
    return text[: min(ends)] if ends else text


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue prompts.

    Attributes:
        most: at most this many new tokens.
        least: at least this many, None for no such bound.
        stop_words: texts that end an answer; they are cut off.
        options: further settings of the engine (``temperature``, ``num_return_sequences``, …).
    """

    most: int
    least: int | None = None
    stop_words: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Runs one model."""

    tokenizer: Any
    max_length: int
    """Tokens a text may have."""

    def logprob_sums(self, texts: Sequence[ScoredText]) -> list[float]:
        """Return the summed log-probability (nats) of the spans of every text."""
        ...

    def generate(self, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[str]:
        """Return the answers, ``num_return_sequences`` for every prompt, in their order."""
        ...
