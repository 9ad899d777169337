"""Losses on logits, without holding the logits of a whole batch.

Scores of a vocabulary are the largest tensors of a training on the next token: with their float32
copy and their gradient 12 bytes each, 25 GB for 8 sequences of 2,048 tokens and 128,000 words.
Here the model runs up to its head; the head and the loss run for a few positions at a time, and
again in the backward pass. What a family does behind its head (scales, caps) is left to its own
forward: its stack is replaced, for that moment, by one that gives the states of these positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.training.sharding import is_sharded

LogitLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From logits ``[positions, vocabulary]`` and the numbers of these positions to a sum."""

WHOLE = 1 << 25
"""Logits that are computed at once: 0.4 GB with what belongs to them."""

_PARTS = 32
"""In which more are computed: a part's logits, copies and gradients are half a byte per logit."""


def positions_at_once(count: int, vocabulary: int) -> int:
    """Return for how many of so many positions the logits are held together."""
    return count if count * vocabulary <= WHOLE else -(-count // _PARTS)


def loss_of_logits(
    model: Any, ids: Tensor, mask: Tensor, wanted: Tensor, loss: LogitLoss
) -> Tensor:
    """Return the sum of a loss over chosen positions.

    Args:
        model: a causal LM.
        ids, mask: ``[batch, seq]``, int64 and bool.
        wanted: int64, places among all ``batch * seq`` whose logits are wanted.
        loss: of some positions, numbered in the order of ``wanted``; one term for each.
    """
    arguments = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    count, config = len(wanted), model.config.get_text_config()
    at_once = positions_at_once(count, int(config.vocab_size))
    if at_once == count or is_sharded():  # which expects one run of a head
        logits = model(**arguments).logits.flatten(0, 1)[wanted]
        return loss(logits, torch.arange(count, device=logits.device))
    stack = architecture_of(model.config).base
    output = model.get_submodule(stack)(**arguments)
    states = output[0].flatten(0, 1)[wanted]
    numbers = torch.arange(count, device=states.device)

    def part(states: Tensor, numbers: Tensor) -> Tensor:
        with _giving(model, stack, _with_states(output, states[None])):
            arguments = {"input_ids": numbers[None], "use_cache": False}
            value: Tensor = loss(model.forward(**arguments).logits[0], numbers)
            return value

    total: Tensor = states.new_zeros((), dtype=torch.float32)
    for rows in torch.split(numbers, at_once):
        some: Tensor = checkpoint(part, states[rows], rows, use_reentrant=False)
        total = total + some
    return total


def _with_states(output: Any, states: Tensor) -> Any:
    """Return a stack's output with other last hidden states, in the form of this family."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    other = copy.copy(output)
    other["last_hidden_state"] = states
    return other


class _Given(nn.Module):
    """Stands for a stack whose output is there already; also where a part of it is called."""

    def __init__(self, original: nn.Module, output: Any) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is not a child
        self._output = output

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_original"][0], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output


@contextmanager
def _giving(model: nn.Module, path: str, output: Any) -> Iterator[None]:
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    original = getattr(holder, name)
    setattr(holder, name, _Given(original, output))
    try:
        yield
    finally:
        setattr(holder, name, original)
