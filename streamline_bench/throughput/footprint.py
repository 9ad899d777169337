"""What a checkpoint weighs, and how fast a model of its size could be; no weights are loaded.

:func:`ideal` is a ratio of rooflines (Williams, Waterman and Patterson, 2009): a pass over the
model takes as long as the longer of its two parts, moving bytes and computing. A batch is one pass
over the prompts and one for every further token.

- Bytes: every matrix is read once in a pass, the LM head included. The embedding table is looked
  up, not read; tied, it counts once, as the head. Of routed experts, those count that the tokens
  of the pass are sent to. Keys and values are read for every earlier token of every sequence.
- Operations: two for every weight that a token meets, and four for every attention channel and
  earlier token (scores and weighted sum). The head is applied to the last token of a prompt.

Norms, biases and activations are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from streamline_bench.core.architecture import Architecture, architecture_of, config_entry
from streamline_bench.core.checkpoint.folder import TensorEntry
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.surgery import cached_values
from streamline_bench.errors import ArchitectureError, ThroughputError
from streamline_bench.throughput.record import Ideal
from streamline_bench.throughput.workload import Workload

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
        layers: decoder layers; 0 for a family that is not supported.
        layer_weights, outer_weights: numbers in the matrices that every token is multiplied with,
            in the layers and outside of them (the LM head).
        expert_weights: numbers in the matrices of routed experts.
        expert_share: share of the experts that one token is sent to.
        attention_channels: heads times head size, all layers together.
        kv_values_per_token: numbers cached for one token, all layers together; None if unknown.
        max_tokens: longest sequence the model takes; None if its config does not say.
    """

    parameters: int
    weights_bytes: int
    layers: int
    layer_weights: int
    outer_weights: int
    expert_weights: int
    expert_share: float
    attention_channels: int
    kv_values_per_token: int | None
    max_tokens: int | None
    dtype: str | None

    @property
    def empty(self) -> bool:
        """Whether there is no matrix to multiply with."""
        return not self.layer_weights + self.outer_weights + self.expert_weights

    def flops(self, context: float, *, head: bool = True) -> float:
        """Return the operations of one token that follows ``context`` earlier ones."""
        met = self.layer_weights + self.expert_weights * self.expert_share
        met += self.outer_weights if head else 0
        return 2.0 * met + 4.0 * self.attention_channels * context

    def weights_read(self, tokens: int) -> float:
        """Return the numbers read in a pass of ``tokens`` tokens, each with experts of its own."""
        reached = 1.0 - (1.0 - self.expert_share) ** tokens
        return self.layer_weights + self.outer_weights + self.expert_weights * reached


def footprint(folder: Path) -> Footprint:
    """Return the sizes of a checkpoint.

    Raises:
        CheckpointError: config or weights are missing or damaged.
    """
    reader = CheckpointReader(folder)
    cached = None
    try:
        row = architecture_of(reader.config)
        cached = cached_values(reader)
    except ArchitectureError:
        row = Architecture("unknown", depth_key="")  # sizes of the tensors can still be counted
    names = _Names(reader, row)
    matrices = [entry for entry in reader.entries.values() if len(entry.shape) >= 2]
    experts = [entry for entry in matrices if names.in_experts(entry)]
    inside = [e for e in matrices if names.in_layers(e) and not names.in_experts(e)]
    return Footprint(
        parameters=reader.num_parameters,
        weights_bytes=reader.stored_bytes,
        layers=int(config_entry(reader.config, row.depth_key, 0)) if row.depth_key else 0,
        layer_weights=sum(entry.numel for entry in inside),
        outer_weights=sum(entry.numel for entry in matrices if names.is_outer(entry)),
        expert_weights=sum(entry.numel for entry in experts),
        expert_share=names.expert_share,
        attention_channels=names.attention_channels,
        kv_values_per_token=sum(cached) if cached else None,
        max_tokens=config_entry(reader.config, "max_position_embeddings")
        or config_entry(reader.config, "n_positions"),
        dtype=config_entry(reader.config, "dtype") or config_entry(reader.config, "torch_dtype"),
    )


