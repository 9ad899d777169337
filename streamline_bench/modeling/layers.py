"""Decoder layers that run a network before or after themselves.

A layer gets its network by having its class replaced with a subclass of its own class: weights,
hooks, gradient checkpointing and cache handling stay the host's, and so does everything that asks
``isinstance(layer, LlamaDecoderLayer)``, such as the capture of hidden states.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING

from streamline_bench.core.architecture import ARCHITECTURES
from streamline_bench.core.surgery.replacement import ReplacementNetwork

__all__ = ["attach_network", "attached_layer_class"]

_PREFIX = "Attached"
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def attach_network(layer: nn.Module, network: ReplacementNetwork, *, before: bool) -> None:
    """Make ``layer`` run ``network`` on its input (``before``) or on its output, in place."""
    if type(layer) not in _classes.values():
        layer.__class__ = attached_layer_class(type(layer))
    layer.add_module("prelude" if before else "attachment", network)


def attached_layer_class(host_class: type[nn.Module]) -> type[nn.Module]:
    """Return (making it on first use) the subclass of a decoder layer class that runs networks."""
    if host_class not in _classes:
        name = _PREFIX + host_class.__name__
        namespace = {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{host_class.__name__} with a network before or after it.",
            "forward": _make_forward(host_class),
        }
        _classes[host_class] = type(name, (host_class,), namespace)
    return _classes[host_class]


def _make_forward(host_class: type[nn.Module]) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        prelude = self._modules.get("prelude")
        if prelude is not None:
            if args:
                args = (prelude(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = prelude(kwargs["hidden_states"])
        output = host_class.forward(self, *args, **kwargs)
        attachment = self._modules.get("attachment")
        if attachment is None:
            return output
        if isinstance(output, tuple):  # families differ, and did between transformers versions
            return (attachment(output[0]), *output[1:])
        return attachment(output)

    return forward


def __getattr__(name: str) -> Any:
    """Find a made class by name, so that a pickle can be read in a new process."""
    host_name = name.removeprefix(_PREFIX)
    if host_name != name:
        for model_type in ARCHITECTURES:
            source = CONFIG_MAPPING[model_type].__module__.replace("configuration_", "modeling_")
            host_class = getattr(importlib.import_module(source), host_name, None)
            if host_class is not None:
                return attached_layer_class(host_class)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
