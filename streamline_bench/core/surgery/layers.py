"""Removes decoder layers from a config, together with everything that counts them.

Layers are counted by the config's depth and by config entries per layer. Missing one gives a model
that runs and is wrong, or reloads with random weights. The tensors are renamed by
:mod:`~streamline_bench.core.checkpoint.writer`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from streamline_bench.core.architecture import (
    Architecture,
    config_entry,
    require_removable_layers,
)
from streamline_bench.core.checkpoint.quantization import renumbered
from streamline_bench.errors import ArchitectureError, SparsityError


def block_keep(num_layers: int, start: int, n: int) -> list[int]:
    """Return the layers left when layers ``start .. start + n - 1`` of ``num_layers`` go.

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
    layers recounted, and periodic rules turned into lists. The new config is validated.

    Raises:
        ArchitectureError: the family is unknown, or layers cannot be removed from this model.
        SparsityError: ``keep`` is not a strictly increasing list of existing layers.
    """
    row = require_removable_layers(config)
    depth = getattr(config, row.depth_key)
    kept = check_keep(depth, keep)
    _refuse_unknown_lists(row, config)
    changes = _changes(row, config, kept, depth)
    pruned = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(pruned, key, value)
    if hasattr(pruned, "validate"):
        pruned.validate()
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
    if len(items) != depth:
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
