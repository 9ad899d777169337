"""The entries of a config that keep the layers of a pruned model what they were.

Most are known from the row. Where the guard finds a layer that would become another one, entries
that may decide it are tried one by one; what the guard accepts is kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from streamline_bench.core.architecture import Architecture, depth_of
from streamline_bench.core.architecture_guard import Difference, Unbuildable, differences
from streamline_bench.core.architecture_inference import entries_of
from streamline_bench.errors import ArchitectureError, first_line

_COUNT = re.compile(r"layer|dense|shared|first|start|end")
_MOST_TRIES = 40


def mended(config: Any, changes: Mapping[str, Any], keep: Sequence[int], row: Architecture) -> Any:
    """Return a copy of a config with ``changes`` and whatever else keeps its layers the same.

    Raises:
        ArchitectureError: a layer would become another one; it is named with what would change.
    """
    changes = {**_patterns(config, keep, row), **changes}
    pruned, found = _attempt(config, changes, keep, row)
    tries = 0
    while found and tries < _MOST_TRIES:
        for extra in _candidates(config, keep, row, found, changes):
            tries += 1
            attempt, left = _attempt(config, {**changes, **extra}, keep, row)
            if _badness(left) < _badness(found):
                changes, pruned, found = {**changes, **extra}, attempt, left
                break
        else:
            break
    if not found and row.inferred and _has_attention(config) and not _has_attention(pruned):
        found = [Unbuildable("its cache needs an attention layer, of which none would be left")]
    if found:
        raise _refusal(found[0], keep, row, depth_of(config))
    return pruned


def _has_attention(config: Any) -> bool:
    """Whether a list of kinds names attention; a cache of linear attention alone has no length."""
    kinds = getattr(config, "layer_types", None) or ()
    return any("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)


def _attempt(
    config: Any, changes: Mapping[str, Any], keep: Sequence[int], row: Architecture
) -> tuple[Any, list[Difference]]:
    try:
        pruned = _changed(config, changes)
    except Exception as error:  # whatever the config's class raises
        return None, [Unbuildable(first_line(error))]
    return pruned, differences(config, pruned, keep, row)


def _badness(found: Sequence[Difference]) -> float:
    """The number of differences; more than any number where there would be no such model."""
    if found and (isinstance(found[0], Unbuildable) or found[0].what == "the number of layers"):
        return inf
    return len(found)


def _refusal(
    first: Difference, keep: Sequence[int], row: Architecture, depth: int
) -> ArchitectureError:
    gone = sorted(set(range(depth)) - set(keep))
    listed = ", ".join(map(str, gone[:8])) + (", ..." if len(gone) > 8 else "")
    return ArchitectureError(
        f"Layers {listed} cannot be removed from this model of type '{row.model_type}': {first}, "
        "and no entry of its config prevents that; remove other layers."
    )


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    changed = copy.deepcopy(config)
    per_layer = changes.get("per_layer_config")
    if per_layer is not None:
        changed.per_layer_config = None  # its indices are checked against the depth
    for key, value in changes.items():
        if key != "per_layer_config":
            setattr(changed, key, value)
    if per_layer is not None:
        changed.per_layer_config = per_layer
    if hasattr(changed, "validate"):
        changed.validate()
    return changed


def _patterns(config: Any, keep: Sequence[int], row: Architecture) -> dict[str, Any]:
    """Entries per layer that are no plain lists: overrides by index, and patterns that repeat."""
    depth, entries = depth_of(config), entries_of(config)
    changes: dict[str, Any] = {}
    overrides = entries.get("per_layer_config")
    if isinstance(overrides, Mapping):
        by_index = {int(key): value for key, value in overrides.items()}
        kept = enumerate(keep)
        changes["per_layer_config"] = {j: by_index[i] for j, i in kept if i in by_index}
    if not row.inferred:
        return changes
    for key, value in entries.items():
        if isinstance(value, str) and len(value) == depth and "pattern" in key:
            changes[key] = "".join(value[index] for index in keep)
        elif isinstance(value, (list, tuple)) and value and key not in row.layer_lists:
            named = all(isinstance(item, str) for item in value)
            of_layers = re.search("type|pattern", key) and not re.search("mtp|nextn", key)
            if named and of_layers and len(value) < depth:
                changes[key] = [value[index % len(value)] for index in keep]  # repeated
            elif len(kinds := _expanded(value)) == depth:
                changes[key] = [[[kinds[index] for index in keep], 1]]
    return changes


def _expanded(value: Sequence[Any]) -> list[Any]:
    """Return what ``[[["global", "local"], 12]]`` stands for; nothing for another form."""
    kinds: list[Any] = []
    for item in value:
        if not isinstance(item, (list, tuple)) or len(item) != 2 or not isinstance(item[1], int):
            return []
        if not isinstance(item[0], (list, tuple)):
            return []
        kinds += list(item[0]) * item[1]
    return kinds


def _candidates(
    config: Any, keep: Sequence[int], row: Architecture, found: Sequence[Difference],
    changes: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Other entries that may decide what differs: counts from either end, periods, factors."""
    depth, entries = depth_of(config), entries_of(config)
    for key, value in entries.items():
        if key in changes or isinstance(value, bool):
            continue
        if value == depth and re.search("layers|blocks", key):
            yield {key: len(keep)}
        if isinstance(value, int) and 0 < value <= depth and _COUNT.search(key):
            yield {key: sum(index < value for index in keep)}
            yield {key: sum(index >= depth - value for index in keep)}
    yield from _naming_others(entries, keep, row)
    yield from _counted_from_one(entries, keep, depth)
    yield from _periods(entries, len(keep))
    ratios = {
        each.before / each.after
        for each in found
        if isinstance(each.before, float) and isinstance(each.after, float) and each.after
    }
    if len(ratios) == 1:  # one factor that was computed from the depth
        ratio = ratios.pop()
        for key, value in entries.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and value and (isinstance(value, float) or "scale" in key):
                yield {key: value * ratio}


def _naming_others(
    entries: Mapping[str, Any], keep: Sequence[int], row: Architecture
) -> Iterator[dict[str, Any]]:
    """Lists that name, for each layer, the one whose keys and values it uses."""
    for key in row.layer_lists:
        value = entries.get(key) or ()
        named = [value[index] for index in keep] if len(value) > keep[-1] else []
        if named and all(type(item) is int and item in keep for item in named):
            yield {key: [list(keep).index(item) for item in named]}


def _counted_from_one(
    entries: Mapping[str, Any], keep: Sequence[int], depth: int
) -> Iterator[dict[str, Any]]:
    """Lists of layers whose first one is number 1."""
    for key, value in entries.items():
        if not isinstance(value, (list, tuple)) or not value or "layer" not in key:
            continue
        if all(isinstance(item, int) and 0 < item <= depth for item in value):
            yield {key: [new for new, old in enumerate(keep, 1) if old + 1 in value]}


def _periods(entries: Mapping[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    for key, value in entries.items():
        offset = key.replace("period", "offset")
        if not key.endswith("_period") or not isinstance(value, int) or offset not in entries:
            continue
        for period in range(1, depth + 1):
            for start in range(period):
                yield {key: period, offset: start}
