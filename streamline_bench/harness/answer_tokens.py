"""Counts the tokens of generated answers while the harness's classes generate them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from streamline_bench.stability.readers.answer_tokens import AnswerTokens, request_key


class AnswerCounter:
    """Stands for a model's ``cache_hook``, which the harness hands every answer to, in order.

    An answer is known by its prompt and text: what else is handed over depends on the engine.

    Attributes:
        waiting: answers that were generated and are not handed over yet.
        found: prompt and text -> answers.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.waiting: deque[AnswerTokens] = deque()
        self.found: dict[tuple[str, str], list[AnswerTokens]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hook, name)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Take an answer, and hand it on."""
        if kind == "generate_until" and self.waiting:
            self.found.setdefault((request[0], answer), []).append(self.waiting.popleft())
        self.hook.add_partial(kind, request, answer)

    def of_requests(
        self, requests: Sequence[Any], answers: Sequence[str]
    ) -> dict[str, list[AnswerTokens]]:
        """Return the tokens by request (:func:`request_key`), in the order of the requests."""
        noted: dict[str, list[AnswerTokens]] = {}
        for request, answer in zip(requests, answers, strict=True):
            prompt, arguments = request.args[:2]
            counted = self.found.get((prompt, answer))
            if counted:
                taken = counted.pop(0) if len(counted) > 1 else counted[0]
                noted.setdefault(request_key(prompt, arguments), []).append(taken)
        return noted


def of_all_processes(
    noted: dict[str, list[AnswerTokens]], processes: int
) -> dict[str, list[AnswerTokens]]:
    """Return the tokens of all processes that share the requests."""
    if processes < 2 or not torch.distributed.is_initialized():
        return noted
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, noted)
    return {key: answers for part in parts for key, answers in part.items()}


def count_answer(
    tokens: Sequence[int],
    *,
    ends: Iterable[int],
    stop: Sequence[str],
    think_end: int | str | None,
    decode: Callable[[Sequence[int]], str],
) -> AnswerTokens:
    """Count one answer of a batch, whose other answers may have gone on longer.

    Args:
        tokens: what was generated, with whatever follows its end.
        ends: tokens that end an answer.
        stop: texts that end it.
        think_end: token or text that ends the thoughts.
        decode: gives the text of tokens.
    """
    known = set(ends)
    last = next((place for place, token in enumerate(tokens, start=1) if token in known), None)
    kept = list(tokens if last is None else tokens[:last])
    found = [text for text in stop if text and text in decode(kept)]
    if found:
        kept = kept[: _shortest(kept, lambda text: any(each in text for each in found), decode)]
    thinking = 0
    if isinstance(think_end, int) and think_end in kept:
        thinking = len(kept) - kept[::-1].index(think_end)
    elif isinstance(think_end, str) and (times := decode(kept).count(think_end)):
        thinking = _shortest(kept, lambda text: text.count(think_end) >= times, decode)
    return AnswerTokens(len(kept), thinking, float(last is None and not found))


def _shortest(
    tokens: list[int], holds: Callable[[str], bool], decode: Callable[[Sequence[int]], str]
) -> int:
    """The least number of tokens, from the first, whose text has a property that stays."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if holds(decode(tokens[:middle])):
            high = middle
        else:
            low = middle + 1
    return low