class Cost(NamedTuple):
    """What the passes of a batch cost: bytes moved and floating-point operations."""

    bytes: float
    flops: float

    def bound(self, ridge: float) -> float:
        """Return the time of the longer part, in units of one byte moved."""
        return max(self.bytes, self.flops / ridge)


def prefill_cost(sizes: Footprint, batch: int, prompt_tokens: int, number_bytes: int) -> Cost:
    """Return the cost of the pass over the prompts, which gives the first token of each."""
    kept = batch * prompt_tokens * (sizes.kv_values_per_token or 0)
    inside = prompt_tokens * sizes.flops((prompt_tokens + 1) / 2, head=False)
    return Cost(
        bytes=number_bytes * (sizes.weights_read(batch * prompt_tokens) + kept),
        flops=batch * (inside + 2.0 * sizes.outer_weights),
    )


def decode_cost(sizes: Footprint, batch: int, context: float, number_bytes: int) -> Cost:
    """Return the cost of one further token of each sequence, after ``context`` earlier ones."""
    read = batch * context * (sizes.kv_values_per_token or 0)
    return Cost(
        bytes=number_bytes * (sizes.weights_read(batch) + read),
        flops=batch * sizes.flops(context),
    )


def ridge_of(dtype: str, *, on_cpu: bool) -> float:
    """Return how many operations a usual device does while it moves one byte.

    One core of a server processor: 50 to 100 GFLOP/s beside 8 to 12 GB/s. Accelerators, by their
    data sheets, in 16 bits: A100 153, H200 206, H100 295; in float32 A100 10, H100 20.
    """
    if on_cpu:
        return 8.0
    return 20.0 if dtype == "float32" else 200.0


def ideal(
    dense: Footprint, pruned: Footprint, workload: Workload, batch: int, dtype: str, *, on_cpu: bool
) -> Ideal:
    """Return by how much ``pruned`` would be faster if both reached the roofline of the device."""
    ridge, costs = ridge_of(dtype, on_cpu=on_cpu), []
    prompt, steps, width = workload.prompt_tokens, workload.output_tokens - 1, DTYPE_BYTES[dtype]
    for sizes in (dense, pruned):
        first = prefill_cost(sizes, batch, prompt, width)
        each = decode_cost(sizes, batch, prompt + (steps + 1) / 2, width)  # linear in the context
        costs.append((
            first.bytes + steps * each.bytes,
            first.flops + steps * each.flops,
            first.bound(ridge) + steps * each.bound(ridge),
        ))  # fmt: skip
    moved, computed, bound = (above / below for above, below in zip(*costs, strict=True))
    return Ideal(
        kind="roofline",
        ratio=bound,
        bytes=moved,
        flops=computed,
        layers=dense.layers / pruned.layers if dense.layers and pruned.layers else None,
        weights=dense.weights_bytes / pruned.weights_bytes,
        ridge=ridge,
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
    # vLLM's dtypes of a cache that are not a model's (fp8, fp8_e5m2) have one byte.
    needed = max(values) * DTYPE_BYTES.get(dtype, 1) * sequences * blocks * _BLOCK
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

    def in_experts(self, entry: TensorEntry) -> bool:
        """In the layers, and one of several that a token is sent to some of."""
        experts = self._row.experts
        return bool(experts) and f".{experts}." in entry.name and self.in_layers(entry)

    @property
    def expert_share(self) -> float:
        total = next((self._config[key] for key in _EXPERTS if self._config.get(key)), 1)
        return float(config_entry(self._config, "num_experts_per_tok", total) / total)

    @property
    def attention_channels(self) -> int:
        """Heads times head size, all layers together: what the output projections read."""
        axis = 0 if self._row.transposed else 1
        ending = f".{self._row.attention}.{self._row.output}.weight"
        return sum(
            entry.shape[axis]
            for entry in self._entries.values()
            if entry.name.endswith(ending) and len(entry.shape) == 2
        )

    def _inside(self, name: str, path: str) -> bool:
        bare = path.removeprefix(f"{self._row.base}.")  # saved from the model without its head
        return name.startswith((f"{path}.", f"{bare}."))
