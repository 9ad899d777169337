"""Removes layers of a model in memory: what a pruned checkpoint must load as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from streamline_bench.core.architecture import (
    decoder_layers,
    require_removable_layers,
)
from streamline_bench.core.surgery import pruned_config


def keep_layers(model: nn.Module, keep: Sequence[int]) -> None:
    """Remove all layers but ``keep`` from a causal LM, in place; it gets a new config object."""
    old: Any = model.config
    new = pruned_config(old, keep)
    row = require_removable_layers(old)
    layers = decoder_layers(model)
    kept = [layers[index] for index in keep]
    setattr(model.get_submodule(row.stack), row.layers.rpartition(".")[2], nn.ModuleList(kept))
    for position, layer in enumerate(kept):
        _assign(layer, "layer_idx", int, position)
    _assign(model, "config", type(old), new)


def _assign(root: nn.Module, attribute: str, kind: type, value: Any) -> None:
    """Set an attribute on every module below ``root`` that has it already, of that kind."""
    for module in root.modules():
        if isinstance(getattr(module, attribute, None), kind):
            setattr(module, attribute, value)
