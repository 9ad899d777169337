"""Widths that differ between layers: the entries of ``config.layer_widths``, and narrower layers.

One table, :func:`projection_parts`, says which rows and columns of a layer's projections belong to
its heads and MLP channels; building a narrower layer and slicing the weights of a wider one both
follow it. A layer is built by its family at the config's own width and its projections are then
resized, so that families whose constructors know one width only (OPT) can be narrowed as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from streamline_bench.core.architecture import (
    Architecture,
    architecture_of,
    depth_of,
    undecided,
)
from streamline_bench.errors import ArchitectureError, CheckpointError

Unit = Literal["query", "key_value", "channel"]
"""What is removed as one: a query head, a key-value head, or a channel of the MLP."""


@dataclass(frozen=True)
class LayerWidths:
    """How many query heads, key-value heads and MLP channels one layer has.

    Attributes:
        output_bias, down_bias: the layer's output projection of attention, and of the MLP, have a
            bias that the family does not give them.
    """

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    output_bias: bool = False
    down_bias: bool = False

    @classmethod
    def of(cls, config: Any, row: Architecture) -> LayerWidths:
        """Return the widths that a config gives all its layers."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if row.latent or row.fused_by_head:  # the keys and values of every head are its own
            kv_heads = heads
        channels = getattr(config, row.intermediate_key)
        if channels is None:  # as GPT-2 has it
            channels = 4 * config.hidden_size
        return cls(heads, kv_heads, channels)

    def biased(self, row: Architecture) -> frozenset[str]:
        """Return the paths of projections that the flags give a bias."""
        paths = output_paths(row)
        flags = zip((self.output_bias, self.down_bias), paths, strict=True)
        return frozenset(path for flag, path in flags if flag)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def to_dict(self) -> dict[str, int]:
        """Return the JSON form that the config holds; flags only where they are set."""
        return {name: value for name, value in asdict(self).items() if value is not False}

    def entries(self, row: Architecture) -> dict[str, int]:
        """Return the widths under the names that the family's config uses."""
        entries = {name: getattr(self, name) for name in _COUNTS}
        entries[row.intermediate_key] = entries.pop("intermediate_size")
        return entries


_COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def output_paths(row: Architecture) -> tuple[str, str]:
    """Return the paths of a layer's output projections: of its attention, and of its MLP."""
    attention = f"{row.attention}." if row.attention else ""
    return attention + row.output, (f"{row.mlp}." if row.mlp else "") + row.down


@dataclass(frozen=True)
class Part:
    """Rows (axis 0) or columns (axis 1) of one projection, as equal pieces, one per unit.

    Attributes:
        module: path of the projection in the layer; of the parameter itself for a vector.
        unit: what the pieces belong to.
        axis: 0: rows of the weight ``[out, in]``, and items of the bias; 1: its columns.
        offset: first row or column; 0 but for fused projections.
        count: number of units.
        size: rows or columns per unit: the head size, or 1 for channels.
        transposed: the weight is stored as ``[in, out]``.
        vector: the part is a parameter of its own, with one number per unit, not a projection.
    """

    module: str
    unit: Unit
    axis: int
    offset: int
    count: int
    size: int
    transposed: bool = False
    vector: bool = False

    @property
    def tensor(self) -> str:
        """Name of the weight in the layer."""
        return self.module if self.vector else f"{self.module}.weight"

    @property
    def dim(self) -> int:
        """Dimension of the stored weight that the pieces lie along."""
        return 1 - self.axis if self.transposed else self.axis


