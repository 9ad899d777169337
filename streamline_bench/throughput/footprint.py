"""What a checkpoint weighs, read from its config and tensor shapes; no weights are loaded.

Operations per generated token: two for every weight of every matrix that the token meets (the
embedding table is looked up, not multiplied; tied, it counts once, as the LM head), and four for
every attention channel and earlier token (scores and weighted sum). Of routed experts only the
share that a token is sent to counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamline_bench.core.architecture import Architecture, architecture_of, config_entry
from streamline_bench.core.checkpoint.folder import TensorEntry
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import ArchitectureError, ThroughputError
from streamline_bench.throughput.record import Ideal

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number in each dtype that engines run in."""
_BLOCK = 128  # tokens: the largest block of vLLM's platforms
_SMALLEST_CACHE = 1 << 24
_UNKNOWN_CACHE = 1 << 30


@dataclass(frozen=True)
class Footprint:
    """Sizes of one checkpoint.

    Attributes:
        weights_bytes: of all tensors as they are stored.
        layers: decoder layers; 0 for a family without a row in the architecture table.
        layer_flops, flops: per generated token: in an average layer's matrices; in the whole model,
            attention over ``context`` tokens included.
        kv_values_per_token: numbers cached for one token, all layers together; None if unknown.
        max_tokens: longest sequence the model takes; None if its config does not say.
    """

    parameters: int
    weights_bytes: int
    layers: int
    layer_flops: float
    flops: float
    kv_values_per_token: int | None
    max_tokens: int | None
    dtype: str | None


def footprint(folder: Path, context: int) -> Footprint:
    """Return the sizes of a checkpoint, for tokens generated after ``context`` earlier ones.

    Raises:
        CheckpointError: config or weights are missing or damaged.
    """
    reader = CheckpointReader(folder)
    try:
        row = architecture_of(reader.config)
    except ArchitectureError:
        row = Architecture("unknown", depth_key="")  # sizes of the tensors can still be counted
    names = _Names(reader, row)
    layers = int(config_entry(reader.config, row.depth_key, 0)) if row.depth_key else 0
    in_layers = sum(names.flops(e) for e in reader.entries.values() if names.in_layers(e))
    outside = sum(names.flops(e) for e in reader.entries.values() if names.is_outer(e))
    return Footprint(
        parameters=reader.num_parameters,
        weights_bytes=reader.stored_bytes,
        layers=layers,
        layer_flops=in_layers / layers if layers else 0.0,
        flops=in_layers + outside + 4.0 * names.attention_channels * context,
        kv_values_per_token=names.kv_values,
        max_tokens=config_entry(reader.config, "max_position_embeddings")
        or config_entry(reader.config, "n_positions"),
        dtype=config_entry(reader.config, "dtype") or config_entry(reader.config, "torch_dtype"),
    )


def ideal(dense: Footprint, pruned: Footprint) -> Ideal:
    """Return by how much ``pruned`` would be faster if only its size counted.

    Layers are compared where the remaining layers equal dense's own, else operations.
    """
    flops = dense.flops / pruned.flops
    layers = dense.layers / pruned.layers if dense.layers and pruned.layers else flops
    same_layers = abs(pruned.layer_flops - dense.layer_flops) <= 1e-6 * dense.layer_flops
    kind: Literal["layers", "flops"] = "layers" if dense.layers and same_layers else "flops"
    return Ideal(
        kind=kind,
        ratio=layers if kind == "layers" else flops,
        layers=layers,
        flops=flops,
        weights=dense.weights_bytes / pruned.weights_bytes,
    )


def resolved_dtype(dtype: str, stored: Iterable[str | None]) -> str:
    """Return the dtype to run in: ``auto`` is the first that a checkpoint names.

    Raises:
        ThroughputError: a checkpoint names one that no engine here runs in.
    """
    if dtype != "auto":
        return dtype
    named = next((name for name in stored if name), "float32").removeprefix("torch.")
    if named not in DTYPE_BYTES:
        raise ThroughputError(
            f"The first model's dtype is '{named}'; give --dtype {', '.join(DTYPE_BYTES)}."
        )
    return named


def cache_bytes(
    footprints: Iterable[Footprint], sequences: int, sequence_tokens: int, dtype: str
) -> int:
    """Return the size of a cache of keys and values that holds the largest batch of any model."""
    values = [f.kv_values_per_token for f in footprints if f.kv_values_per_token]
    if not values:
        return _UNKNOWN_CACHE
    blocks = -(-sequence_tokens // _BLOCK) + 1
    needed = max(values) * DTYPE_BYTES[dtype] * sequences * blocks * _BLOCK
    return max(_SMALLEST_CACHE, needed)


class _Names:
    """Which tensors of a checkpoint are what."""

    def __init__(self, reader: CheckpointReader, row: Architecture) -> None:
        self._row = row
        self._config: Mapping[str, Any] = reader.config
        self._entries = reader.entries
        self._parameters = set(reader.parameter_names)
        self._head = row.stored_as.get(row.lm_head, row.lm_head)
        self._tied = f"{self._head}.weight" not in self._parameters

    def in_layers(self, entry: TensorEntry) -> bool:
        return entry.name in self._parameters and self._inside(entry.name, self._row.layers)

    def is_outer(self, entry: TensorEntry) -> bool:
        """Outside the layers and multiplied with: the LM head, not the embeddings."""
        if entry.name not in self._parameters or self.in_layers(entry):
            return False
        tables = self._row.embeddings[1:] if self._tied else self._row.embeddings
        return not any(self._inside(entry.name, table) for table in tables)

    def flops(self, entry: TensorEntry) -> float:
        if len(entry.shape) < 2:
            return 0.0
        share = 1.0
        if self._row.experts and f".{self._row.experts}." in entry.name:
            total = next((self._config[key] for key in _EXPERTS if self._config.get(key)), 1)
            share = config_entry(self._config, "num_experts_per_tok", total) / total
        return 2.0 * entry.numel * share

    @property
    def attention_channels(self) -> int:
        """Heads times head size, all layers together: what the output projections read."""
        return self._sum(self._row.output, axis=0 if self._row.transposed else 1)

    @property
    def kv_values(self) -> int | None:
        """Rows of key and value projections, all layers together."""
        axis = 1 if self._row.transposed else 0
        if self._row.fused_qkv:
            return self._sum(self._row.fused_qkv, axis) - self.attention_channels or None
        if not self._row.key or self._row.model_type == "unknown":
            return None
        return self._sum(self._row.key, axis) + self._sum(self._row.value, axis) or None

    def _sum(self, projection: str, axis: int) -> int:
        ending = f".{self._row.attention}.{projection}.weight"
        return sum(
            entry.shape[axis]
            for entry in self._entries.values()
            if entry.name.endswith(ending) and len(entry.shape) == 2
        )

    def _inside(self, name: str, path: str) -> bool:
        bare = path.removeprefix(f"{self._row.base}.")  # saved from the model without its head
        return name.startswith((f"{path}.", f"{bare}."))
