"""The linear weights of a decoder layer: what weight-based scores and merges look at."""

from __future__ import annotations

import re

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layers_prefix

__all__ = ["is_linear_weight", "stored_linear_weights"]


def is_linear_weight(name: str, dimensions: int) -> bool:
    """Whether a tensor of a decoder layer is a projection's weight.

    Those have two dimensions, or three where experts are fused; norms have one. Biases are left
    out by name: fused experts have two-dimensional ones.
    """
    return dimensions >= 2 and not name.endswith("bias")


def stored_linear_weights(reader: CheckpointReader, num_layers: int) -> list[dict[str, str]]:
    """Return, for each of the decoder's layers, name within the layer -> name in the checkpoint.

    Layers beyond the decoder (multi-token prediction) are not listed.
    """
    row = architecture_of(reader.config)
    pattern = re.compile(re.escape(layers_prefix(reader, row)) + r"\.(\d+)\.(.+)")
    layers: list[dict[str, str]] = [{} for _ in range(num_layers)]
    for name in reader.names:
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) >= len(layers) or name.endswith(row.buffers):
            continue
        if is_linear_weight(name, len(reader.entry(name).shape)):
            layers[int(match[1])][match[2]] = name
    return layers
