"""Widths of a residual stream that was rotated and sliced: the entry ``rotations`` of a config.

SliceGPT (arXiv 2401.15024, section 3) turns the stream at every boundary into the basis of its
principal axes and keeps the first of them. Two boundaries then have different bases and widths, so
that each residual connection needs a shortcut matrix from the one to the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from streamline_bench.core.architecture import Architecture, architecture_of, config_entry
from streamline_bench.errors import ArchitectureError, CheckpointError


@dataclass(frozen=True)
class StreamWidths:
    """Widths of the stream in one layer: before attention, between attention and MLP, after it."""

    input: int
    middle: int
    output: int


@dataclass(frozen=True)
class Rotations:
    """Widths of the stream throughout a model.

    Attributes:
        layers: one item per decoder layer. The embeddings are as wide as the first layer's input,
            the LM head as the last layer's output.
        norm_divisor: what the weightless norms divide the sum of squares by: the width that the
            stream had before it was sliced, because the axes cut off count as zeros.
        head_bias: the LM head has a bias, into which the final norm's was folded.
    """

    layers: tuple[StreamWidths, ...]
    norm_divisor: int
    head_bias: bool = False

    @classmethod
    def uniform(
        cls, depth: int, width: int, *, norm_divisor: int, head_width: int, head_bias: bool = False
    ) -> Rotations:
        """Return the form of the paper: one width everywhere, another one before the LM head."""
        inner = [StreamWidths(width, width, width)] * (depth - 1)
        return cls((*inner, StreamWidths(width, width, head_width)), norm_divisor, head_bias)

    @classmethod
    def parse(cls, entry: Any, config: Any) -> Rotations:
        """Validate the entry of a config.

        Raises:
            CheckpointError: a key is missing or unknown, a width is not a positive whole number, or
                the widths of two layers do not meet.
            ArchitectureError: the family cannot have a rotated stream.
        """
        require_rotatable(config)
        if isinstance(entry, Rotations):
            entry = entry.to_dict()
        expected = {"layers", "norm_divisor", "head_bias"}
        if not isinstance(entry, Mapping) or set(entry) != expected:
            raise CheckpointError(
                f"The config's rotations {str(entry)[:80]} are not understood; they need exactly "
                f"{sorted(expected)}."
            )
        layers = tuple(_layer(item) for item in entry["layers"])
        if len(layers) != int(config.num_hidden_layers):
            raise CheckpointError(
                f"The config's rotations list {len(layers)} layers, the model has "
                f"{config.num_hidden_layers}; write the checkpoint again."
            )
        for index, (left, right) in enumerate(itertools.pairwise(layers)):
            if left.output != right.input:
                raise CheckpointError(
                    f"The config's rotations give layer {index} an output of width {left.output}, "
                    f"the next layer an input of {right.input}; write the checkpoint again."
                )
        return cls(layers, _width(entry["norm_divisor"]), bool(entry["head_bias"]))

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.layers[0].input

    @property
    def head_width(self) -> int:
        """Width of the LM head's input."""
        return self.layers[-1].output

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that the config holds."""
        return {
            "layers": [asdict(widths) for widths in self.layers],
            "norm_divisor": self.norm_divisor,
            "head_bias": self.head_bias,
        }


def require_rotatable(config: Any) -> Architecture:
    """Return the table row of a config whose residual stream may be rotated.

    A rotation passes through a layer only where every norm stands right before linear maps, which
    take its gain, and attention and MLP follow one another.

    Raises:
        ArchitectureError: the family, or a setting of this model, does not allow it.
    """
    row = architecture_of(config)
    reason = _structural_reason(row) or _reason_in(config)
    if reason:
        raise ArchitectureError(
            f"The residual stream of this '{row.model_type}' model cannot be rotated and sliced: "
            f"{reason}; choose a depth method or another model."
        )
    return row


def _structural_reason(row: Architecture) -> str:
    if row.output_norms:
        return (
            "it has norms between a sub-layer's output and the stream, and no linear map follows "
            "that could take their gain"
        )
    if row.parallel_residual:
        return "its attention and MLP read the same input, which leaves no boundary between them"
    if row.experts:
        return "its MLPs are mixtures of experts, which are not supported"
    if row.transposed:
        return "its projections store their weights as [in, out]"
    return ""


def _reason_in(config: Any) -> str:
    if config_entry(config, "do_layer_norm_before", True) is False:
        return "do_layer_norm_before=False puts its norms behind the residual sums"
    embedded, hidden = (config_entry(config, k) for k in ("word_embed_proj_dim", "hidden_size"))
    if embedded is not None and embedded != hidden:
        return (
            f"word_embed_proj_dim={embedded} differs from hidden_size={hidden}, so that a "
            "projection stands between embeddings and stream"
        )
    return ""


def _layer(item: Any) -> StreamWidths:
    if not isinstance(item, Mapping) or set(item) != {"input", "middle", "output"}:
        raise CheckpointError(
            f"The widths {item!r} of a layer are not valid; give exactly input, middle and output."
        )
    return StreamWidths(**{name: _width(value) for name, value in item.items()})


def _width(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{value!r} in the config's rotations must be a whole number from 1.")
    return value
