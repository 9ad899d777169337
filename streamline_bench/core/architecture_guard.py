"""Whether layers stay what they are when others are removed: checked on the models themselves.

A model may derive a layer's nature from its index or from the depth: its attention type, a
constant, whose keys and values it uses. So the original and the pruned model are both built on the
meta device, and each layer that stays is compared with what stands in its new place: classes of
modules, shapes of weights, plain attributes. Only the layer's own index may differ.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from math import isclose
from typing import Any

import torch

from streamline_bench.core.architecture import Architecture, architecture_of, config_of, depth_of
from streamline_bench.core.architecture_inference import (
    Configured,
    entries_of,
    meta_model,
)
from streamline_bench.errors import first_line

_DEPTH = re.compile(r"layers$|^n_layer$|depth")
_PART = re.compile(r"the class of [^.]+")
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
        return f"transformers could not run the rest as a model of this type ({self.what})"


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

    def kinds(self) -> list[str]:
        """Name each layer by the classes of its parts; equal layers have equal names."""
        parts = [
            [value for name, value in about.items() if _PART.fullmatch(name)]
            for about in self.layers
        ]
        common = set(parts[0]).intersection(*parts)
        return [" + ".join(p for p in each if p not in common) or "all alike" for each in parts]


def facts_of(config: Any, row: Architecture) -> Facts:
    """Return the facts of a config's model; each config is looked at once per process."""
    return _facts(Configured(config), row.layers)


@lru_cache(maxsize=32)
def _facts(configured: Configured, path: str) -> Facts:
    model = meta_model(configured.config)
    layers: Any = model.get_submodule(path)
    tensors = model.state_dict().items()
    outside = {n: tuple(t.shape) for n, t in tensors if not n.startswith(f"{path}.")}
    return Facts(tuple(_about(layer, len(layers)) for layer in layers), outside, _shared(layers))


def _about(layer: Any, depth: int) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for name, module in layer.named_modules():
        about[f"the class of {name}" if name else "its class"] = type(module).__qualname__
        for key, tensor in chain(module._parameters.items(), module._buffers.items()):
            about[f"the shape of {name}.{key}"] = None if tensor is None else tuple(tensor.shape)
        for key, value in vars(module).items():
            if key.startswith("_") or key == "training" or not _is_plain(value):
                continue
            counts = bool(_DEPTH.search(key)) and value == depth
            if counts and not _read_when_run(type(module), key):  # type: ignore[arg-type]
                continue  # it has served to make a tensor, which is stored
            # A default may be a tuple, which a file gives back as a list.
            about[f"{name}.{key}".lstrip(".")] = list(value) if isinstance(value, tuple) else value
    return about


@cache
def _read_when_run(kind: type, attribute: str) -> bool:
    """Whether a module reads an attribute in ``forward``, or in a method that it calls."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return True
    methods = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    reached, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in methods:
            continue
        reached.add(name)
        used = {n.attr for n in ast.walk(methods[name]) if isinstance(n, ast.Attribute)}
        if attribute in used:
            return True
        waiting += used
    return "forward" not in methods


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
    return config_of(type(config), json.loads(config.to_json_string(use_diff=True)))


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
    except Exception as error:  # whatever the classes of config and model raise
        return [Unbuildable(first_line(error))]
    if len(new.layers) != len(keep):
        return [Difference(None, "the number of layers", len(keep), len(new.layers))]
    found: list[Difference] = list(_outside(old, new))
    for place, index in enumerate(keep):
        found += _of_layer(old.layers[index], new.layers[place], index, place, keep)
    found += _takers(config, pruned, keep, row)
    return found


def _takers(
    config: Any, pruned: Any, keep: Sequence[int], row: Architecture
) -> Iterator[Difference]:
    """Yield the layers that would take over what another layer made than the one they do now.

    Lists such as GLM-5's ``indexer_types`` say ``shared`` for a layer that uses what the last one
    of another kind before it chose; the layers themselves show nothing of that.
    """
    before, after = entries_of(config), entries_of(pruned)
    for key in row.layer_lists:
        old, new = _makers(before.get(key) or ()), _makers(after.get(key) or ())
        for place, index in enumerate(keep):
            if index not in old:
                continue
            maker = None if new.get(place) is None else keep[new[place]]
            if maker != old[index]:
                yield Difference(index, f"the layer that it shares with ({key})", old[index], maker)


def _makers(kinds: Sequence[Any]) -> dict[int, int]:
    """Return, for each layer of the kind ``shared``, the last one before it of another kind."""
    found: dict[int, int] = {}
    for index, kind in enumerate(kinds):
        if kind == "shared" and index:
            found[index] = found.get(index - 1, index - 1)
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


def tensors_by_layer(config: Any, pruned: Any, row: Architecture) -> dict[str, int]:
    """Return the tensors outside the layers that have a part for each: name -> the dimension."""
    old, new = facts_of(config, row), facts_of(reloaded(pruned), row)
    found = {name: sliced_dimension(old, new, name) for name in old.outside}
    return {name: dimension for name, dimension in found.items() if dimension is not None}


def layer_kinds(config: Any) -> list[str]:
    """Name the kind of each layer: by the config's lists of names, or by the classes of its parts.

    Equal names for all mean that the layers are alike.
    """
    row = architecture_of(config)
    depth, entries = depth_of(config), entries_of(config)
    lists = [entries.get(key) for key in row.layer_lists]
    named = [each for each in lists if each and all(isinstance(kind, str) for kind in each)]
    names = ["/".join(dict.fromkeys(str(each[i]) for each in named)) for i in range(depth)]
    kinds = facts_of(config, row).kinds()
    both = list(zip(names, kinds, strict=True))
    if len(set(names)) == len(set(both)):
        return names if len(set(names)) > 1 or any(names) else kinds
    return kinds if len(set(kinds)) == len(set(both)) else [f"{a} ({b})" for a, b in both]


def _of_layer(
    before: Mapping[str, Any], after: Mapping[str, Any], index: int, place: int, keep: Sequence[int]
) -> Iterator[Difference]:
    for name in dict.fromkeys((*before, *after)):
        a, b = before.get(name), after.get(name)
        if a == b or (_INDEX.search(name) and _is_index(a, b, index, place)):
            continue
        if (
            isinstance(a, (list, tuple))
            and len(a) > keep[-1]
            and list(b or ()) == [a[i] for i in keep]
        ):
            continue  # the entries of all layers
        if isinstance(a, float) and isinstance(b, float) and isclose(a, b, rel_tol=1e-12):
            continue
        yield Difference(index, name, a, b)


def _is_index(a: Any, b: Any, index: int, place: int) -> bool:
    """Whether both are the layer's own number, counted from 0 or 1, in halves or in wholes."""
    pairs = {(index, place), (index + 1, place + 1)}
    pairs |= {(2 * index + half, 2 * place + half) for half in (0, 1)}
    return isinstance(a, int) and isinstance(b, int) and (a, b) in pairs
