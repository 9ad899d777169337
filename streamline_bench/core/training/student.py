"""The replacement while it is trained: float32 weights, called as the parent calls its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.surgery.replacement import ReplacementNetwork, build_network
from streamline_bench.core.training.teacher import LayerCall

__all__ = ["Student", "StudentSlot"]


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
        output = output[0] if isinstance(output, tuple) else output
        output = output.to(hidden_states.dtype)
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
