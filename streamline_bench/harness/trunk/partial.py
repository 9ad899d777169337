"""A model's own forward pass, set out at any boundary between its steps.

Everything around the layers still runs in the model itself (embeddings, masks, rotary embeddings,
per-layer attention types, final norm, head), so that it is right for every family; a layer that is
skipped costs one function call. Unlike a
:class:`~streamline_bench.core.forward.PartialForward`, a pass may set out between a layer and the
network attached to it, and keeps chosen states only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.forward import hidden_of, replaced_forward, with_hidden
from streamline_bench.harness.trunk.stack import Step

States = dict[int, Any]
"""Boundary -> what the layer below it returned: hidden states ``[batch, seq, hidden]``, in some
families the first of a tuple."""


@contextmanager
def partial_pass(
    model: Any, steps: Sequence[Step], *, start: int, states: States, keep: Collection[int]
) -> Iterator[None]:
    """Let calls of ``model`` set out at boundary ``start`` and keep the states at some others.

    Args:
        model: a causal LM; one forward pass is expected inside the context.
        steps: of the model, in order.
        start: number of steps not to run; if any, ``states[start]`` is used instead.
        states: taken from and added to.
        keep: boundaries above ``start`` whose states are added.
    """
    layers = decoder_layers(model)
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            own = [number for number, step in enumerate(steps) if step.layer == index]
            part = _LayerPart(layer, first=own[0], end=own[-1] + 1, start=start, states=states)
            stack.enter_context(part.installed(keep))
        yield


class _LayerPart:
    """One layer, and the network attached to it, within a pass.

    Its steps are ``first`` (the layer) and, where a network is attached, ``end - 1``.
    """

    def __init__(
        self, layer: nn.Module, *, first: int, end: int, start: int, states: States
    ) -> None:
        self._layer = layer
        self._first, self._end = first, end
        self._start = start
        self._states = states
        self._between: torch.Tensor | None = None

    @contextmanager
    def installed(self, keep: Collection[int]) -> Iterator[None]:
        """Replace the layer's forward where this pass skips it or keeps a state of it."""
        between = self._first + 1
        keeps_between = self._end > between and between in keep
        if not (self._start > self._first or self._end in keep or keeps_between):
            yield
            return
        hook = None
        if keeps_between:
            hook = self._layer.attachment.register_forward_pre_hook(self._catch)  # type: ignore[union-attr]
        forward = self._forward(self._layer.forward, self._end in keep, keeps_between)
        try:
            with replaced_forward(self._layer, forward):
                yield
        finally:
            if hook is not None:
                hook.remove()

    def _forward(
        self, original: Callable[..., Any], keeps_end: bool, keeps_between: bool
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._start >= self._end:
                return _copy(self._states[self._start])
            if self._start > self._first:
                below = _copy(self._states[self._start])
                output = with_hidden(below, self._layer.attachment(hidden_of(below)))  # type: ignore[operator]
            else:
                output = original(*args, **kwargs)
            if keeps_between and self._between is not None:
                self._states[self._first + 1] = with_hidden(output, self._between)
                self._between = None
            if keeps_end:
                self._states[self._end] = _copy(output)
            return output

        return forward

    def _catch(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._between = args[0].clone()


def _copy(output: Any) -> Any:
    """A copy, so that a layer which writes into its input leaves the kept state alone."""
    return with_hidden(output, hidden_of(output).clone())
