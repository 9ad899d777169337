"""Widths that differ between layers: the entries of ``config.layer_widths``, and narrower layers.

One table, :func:`projection_parts`, says which rows and columns of a layer's projections belong to
its heads and MLP channels; building a narrower layer and slicing the weights of a wider one both
follow it. A layer is built by its family at the config's own width and its projections are then
resized, so that families whose constructors know one width only (OPT) can be narrowed as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig

from streamline_bench.core.architecture import Architecture
from streamline_bench.errors import ArchitectureError, CheckpointError

Unit = Literal["query", "key_value", "channel"]
"""What is removed as one: a query head, a key-value head, or a channel of the MLP."""


@dataclass(frozen=True)
class LayerWidths:
    """How many query heads, key-value heads and MLP channels one layer has."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @classmethod
    def of(cls, config: Any, row: Architecture) -> LayerWidths:
        """Return the widths that a config gives all its layers."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(heads, kv_heads, getattr(config, row.intermediate_key))

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def to_dict(self) -> dict[str, int]:
        """Return the JSON form that the config holds."""
        return asdict(self)

    def entries(self, row: Architecture) -> dict[str, int]:
        """Return the widths under the names that the family's config uses."""
        entries = self.to_dict()
        entries[row.intermediate_key] = entries.pop("intermediate_size")
        return entries


@dataclass(frozen=True)
class Part:
    """Rows (axis 0) or columns (axis 1) of one projection, as equal pieces, one per unit.

    Attributes:
        module: path of the projection in the layer.
        unit: what the pieces belong to.
        axis: 0: rows of the weight, and items of the bias; 1: columns of the weight.
        offset: first row or column; 0 but for fused projections.
        count: number of units.
        size: rows or columns per unit: the head size, or 1 for channels.
    """

    module: str
    unit: Unit
    axis: int
    offset: int
    count: int
    size: int


def head_size(config: Any) -> int:
    """Return the width of one head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def projection_parts(row: Architecture, widths: LayerWidths, head_dim: int) -> tuple[Part, ...]:
    """Return which rows and columns of a layer's projections belong to heads and channels.

    Fused projections hold queries, then keys, then values; and gates, then the rest of the MLP's
    input.
    """
    heads, kv_heads = widths.num_attention_heads, widths.num_key_value_heads
    channels = widths.intermediate_size
    attention = f"{row.attention}." if row.attention else ""
    mlp = f"{row.mlp}." if row.mlp else ""
    if row.fused_qkv:
        fused = attention + row.fused_qkv
        inputs = [
            Part(fused, "query", 0, 0, heads, head_dim),
            Part(fused, "key_value", 0, heads * head_dim, kv_heads, head_dim),
            Part(fused, "key_value", 0, (heads + kv_heads) * head_dim, kv_heads, head_dim),
        ]
    else:
        inputs = [
            Part(attention + row.query, "query", 0, 0, heads, head_dim),
            Part(attention + row.key, "key_value", 0, 0, kv_heads, head_dim),
            Part(attention + row.value, "key_value", 0, 0, kv_heads, head_dim),
        ]
    if row.fused_gate_up:
        fused = mlp + row.fused_gate_up
        inner = [Part(fused, "channel", 0, start, channels, 1) for start in (0, channels)]
    else:
        inner = [
            Part(mlp + name, "channel", 0, 0, channels, 1) for name in (row.gate, row.up) if name
        ]
    return (
        *inputs,
        Part(attention + row.output, "query", 1, 0, heads, head_dim),
        *inner,
        Part(mlp + row.down, "channel", 1, 0, channels, 1),
    )


def require_narrowable(row: Architecture) -> None:
    """Refuse families whose heads or channels cannot be removed one by one.

    Raises:
        ArchitectureError: with the reason.
    """
    reason = row.fixed_widths
    if row.experts and not reason:
        reason = "its MLPs are mixtures of experts, whose channels cannot be removed one by one yet"
    if reason:
        raise ArchitectureError(
            f"Heads and channels of model type '{row.model_type}' cannot be removed: {reason}; "
            "use a method that removes layers."
        )


def parse_layer_widths(entries: Iterable[Any], config: Any) -> tuple[LayerWidths, ...]:
    """Validate the entries of a config: one per layer, with exactly the three numbers.

    Raises:
        CheckpointError: a number is missing, below 1, or the heads cannot be shared out.
    """
    parsed = tuple(_parse(entry) for entry in entries)
    depth = int(config.num_hidden_layers)
    if len(parsed) != depth:
        raise CheckpointError(
            f"layer_widths has {len(parsed)} entries for {depth} layers; give one for each."
        )
    return parsed


def resize_layer(layer: nn.Module, row: Architecture, config: Any, widths: LayerWidths) -> None:
    """Give a layer built for ``config`` other widths, in place; resized projections are fresh.

    What the layer's modules remember of the old widths follows, and their ``config`` becomes a
    view of the shared one with the layer's own numbers.
    """
    sizes: dict[str, dict[int, int]] = {}
    for part in projection_parts(row, widths, head_size(config)):
        of_module = sizes.setdefault(part.module, {})
        of_module[part.axis] = of_module.get(part.axis, 0) + part.count * part.size
    for path, size in sizes.items():
        parent = layer.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], _resized(layer.get_submodule(path), size))
    view = LayerConfig(config, widths.entries(row))
    remembered = {
        "num_heads": widths.num_attention_heads,
        "num_attention_heads": widths.num_attention_heads,
        "num_key_value_heads": widths.num_key_value_heads,
        "num_key_value_groups": widths.heads_per_group,
        "intermediate_size": widths.intermediate_size,
    }
    for module in layer.modules():
        for name, value in remembered.items():
            if isinstance(module.__dict__.get(name), int):
                setattr(module, name, value)
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.__dict__["config"] = view


class LayerConfig:
    """A config as one layer sees it: the shared one, but for the layer's own entries."""

    def __init__(self, shared: Any, own: Mapping[str, Any]) -> None:
        self._shared = shared
        self._own = dict(own)

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling look for dunder methods before there is anything to look in.
        if name.startswith("__") or name in ("_shared", "_own"):
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._shared, name)


def _resized(linear: Any, size: Mapping[int, int]) -> nn.Module:
    return nn.Linear(
        size.get(1, linear.in_features),
        size.get(0, linear.out_features),
        bias=linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )


def _parse(entry: Any) -> LayerWidths:
    values = entry.to_dict() if isinstance(entry, LayerWidths) else entry
    expected = [field.name for field in fields(LayerWidths)]
    if not isinstance(values, Mapping) or set(values) != set(expected):
        raise CheckpointError(f"Layer widths {values!r} are not valid; give exactly {expected}.")
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"Layer widths have {name}={value!r}; give a whole number >= 1.")
    widths = LayerWidths(**values)
    if widths.num_attention_heads % widths.num_key_value_heads:
        raise CheckpointError(
            f"Layer widths have {widths.num_attention_heads} heads for "
            f"{widths.num_key_value_heads} key-value heads; give a multiple."
        )
    return widths
