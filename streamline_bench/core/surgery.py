"""The config without removed layers, and how many layers a sparsity is.

A config counts layers in its depth and in entries per layer. Missing one gives a model that runs
and is wrong, or reloads with random weights. (:func:`.writer.layer_names` renumbers the tensors.)

Layers are whole, so that a requested share is seldom hit: the number of layers whose share comes
closest is taken (the smaller one on a tie), and both shares are reported. The number of layers is
what serving speed follows; label results by it as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from streamline_bench.core.architecture import (
    Architecture,
    architecture_of,
    config_entry,
    remember,
    require_removable_layers,
)
from streamline_bench.core.checkpoint.folder import checked_depth
from streamline_bench.core.checkpoint.quantization import renumbered
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.errors import ArchitectureError, SparsityError


def block_keep(num_layers: int, start: int, n: int) -> list[int]:
    """Return the layers left without ``start .. start + n - 1`` of ``num_layers``.

    Raises:
        SparsityError: ``n`` is not in ``1 .. num_layers - 1``, or the block leaves the model.
    """
    if not 1 <= n < num_layers:
        raise SparsityError(
            f"Cannot remove {n} of {num_layers} layers; choose from 1 to {num_layers - 1}."
        )
    if not 0 <= start <= num_layers - n:
        raise SparsityError(
            f"A block of {n} layers cannot start at layer {start} of {num_layers}; "
            f"choose a start from 0 to {num_layers - n}."
        )
    return [*range(start), *range(start + n, num_layers)]


def check_keep(num_layers: int, keep: Sequence[int]) -> list[int]:
    """Return ``keep`` as a list of plain integers.

    Raises:
        SparsityError: it is empty, not strictly increasing, or names a layer that is not there.
    """
    kept = [int(index) for index in keep]
    increasing = all(a < b for a, b in pairwise(kept))
    if not kept or not increasing or kept[0] < 0 or kept[-1] >= num_layers:
        raise SparsityError(
            f"The layers to keep are {kept}; give at least one, in increasing order, from 0 to "
            f"{num_layers - 1}."
        )
    return kept


def pruned_config(config: Any, keep: Sequence[int]) -> Any:
    """Return a new transformers config with only the layers in ``keep``.

    Lists with one item per layer are sliced, lists of layer indices renumbered, counts of leading
    layers recounted, and periodic rules turned into lists. The new config is validated. Then both
    models are built without weights and compared (:mod:`.architecture_guard`): a layer that would
    become another one in its new place is mended through the config, or the removal is refused.

    Raises:
        ArchitectureError: the family is unknown, or these layers cannot be removed from this model.
        SparsityError: ``keep`` is not a strictly increasing list of existing layers.
    """
    from streamline_bench.core.architecture_mends import mended

    row = require_removable_layers(config)
    depth = getattr(config, row.depth_key)
    kept = check_keep(depth, keep)
    if not row.inferred:
        _refuse_unknown_lists(row, config)
    pruned = mended(config, _changes(row, config, kept, depth), kept, row)
    remember(pruned, row)
    return pruned


def _changes(row: Architecture, config: Any, keep: list[int], depth: int) -> dict[str, Any]:
    changes: dict[str, Any] = {row.depth_key: len(keep)}
    for key in row.layer_lists:
        items = getattr(config, key, None)
        if items is not None:
            changes[key] = _sliced(key, items, keep, depth)
    for key in row.prefix_counts:
        count = getattr(config, key, None)
        if count is not None:
            changes[key] = sum(index < count for index in keep)
    if getattr(config, "quantization_config", None):
        changes["quantization_config"] = renumbered(config.quantization_config, keep)
    for key, listed in _irregular(row, config, depth).items():
        changes[key] = [new for new, old in enumerate(keep) if old in listed]
    for key in row.periods:
        if getattr(config, key, None) is not None:
            changes[key] = 1
    if row.extra_layers and getattr(config, row.extra_layers, None):
        changes[row.extra_layers] = 0
    return changes


def _sliced(key: str, items: Sequence[Any], keep: list[int], depth: int) -> list[Any]:
    if len(items) < depth:  # what is beyond belongs to layers for multi-token prediction
        raise ArchitectureError(
            f"The config's {key} has {len(items)} items for {depth} layers; correct config.json."
        )
    return [items[index] for index in keep]


def _irregular(row: Architecture, config: Any, depth: int) -> dict[str, set[int]]:
    """Return, per index list, the layers in it, those that a periodic rule implies included."""
    listed = {
        key: set(getattr(config, key))
        for key in row.index_lists
        if getattr(config, key, None) is not None
    }
    for key, list_key in row.periods.items():
        period = getattr(config, key, None) or 1
        implied = {index for index in range(depth) if (index + 1) % period}
        if implied:
            listed[list_key] = listed.get(list_key, set()) | implied
    return listed


def _refuse_unknown_lists(row: Architecture, config: Any) -> None:
    # A newer transformers may add an entry per layer; ignoring it would misplace layers.
    known = {*row.layer_lists, *row.index_lists}
    for key, value in config.to_dict().items():
        if "layer" in key and key not in known and isinstance(value, (list, tuple, dict)) and value:
            raise ArchitectureError(
                f"The config of model type '{row.model_type}' has per-layer entry '{key}', which "
                "the architecture table does not know; add it to the row before removing layers "
                f"(now {config_entry(config, key)!r:.80})."
            )


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters of a model; tied weights count once, buffers not at all.

    Attributes:
        total: all of them.
        layers: per decoder layer.
        embeddings: token and position embeddings and, where it has weights of its own, the LM
            head.
    """

    total: int
    layers: tuple[int, ...]
    embeddings: int

    @property
    def mean_layer(self) -> float:
        """Parameters of a layer; layers differ only in mixtures with some dense layers."""
        return sum(self.layers) / len(self.layers)