def head_size(config: Any) -> int:
    """Return the width of one head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def projection_parts(row: Architecture, widths: LayerWidths, config: Any) -> tuple[Part, ...]:
    """Return which rows and columns of a layer's projections belong to heads and channels.

    Heads, or channels, that cannot be removed have no parts. Fused projections hold queries, then
    keys, then values (or the three of head 0, then those of head 1, ...); and gates, then the rest
    of the MLP's input.
    """
    return (
        *(() if fixed_heads(row) else _head_parts(row, widths, config)),
        *(() if fixed_channels(row) else _channel_parts(row, widths)),
    )


def _head_parts(row: Architecture, widths: LayerWidths, config: Any) -> Iterable[Part]:
    heads, kv_heads = widths.num_attention_heads, widths.num_key_value_heads
    size = value_size = head_size(config)
    # module, unit, first row, units, rows per unit
    rows: list[tuple[str, Unit, int, int, int]]
    if row.latent:
        value_size = config.v_head_dim
        query = "q_b_proj" if config.q_lora_rank else "q_proj"
        query_size = config.qk_nope_head_dim + config.qk_rope_head_dim
        rows = [
            (query, "query", 0, heads, query_size),
            ("kv_b_proj", "query", 0, heads, config.qk_nope_head_dim + value_size),
        ]
    elif row.fused_qkv and row.fused_by_head:
        rows = [(row.fused_qkv, "query", 0, heads, 3 * size)]
    elif row.fused_qkv:
        rows = [
            (row.fused_qkv, "query", 0, heads, size),
            (row.fused_qkv, "key_value", heads * size, kv_heads, size),
            (row.fused_qkv, "key_value", (heads + kv_heads) * size, kv_heads, size),
        ]
    else:
        rows = [
            (row.query, "query", 0, heads, size),
            (row.key, "key_value", 0, kv_heads, size),
            (row.value, "key_value", 0, kv_heads, size),
        ]
    path = f"{row.attention}." if row.attention else ""
    for name, unit, offset, count, of_unit in rows:
        yield Part(path + name, unit, 0, offset, count, of_unit, row.transposed)
    for name in row.head_vectors:
        yield Part(path + name, "query", 0, 0, heads, 1, vector=True)
    yield Part(path + row.output, "query", 1, 0, heads, value_size, row.transposed)


def _channel_parts(row: Architecture, widths: LayerWidths) -> Iterable[Part]:
    channels = widths.intermediate_size
    path = f"{row.mlp}." if row.mlp else ""
    if row.fused_gate_up:
        for start in (0, channels):
            yield Part(path + row.fused_gate_up, "channel", 0, start, channels, 1, row.transposed)
    else:
        for name in (row.gate, row.up):
            if name:
                yield Part(path + name, "channel", 0, 0, channels, 1, row.transposed)
    yield Part(path + row.down, "channel", 1, 0, channels, 1, row.transposed)


def fixed_heads(row: Architecture) -> str:
    """Return why heads of a family cannot be removed one by one; empty if they can."""
    if not row.attention:
        return "it is not known which of its modules are its attention"
    needed = ("query", "key", "value", "output", "intermediate_key")
    return row.fixed_heads or undecided(row, *needed)


def fixed_channels(row: Architecture) -> str:
    """Return why channels of a family cannot be removed one by one; empty if they can."""
    if row.experts:
        return "its MLPs are mixtures of experts, whose channels cannot be removed one by one yet"
    return row.fixed_channels or undecided(row, "up", "down", "intermediate_key")


def require_narrowable(row: Architecture) -> None:
    """Refuse families of which neither heads nor channels can be removed one by one.

    Raises:
        ArchitectureError: with the reasons.
    """
    heads, channels = fixed_heads(row), fixed_channels(row)
    if heads and channels:
        reasons = heads if heads == channels else f"{heads}; {channels}"
        raise ArchitectureError(
            f"Heads and channels of model type '{row.model_type}' cannot be removed: {reasons}; "
            "use a method that removes layers."
        )


def parse_layer_widths(entries: Iterable[Any], config: Any) -> tuple[LayerWidths, ...]:
    """Validate the entries of a config: one per layer, with exactly the three numbers.

    Raises:
        CheckpointError: a number is missing, below 1, not the host's where the family allows no
            other, or the heads cannot be shared out.
    """
    parsed = tuple(_parse(entry) for entry in entries)
    depth = depth_of(config)
    if len(parsed) != depth:
        raise CheckpointError(
            f"layer_widths has {len(parsed)} entries for {depth} layers; give one for each."
        )
    row = architecture_of(config)
    own = LayerWidths.of(config, row)
    for widths in parsed:
        if widths != _possible(widths, own, row):
            raise CheckpointError(
                f"Layer widths {widths.to_dict()} are not possible for host family "
                f"'{row.model_type}' with {own.to_dict()}: "
                f"{fixed_heads(row) or fixed_channels(row)}; write the checkpoint again."
            )
    return parsed


def _possible(widths: LayerWidths, own: LayerWidths, row: Architecture) -> LayerWidths:
    if fixed_heads(row):
        widths = replace(widths, num_attention_heads=own.num_attention_heads,
                         num_key_value_heads=own.num_key_value_heads)  # fmt: skip
    if fixed_channels(row):
        widths = replace(widths, intermediate_size=own.intermediate_size)
    return widths


def resize_layer(layer: nn.Module, row: Architecture, config: Any, widths: LayerWidths) -> None:
    """Give a layer built for ``config`` other widths, in place; resized projections are fresh.

    What the layer's modules remember of the old widths follows, and their ``config`` becomes a
    view of the shared one with the layer's own numbers.
    """
    parts = projection_parts(row, widths, config)
    sizes: dict[str, dict[int, int]] = {}
    for part in parts:
        if part.vector:
            parent, name = _parent_of(layer, part.module)
            parameter: Any = getattr(parent, name)
            setattr(parent, name, nn.Parameter(parameter.new_empty(part.count)))
            continue
        of_module = sizes.setdefault(part.module, {})
        of_module[part.axis] = of_module.get(part.axis, 0) + part.count * part.size
    biased = widths.biased(row)
    for path, size in sizes.items():
        parent, name = _parent_of(layer, path)
        setattr(parent, name, _resized(layer.get_submodule(path), size, path in biased))
    view = LayerConfig(config, widths.entries(row))
    channels = {"intermediate_size": widths.intermediate_size}
    heads = {
        "num_heads": widths.num_attention_heads,
        "num_attention_heads": widths.num_attention_heads,
        "num_key_value_heads": widths.num_key_value_heads,
        "num_key_value_groups": widths.heads_per_group,
        "split_size": widths.num_attention_heads * head_size(config),  # of GPT-2
    }
    for path, module in layer.named_modules():
        # Another module of the layer, such as a Mamba mixer, has widths of the same names.
        for numbers, units in ((channels, ("channel",)), (heads, ("query", "key_value"))):
            if not any(part.unit in units and _holds(path, part.module) for part in parts):
                continue
            for name, value in numbers.items():
                if isinstance(module.__dict__.get(name), int):
                    setattr(module, name, value)
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.__dict__["config"] = view


def _holds(path: str, projection: str) -> bool:
    """Whether a module of a layer holds a projection, or is part of what holds it."""
    holder = projection.rpartition(".")[0]
    return path == holder or (bool(holder) and path.startswith(f"{holder}."))


def _parent_of(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return layer.get_submodule(parent), name


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


def _resized(linear: Any, size: Mapping[int, int], biased: bool = False) -> nn.Module:
    if isinstance(linear, Conv1D):
        with torch.device(linear.weight.device):
            narrow: nn.Module = Conv1D(size.get(0, linear.nf), size.get(1, linear.nx))
        return narrow.to(linear.weight.dtype)
    return nn.Linear(
        size.get(1, linear.in_features),
        size.get(0, linear.out_features),
        bias=biased or linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )


def _parse(entry: Any) -> LayerWidths:
    values = entry.to_dict() if isinstance(entry, LayerWidths) else entry
    flags = {"output_bias", "down_bias"}
    if not isinstance(values, Mapping) or set(values) - flags != set(_COUNTS):
        raise CheckpointError(
            f"Layer widths {values!r} are not valid; give exactly {list(_COUNTS)}, and "
            f"{' or '.join(sorted(flags))} where there is one."
        )
    for name, value in values.items():
        flag = isinstance(value, bool)
        if name in flags:
            valid, wanted = flag, "true or false"
        else:
            valid = isinstance(value, int) and not flag and value >= 1
            wanted = "a whole number >= 1"
        if not valid:
            raise CheckpointError(f"Layer widths have {name}={value!r}; give {wanted}.")
    widths = LayerWidths(**values)
    if widths.num_attention_heads % widths.num_key_value_heads:
        raise CheckpointError(
            f"Layer widths have {widths.num_attention_heads} heads for "
            f"{widths.num_key_value_heads} key-value heads; give a multiple."
        )
    return widths
