"""Stop words: generation ends for a row as soon as its own new text contains one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

__all__ = ["StopWords", "cut_at"]


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