@dataclass(frozen=True, kw_only=True)
class Removal:
    """How much smaller a model gets. Shares are of the source model's parameters.

    Attributes:
        removed: parameters fewer, those added taken off.
        total: parameters of the source.
        embeddings: parameters of embeddings and LM head in ``total``.
        requested: the share asked for; None if something else was given.
        reached: ``removed / total``.
        reached_without_embeddings: ``removed / (total - embeddings)``.
    """

    removed: int
    total: int
    embeddings: int
    requested: float | None
    reached: float = field(init=False)
    reached_without_embeddings: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reached", self.removed / self.total)
        inner = self.total - self.embeddings
        object.__setattr__(self, "reached_without_embeddings", self.removed / inner)


@dataclass(frozen=True, kw_only=True)
class SizePlan(Removal):
    """What removing ``n_layers`` layers amounts to.

    Before the layers are chosen, ``removed`` is of layers of mean size; :func:`of_layers` gives it
    for the layers that are really removed.

    Attributes:
        n_layers: layers to remove (net of layers put in).
        added_parameters: of the replacement.
        num_layers: layers of the source.
    """

    n_layers: int
    added_parameters: int
    num_layers: int


def layers_for_sparsity(
    source: CheckpointReader | Any,
    sparsity: float | None = None,
    *,
    n_layers: int | None = None,
    added_parameters: int = 0,
) -> SizePlan:
    """Turn a share of parameters, or a number of layers, into a plan.

    Args:
        source: a checkpoint, or a transformers config (no weights needed).
        sparsity: share of all parameters to remove, in (0, 1).
        n_layers: layers to remove instead.
        added_parameters: what a replacement puts in.

    Raises:
        SparsityError: neither or both are given, one is out of range, or no number of layers
            comes within half a layer of the share.
    """
    if (sparsity is None) == (n_layers is None):
        raise SparsityError("Give either a sparsity or a number of layers to remove.")
    sizes = model_sizes(source)
    if len(sizes.layers) == 1:
        raise SparsityError("The model has one layer, which cannot be removed; take another model.")
    if n_layers is None:
        assert sparsity is not None
        n_layers = _closest(sizes, sparsity, added_parameters)
    elif not 1 <= n_layers < len(sizes.layers):
        raise SparsityError(
            f"Cannot remove {n_layers} of {len(sizes.layers)} layers; choose from 1 to "
            f"{len(sizes.layers) - 1}."
        )
    removed = round(n_layers * sizes.mean_layer) - added_parameters
    return SizePlan(
        n_layers=n_layers,
        removed=removed,
        total=sizes.total,
        requested=sparsity,
        embeddings=sizes.embeddings,
        added_parameters=added_parameters,
        num_layers=len(sizes.layers),
    )


