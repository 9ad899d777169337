"""A block of layers in training: the intact model as teacher, its replacement as student.

The replacement must see what it will see when deployed: the same causal and padding mask, the same
rotary angles. So nothing is rebuilt by hand. The parent itself runs, a hook takes the arguments
with which it calls the block's first layers, and the pass ends after the block's last layer: later
layers, final norm and LM head are never run. The student's weights are float32, and it is called
as the parent calls its layers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.forward import PassEnded, hidden_of, run_until
from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.surgery.replacement import ReplacementNetwork, build_network


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
            ends.append(hidden_of(output))
            raise PassEnded

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
                raise PassEnded

            self._run_stack(ids, mask, [last.register_forward_hook(stop)])
            probes = [self._layers[self._start + i] for i in range(self._calls)]
        return tuple(probe.call for probe in probes)  # type: ignore[misc]

    def _run_stack(self, ids: Tensor, mask: Tensor, handles: list[Any]) -> None:
        run_until(
            lambda: self._stack(input_ids=ids, attention_mask=mask.long(), use_cache=False), handles
        )


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
        raise PassEnded

    layer = decoder_layers(model)[0]
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(layer.parameters()).device)
    handle = layer.register_forward_hook(after)
    run_until(lambda: model(input_ids=ids, use_cache=False), [handle])
    return found[0]


class StudentSlot(nn.Module):
    """One slot of the student: a decoder layer or a network, in the signature of a layer.

    Weights are float32 whatever the parent's dtype (an optimizer step of 2e-4 would be lost in
    bfloat16), so inputs are widened and the output is cast back.
    """

    def __init__(self, module: nn.Module, as_tuple: bool = False) -> None:
        super().__init__()
        self.module = module
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = hidden_states.float()
        if isinstance(self.module, ReplacementNetwork):
            output = self.module(wide)
        else:
            output = self.module(wide, *_widen(args), **_widen(kwargs))
        output = hidden_of(output).to(hidden_states.dtype)
        return (output,) if self.as_tuple else output


class Student:
    """The trainable replacement of a block.

    Attributes:
        module: what is trained. Kind ``layer``: a ``ModuleList`` of deep copies of the block's
            first layers; else the network. Its ``state_dict`` is the training's result.
    """

    label, task = "replacement", "distill"

    def __init__(self, model: nn.Module, start: int, spec: ReplacementSpec, seed: int) -> None:
        layers = decoder_layers(model)
        device = next(layers[start].parameters()).device
        self.module: nn.Module
        if spec.kind == "layer":
            copies = [copy.deepcopy(layer) for layer in layers[start : start + spec.layers]]
            self.module = nn.ModuleList(copies)
            parts = list(self.module)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.module = build_network(spec, model.config)
            parts = [self.module]
        self.module.to(device=device, dtype=torch.float32).eval().requires_grad_(True)
        self._parts = parts
        self.slots = [StudentSlot(part) for part in parts]

    def parameters(self) -> list[nn.Parameter]:
        """Return all weights of the replacement."""
        return list(self.module.parameters())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return them by name; kind ``layer``: beginning with the index among the new layers."""
        return dict(self.module.named_parameters())

    def begin(self, step: int | None) -> None:
        """Nothing to prepare: a replacement is trained without dropout."""

    @property
    def num_calls(self) -> int:
        """Number of layer calls that must be known to run it (none for a network)."""
        return len(self._parts) if isinstance(self.module, nn.ModuleList) else 0

    def run(self, hidden: Tensor, calls: tuple[LayerCall, ...]) -> Tensor:
        """Map the state before the block ``[batch, seq, d]`` to the one behind it, in float32."""
        hidden = hidden.float()
        for index, slot in enumerate(self.slots):
            hidden = slot(hidden, **(calls[index].kwargs if calls else {}))
        return hidden

    def state_on_cpu(self) -> dict[str, Tensor]:
        """Return a copy of all weights (and buffers that are saved) on the CPU."""
        state = self.module.state_dict()
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights given by :meth:`state_on_cpu`."""
        self.module.load_state_dict(dict(state))


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_widen(item) for item in value)
    if isinstance(value, dict):
        return {key: _widen(item) for key, item in value.items()}
    return value
