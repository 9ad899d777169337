"""What the OpenCompass classes ask of whatever runs the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamline_bench.opencompass.perplexity import ScoredText

__all__ = ["Engine", "GenerationSettings"]


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
