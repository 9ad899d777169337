"""Whether layers stay what they are when others are removed: checked on the models themselves.

A model may derive a layer's nature from its index or from the depth: its attention type, a
constant, whose keys and values it uses. So the original and the pruned model are both built on the
meta device, and each layer that stays is compared with what stands in its new place: classes of
modules, shapes of weights, plain attributes. Only the layer's own index may differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import isclose
from typing import Any

import torch

from streamline_bench.core.architecture import Architecture
from streamline_bench.core.architecture_inference import Configured, meta_model
from streamline_bench.errors import StreamlineBenchError, first_line

_INDEX = re.compile(r"(layer|block)_?(idx|index|id|number|num|i)$")


@dataclass(frozen=True)
class Difference:
    """Something that a removal would change in a layer that stays, or outside the layers.

    Attributes:
        layer: index of the layer before; None: outside the layers.
        what: the module, or its attribute.
        before, after: what it is, and what it would be.
    """

    layer: int | None
    what: str
    before: Any
    after: Any

    def __str__(self) -> str:
        where = "the model" if self.layer is None else f"layer {self.layer}"
        return f"in {where}, {self.what} would change from {self.before} to {self.after}"


class Unbuildable(Difference):
    """There would be no model: its class refuses the config."""

    def __init__(self, why: str) -> None:
        super().__init__(None, why, None, None)

    def __str__(self) -> str:
        return f"the rest is no model of this type ({self.what})"


@dataclass(frozen=True)
class Facts:
    """What a model on the meta device consists of.

    Attributes:
        layers: per layer: name -> class of a module, shape of a tensor or plain attribute.
        outside: name -> shape of each tensor outside the layers.
        shared: name of a tensor within a layer -> the layer that holds it for this one too, by
            layer.
    """

    layers: tuple[Mapping[str, Any], ...]
    outside: Mapping[str, tuple[int, ...]]
    shared: tuple[Mapping[str, int], ...]


def facts_of(config: Any, row: Architecture) -> Facts:
    """Return the facts of a config's model; each config is looked at once per process."""
    return _facts(Configured(config), row.layers)


@lru_cache(maxsize=32)
def _facts(configured: Configured, path: str) -> Facts:
    model = meta_model(configured.config)
    layers: Any = model.get_submodule(path)
    tensors = model.state_dict().items()
    outside = {n: tuple(t.shape) for n, t in tensors if not n.startswith(f"{path}.")}
    return Facts(tuple(_about(layer) for layer in layers), outside, _shared(layers))


def _about(layer: Any) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for name, module in layer.named_modules():
        about[f"{name or 'its class'}"] = type(module).__qualname__
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            about[f"the shape of {name}.{key}"] = None if tensor is None else tuple(tensor.shape)
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training" and _is_plain(value):
                about[f"{name}.{key}".lstrip(".")] = value
    return about


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (int, float, bool, str, torch.dtype))


def _shared(layers: Any) -> tuple[Mapping[str, int], ...]:
    holders: dict[int, int] = {}
    found: list[Mapping[str, int]] = []
    for index, layer in enumerate(layers):
        named = list(layer.named_parameters(remove_duplicate=False))
        found.append({n: holders[id(p)] for n, p in named if holders.get(id(p), index) != index})
        for _, parameter in named:
            holders.setdefault(id(parameter), index)
    return tuple(found)


def reloaded(config: Any) -> Any:
    """Return the config that a written ``config.json`` gives."""
    entries = json.loads(config.to_json_string(use_diff=True))
    return type(config).from_dict(type(config)._decode_special_floats(entries))


def differences(
    config: Any, pruned: Any, keep: Sequence[int], row: Architecture
) -> list[Difference]:
    """Return what a removal would change; nothing if every layer stays what it is.

    Args:
        pruned: config of the pruned model; it is looked at as it will be read from its file.
        keep: the layers that stay.
    """
    old = facts_of(config, row)
    try:
        new = facts_of(reloaded(pruned), row)
    except (StreamlineBenchError, ValueError, TypeError, KeyError, IndexError) as error:
        return [Unbuildable(first_line(error))]
    if len(new.layers) != len(keep):
        return [Difference(None, "the number of layers", len(keep), len(new.layers))]
    found: list[Difference] = list(_outside(old, new))
    for place, index in enumerate(keep):
        found += _of_layer(old.layers[index], new.layers[place], index, place, keep)
    return found


def _outside(old: Facts, new: Facts) -> Iterator[Difference]:
    for name in dict.fromkeys((*old.outside, *new.outside)):
        before, after = old.outside.get(name), new.outside.get(name)
        if before != after and sliced_dimension(old, new, name) is None:
            yield Difference(None, f"the shape of {name}", before, after)


def sliced_dimension(old: Facts, new: Facts, name: str) -> int | None:
    """Return the dimension in which a tensor outside the layers has a part for each layer."""
    before, after = old.outside.get(name), new.outside.get(name)
    if before is None or after is None or len(before) != len(after):
        return None
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if len(changed) != 1:
        return None
    a, b = before[changed[0]], after[changed[0]]
    per_layer = a // len(old.layers)
    fits = a == per_layer * len(old.layers) and b == per_layer * len(new.layers)
    return changed[0] if fits else None


def _of_layer(
    before: Mapping[str, Any], after: Mapping[str, Any], index: int, place: int, keep: Sequence[int]
) -> Iterator[Difference]:
    for name in dict.fromkeys((*before, *after)):
        a, b = before.get(name), after.get(name)
        if a == b or (_INDEX.search(name) and _is_index(a, b, index, place)):
            continue
        if isinstance(a, (list, tuple)) and len(a) > keep[-1] and b == [a[i] for i in keep]:
            continue  # the entries of all layers
        if isinstance(a, float) and isinstance(b, float) and isclose(a, b, rel_tol=1e-12):
            continue
        yield Difference(index, name, a, b)


def _is_index(a: Any, b: Any, index: int, place: int) -> bool:
    """Whether both are the layer's own number, counted from 0 or 1, in halves or in wholes."""
    pairs = {(index, place), (index + 1, place + 1)}
    pairs |= {(2 * index + half, 2 * place + half) for half in (0, 1)}
    return isinstance(a, int) and isinstance(b, int) and (a, b) in pairs