def of_layers(plan: SizePlan, source: CheckpointReader | Any, layers: Iterable[int]) -> SizePlan:
    """Return the plan with the parameters of the layers that are really removed.

    Layers of a mixture with some dense layers differ in size, and the method chooses them after it
    has looked at the model.
    """
    sizes = model_sizes(source)
    removed = sum(sizes.layers[layer] for layer in layers) - plan.added_parameters
    return replace(plan, removed=removed)


def model_sizes(source: CheckpointReader | Any) -> ModelSizes:
    """Count parameters from the headers of a checkpoint, or from a config on the meta device.

    Layers for multi-token prediction, which some checkpoints carry behind the decoder, are not
    part of the model that transformers builds and are not counted.

    Raises:
        ArchitectureError: the family is not supported.
    """
    if isinstance(source, CheckpointReader):
        row = architecture_of(source.config)
        prefix = layers_prefix(source, row)
        depth = checked_depth(config_entry(source.config, row.depth_key), row.depth_key)
        return _sizes(row, prefix, depth, source.parameter_counts.items())
    row = architecture_of(source)
    return _sizes(row, row.layers, getattr(source, row.depth_key), _meta_counts(source))


def cached_values(reader: CheckpointReader) -> tuple[int, ...] | None:
    """Return how many numbers each layer caches for a token: its rows of keys and values.

    A layer without attention, or without a cache that grows, has 0. None: the family's projections
    of keys and values are not known.

    Raises:
        ArchitectureError: the family is not supported.
    """
    row = architecture_of(reader.config)
    if not (row.fused_qkv or row.key):
        return None
    axis = 1 if row.transposed else 0
    # A fused projection has rows of queries as well: as many as the output projection reads.
    parts = {row.fused_qkv: (1, axis), row.output: (-1, 1 - axis)} if row.fused_qkv else {
        row.key: (1, axis), row.value: (1, axis)
    }  # fmt: skip
    values = [0] * int(config_entry(reader.config, row.depth_key, 0))
    for name, entry in reader.entries.items():
        for projection, (sign, dim) in parts.items():
            found = re.fullmatch(
                rf"(?:.*\.)?(\d+)\.{re.escape(f'{row.attention}.{projection}')}\.weight", name
            )
            if found and int(found[1]) < len(values) and len(entry.shape) == 2:
                values[int(found[1])] += sign * entry.shape[dim]
    return tuple(values) if any(values) else None


def _closest(sizes: ModelSizes, sparsity: float, added: int) -> int:
    if not 0 < sparsity < 1:
        raise SparsityError(
            f"Sparsity {sparsity} is not a share between 0 and 1 (both excluded); for a quarter "
            "of the parameters give 0.25."
        )
    step = sizes.mean_layer / sizes.total
    reached = {n: n * step - added / sizes.total for n in range(1, len(sizes.layers))}
    # min() keeps the first of equals: the smaller number of layers. Rounding hides noise of floats.
    best = min(reached, key=lambda n: round(abs(reached[n] - sparsity), 12), default=0)
    if not best or abs(reached[best] - sparsity) > step / 2 + 1e-9 or reached[best] <= 0:
        possible = [share for share in reached.values() if share > 0]
        span = f"{min(possible):.4f} to {max(possible):.4f}" if possible else "nothing"
        raise SparsityError(
            f"Sparsity {sparsity} is out of reach: removing whole layers of this model reaches "
            f"{span}, in steps of {step:.4f}; choose a share in that range or give n_layers."
        )
    return best


def _meta_counts(config: Any) -> list[tuple[str, int]]:
    from streamline_bench.core.architecture_inference import meta_model  # torch, transformers

    return [(name, parameter.numel()) for name, parameter in meta_model(config).named_parameters()]


def _sizes(
    row: Architecture, prefix: str, depth: int, counts: Iterable[tuple[str, int]]
) -> ModelSizes:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    outside = tuple(
        f"{spelled}."
        for path in (*row.embeddings, row.lm_head)
        for spelled in {path, path.removeprefix(f"{row.base}."), row.stored_path(path)}
    )
    layers = [0] * depth
    total = embeddings = 0
    for name, count in counts:
        match = pattern.match(name)
        if match is not None and int(match[1]) >= depth:
            continue
        total += count
        if match is not None:
            layers[int(match[1])] += count
        elif name.startswith(outside):
            embeddings += count
    return ModelSizes(total, tuple(layers), embeddings)
