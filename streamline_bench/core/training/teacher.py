"""The intact model as teacher: states at both ends of a block, and how its layers were called.

The replacement must see what it will see when deployed: the same causal and padding mask, the same
rotary angles. So nothing is rebuilt by hand. The parent itself runs, a hook takes the arguments
with which it calls the block's first layers, and the pass ends after the block's last layer: later
layers, final norm and LM head are never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import architecture_of, decoder_layers

__all__ = ["BlockStates", "LayerCall", "Passthrough", "Teacher", "frozen", "returns_tuple"]


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass at the boundary that was asked for."""


@dataclass(frozen=True)
class LayerCall:
    """The keyword arguments of one layer's call, without the hidden states."""

    kwargs: dict[str, Any]

    @classmethod
    def of(cls, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        """Name the positional arguments too; the first argument is the hidden states."""
        names = list(inspect.signature(layer.forward).parameters)
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        named.pop(names[0])
        return cls(named)


@dataclass(frozen=True)
class BlockStates:
    """States around a block: ``hidden`` and ``target`` ``[batch, seq, d]``; calls of its layers."""

    hidden: Tensor
    target: Tensor
    calls: tuple[LayerCall, ...]


class Passthrough(nn.Module):
    """Stands in a layer's slot and hands the hidden states on, in the form the host expects."""

    def __init__(self, host: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self._host = (host,)  # in a tuple, so that it is not a child
        self._as_tuple = as_tuple
        self.call: LayerCall | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some stacks read attributes of their layers
            return getattr(self.__dict__["_host"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = LayerCall.of(self._host[0], args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self._as_tuple else hidden


class Teacher:
    """Runs the parent up to the end of a block.

    Args:
        model: the intact causal LM.
        start, n: the block is layers ``start .. start + n - 1``.
        calls: of how many of its first layers the call arguments are wanted.
        postnorm: if the block ends at the last layer, give the target after the final norm.
    """

    def __init__(
        self, model: nn.Module, start: int, n: int, calls: int, postnorm: bool = False
    ) -> None:
        row = architecture_of(model.config)
        self._stack: nn.Module = model.get_submodule(row.base)
        self._layers = decoder_layers(model)
        self._start, self._n, self._calls = start, n, calls
        ends_model = start + n == len(self._layers)
        self._norm = model.get_submodule(row.final_norm) if postnorm and ends_model else None

    @torch.no_grad()
    def run(self, ids: Tensor, mask: Tensor) -> BlockStates:
        """Run one batch, ids and mask ``[batch, seq]``."""
        calls: list[LayerCall] = []
        ends: list[Tensor] = []

        def before(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not calls:
                ends.append(args[0] if args else kwargs["hidden_states"])
            calls.append(LayerCall.of(layer, args, kwargs))

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            ends.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        stop = self._start + self._n
        handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True)
            for layer in self._layers[self._start : self._start + max(self._calls, 1)]
        ]
        handles.append(self._layers[stop - 1].register_forward_hook(after))
        self._run_stack(ids, mask, handles)
        hidden, target = ends
        target = target if self._norm is None else self._norm(target)
        return BlockStates(hidden, target, tuple(calls[: self._calls]))

    @torch.no_grad()
    def replay_calls(self, ids: Tensor, mask: Tensor) -> tuple[LayerCall, ...]:
        """Return only the calls, without computing a layer (for states that were stored)."""
        if self._calls == 0:
            return ()
        probed = range(self._start + self._calls)
        with slots(self._layers, {i: Passthrough(self._layers[i], False) for i in probed}):
            last = self._layers[probed[-1]]

            def stop(layer: nn.Module, args: Any, output: Any) -> None:
                raise _Reached

            self._run_stack(ids, mask, [last.register_forward_hook(stop)])
            probes = [self._layers[self._start + i] for i in range(self._calls)]
        return tuple(probe.call for probe in probes)  # type: ignore[misc]

    def _run_stack(self, ids: Tensor, mask: Tensor, handles: list[Any]) -> None:
        try:
            self._stack(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        except _Reached:
            return
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def slots(layers: nn.ModuleList, replaced: dict[int, nn.Module]) -> Iterator[None]:
    """Put other modules into some slots of a list of layers, and the old ones back at the end."""
    originals = {index: layers[index] for index in replaced}
    try:
        for index, module in replaced.items():
            layers[index] = module
        yield
    finally:
        for index, module in originals.items():
            layers[index] = module


def returns_tuple(model: nn.Module) -> bool:
    """Say whether the model's decoder layers return a tuple (families and versions differ)."""
    found: list[bool] = []

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise _Reached

    layer = decoder_layers(model)[0]
    handle = layer.register_forward_hook(after)
    device = next(layer.parameters()).device
    try:
        model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for all parameters; the former settings at the end."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires in gradients:
            parameter.requires_grad_(requires)
