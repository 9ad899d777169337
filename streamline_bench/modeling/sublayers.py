"""Layers without attention or without MLP: the entry ``config.removed_sublayers``.

A decoder layer adds two outputs to the residual stream, one after the other: that of attention,
``h = x + attention(norm(x))``, and that of the MLP, ``y = h + mlp(norm(h))``. A layer without one
of them hands on the stream where it would have been added; its norms go with it. Such a layer
stays in the list of layers and in ``num_hidden_layers``. A layer that loses both is no layer of the
model any more.

A layer without attention caches no keys and values. transformers asks the first place of a cache
how many tokens there are, so that the attentions that are left take the first places
(:func:`cache_places`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import (
    Architecture,
    architecture_of,
    depth_of,
    undecided,
)
from streamline_bench.errors import ArchitectureError, CheckpointError

SublayerKind = Literal["attention", "mlp"]
Sublayer = tuple[int, SublayerKind]
"""Index of a layer, and which of its two sub-layers."""

KINDS: tuple[SublayerKind, ...] = get_args(SublayerKind)


@dataclass(frozen=True)
class RemovedSublayers:
    """The layers without attention, and those without MLP; in increasing order, none in both."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Sublayer]:
        for kind in KINDS:
            for layer in getattr(self, kind):
                yield layer, kind

    def to_dict(self) -> dict[str, list[int]]:
        """Return the JSON form that the config holds."""
        return {kind: list(layers) for kind, layers in asdict(self).items()}

    @classmethod
    def parse(cls, entry: Any, config: Any) -> RemovedSublayers:
        """Validate the entry of a config.

        Raises:
            CheckpointError: a key is unknown or missing, a layer is not of the model or is listed
                twice, or no attention that is left can count the tokens of a cache.
            ArchitectureError: the family's layers have no such sub-layers.
        """
        if isinstance(entry, cls):
            entry = entry.to_dict()
        if (
            not isinstance(entry, Mapping)
            or set(entry) != set(KINDS)
            or any(type(layer) is not int for kind in KINDS for layer in entry[kind])
        ):
            raise CheckpointError(
                f"removed_sublayers {entry!r} is not valid; give the layers of exactly "
                f"{list(KINDS)}."
            )
        removed = cls(**{kind: tuple(sorted(entry[kind])) for kind in KINDS})
        listed, depth = [*removed.attention, *removed.mlp], depth_of(config)
        if len(set(listed)) != len(listed) or not set(listed) <= set(range(depth)):
            raise CheckpointError(
                f"removed_sublayers {entry!r} must list layers of 0 .. {depth - 1}, each at most "
                "once: a layer without attention and MLP is none."
            )
        row = architecture_of(config)
        for kind in KINDS:
            if getattr(removed, kind):
                require_sublayers(config, row, kind)
        cache_places(layer_kinds_of(config, row), removed.attention)
        return removed


def require_sublayers(config: Any, row: Architecture, kind: SublayerKind) -> None:
    """Refuse a family from whose layers attention, or the MLP, cannot be taken alone.

    Raises:
        ArchitectureError: with the reason.
    """
    reason = undecided(row, "norms")
    if row.is_parallel(config):
        reason = "attention and MLP read the same input, so that there is no state between them"
    elif not row.attention:
        reason = "it is not known which of its modules are its attention"
    elif not row.mlp:
        reason = "its MLP is not a module of its own"
    elif kind == "mlp" and row.experts:
        reason = "its MLPs are mixtures of experts; attention can be removed"
    if reason:
        spoken = {"attention": "attention", "mlp": "MLP"}[kind]
        raise ArchitectureError(
            f"Layers of model type '{row.model_type}' cannot lose their {spoken} alone: {reason}; "
            "use a method that removes whole layers."
        )


def modules_of(row: Architecture, kind: SublayerKind) -> dict[str, bool]:
    """Return the paths in a layer of a sub-layer's modules -> whether it is the sub-layer itself.

    The others are its norms.
    """
    if kind == "attention":
        norms = (row.input_norm, row.attention_output_norm)
        return {row.attention: True, **dict.fromkeys(filter(None, norms), False)}
    norms = (row.mlp_norm, row.mlp_output_norm)
    return {row.mlp: True, **dict.fromkeys(filter(None, norms), False)}


class Nothing(nn.Module):
    """Stands in the place of a sub-layer and gives zeros, which take up no memory.

    Args:
        kind: attention gives a pair, whose second part are its weights.
    """

    def __init__(self, kind: SublayerKind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return zeros in the shape of ``hidden_states``, ``[batch, seq, hidden]``."""
        zeros = torch.zeros((), dtype=hidden_states.dtype, device=hidden_states.device)
        output = zeros.expand_as(hidden_states)
        return (output, None) if self.kind == "attention" else output


def take_out(layer: nn.Module, row: Architecture, kind: SublayerKind) -> None:
    """Take a sub-layer out of a layer, in place."""
    for path, itself in modules_of(row, kind).items():
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, Nothing(kind) if itself else nn.Identity())


def remove_sublayers(layers: nn.ModuleList, config: Any, removed: RemovedSublayers) -> None:
    """Take the sub-layers out of a model's layers, in place."""
    row = architecture_of(config)
    for layer, kind in removed:
        take_out(layers[layer], row, kind)
    places = cache_places(layer_kinds_of(config, row), removed.attention)
    for index, place in places.items():
        for module in layers[index].get_submodule(row.attention).modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = place  # type: ignore[assignment]


def layer_kinds_of(config: Any, row: Architecture) -> list[Any]:
    """Return for each layer which kind of attention it has, as caches tell them apart."""
    kinds = getattr(config, "layer_types", None)
    return list(kinds) if kinds else [None] * depth_of(config)


def cache_places(kinds: Sequence[Any], without: Sequence[int]) -> dict[int, int]:
    """Return layer with attention -> its place in a cache that has one for every layer.

    transformers makes each place for the kind of attention of the layer of that index, and asks the
    first place of all, and the first of each kind, for the number of tokens. So those that are left
    of a kind take the first places of that kind; the last ones stay empty.

    Raises:
        CheckpointError: the kind of the first layer has no attention left.
    """
    free: dict[Any, list[int]] = {}
    for place, kind in enumerate(kinds):
        free.setdefault(kind, []).append(place)
    places = {
        layer: free[kind].pop(0) for layer, kind in enumerate(kinds) if layer not in set(without)
    }
    if 0 not in places.values():
        named = f" of kind '{kinds[0]}'" if kinds[0] else ""
        raise CheckpointError(
            f"No layer{named} would keep its attention, and a cache counts tokens there; keep one."
        )
    return places
