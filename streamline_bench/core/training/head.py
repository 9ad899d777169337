"""Losses on logits, without holding the logits of a whole batch.

Scores of a vocabulary are the largest tensors of a training on the next token: with their float32
copy and their gradient 12 bytes each, 25 GB for 8 sequences of 2,048 tokens and 128,000 words.
Here the model runs up to its head; the head and the loss run for a few positions at a time, and
again in the backward pass. What a family does behind its head (scales, caps) is left to its own
forward: its stack is replaced, for that moment, by one that gives the states of these positions.

Model and head are called once in each pass, and the parts run inside the head's call: so whoever
divides their weights among processes has them whole meanwhile, in the backward pass as well.
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
from streamline_bench.core.forward import replaced_forward

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
    if at_once == count:
        logits = model(**arguments).logits.flatten(0, 1)[wanted]
        return loss(logits, torch.arange(count, device=logits.device))
    row = architecture_of(model.config)
    stack, head = (model.get_submodule(path) for path in (row.base, row.lm_head))
    from_head, forward = head.forward, model.forward

    def pass_in_parts(**arguments: Any) -> Tensor:
        output = stack(**arguments)
        numbers = torch.arange(count, device=output[0].device)

        def part(states: Tensor, numbers: Tensor) -> Tensor:
            given = _Given(stack, lambda *_, **__: _with_states(output, states[None]))
            with _at(model, row.base, given), _at(model, row.lm_head, _Given(head, from_head)):
                logits = forward(input_ids=numbers[None], use_cache=False).logits[0]
            return loss(logits, numbers)

        def parts(states: Tensor) -> Tensor:
            total = states.new_zeros((), dtype=torch.float32)
            for rows in torch.split(numbers, at_once):
                some: Tensor = checkpoint(part, states[rows], rows, use_reentrant=False)
                total = total + some
            return total

        with replaced_forward(head, parts):
            total: Tensor = head(output[0].flatten(0, 1)[wanted])
        return total

    with replaced_forward(model, pass_in_parts):
        whole: Tensor = model(**arguments)
    return whole


def _with_states(output: Any, states: Tensor) -> Any:
    """Return a stack's output with other last hidden states, in the form of this family."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    other = copy.copy(output)
    other["last_hidden_state"] = states
    return other


class _Given(nn.Module):
    """Stands for a module, or a part of it that is called, and computes by another function.

    What watches the module's calls sees none of them.
    """

    def __init__(self, original: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is not a child
        self._forward = forward

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["_original"][0], name)
        return self if isinstance(found, nn.Module) else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


@contextmanager
def _at(model: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    """Put a module into the place of another one for a while."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    original = getattr(holder, name)
    setattr(holder, name, module)
    try:
        yield
    finally:
        setattr(holder, name, original)
