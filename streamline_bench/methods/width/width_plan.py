"""From "a quarter fewer parameters" to numbers of heads and channels per layer.

Every layer that may be pruned loses the same ratio of heads and of channels (LLM-Pruner,
arXiv 2305.11627, prunes each layer by itself). Heads are whole and channels stay a multiple, so the
ratios differ a little: the heads come as close as they can, and the channels make up the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.surgery.sparsity import model_sizes
from streamline_bench.errors import ArchitectureError, SparsityError
from streamline_bench.modeling.widths import (
    LayerWidths,
    Part,
    head_size,
    projection_parts,
    require_narrowable,
)

HeadUnit = Literal["kv_group", "q_within"]
"""``kv_group``: a key-value head is removed with all query heads that share it. ``q_within``:
key-value heads stay, and every group loses equally many query heads. Without sharing both are
one head."""


@dataclass(frozen=True)
class Prunable:
    """What one layer could lose, in units and parameters; all layers of a model are alike.

    Attributes:
        widths: of the source.
        head_units: how many head units there are, and ``head_cost``: parameters of each.
        channel_cost: parameters of one MLP channel.
        per_unit: change of (query heads, key-value heads) when a head unit is removed.
        total, embeddings: parameters of the whole model, and of embeddings and LM head.
        num_layers: layers of the model.
    """

    widths: LayerWidths
    head_units: int
    head_cost: int
    channel_cost: int
    per_unit: tuple[int, int]
    total: int
    embeddings: int
    num_layers: int


@dataclass(frozen=True)
class WidthPlan:
    """How many units every prunable layer loses. Shares are of the source's parameters.

    Attributes:
        layers: the layers that are pruned.
        ratio: the common share of heads and channels that was aimed at.
        head_ratio, channel_ratio: the shares removed, in whole heads.
        head_units, channels: how many each of the layers loses.
        widths: what each of the layers keeps.
        removed, total, embeddings: parameters; ``removed`` with those added taken off.
        added_parameters: of an LM head that a recovery unties.
        reached, reached_without_embeddings, requested: shares of parameters.
    """

    layers: tuple[int, ...]
    ratio: float
    head_ratio: float
    channel_ratio: float
    head_units: int
    channels: int
    widths: LayerWidths
    removed: int
    total: int
    embeddings: int
    reached: float
    reached_without_embeddings: float
    requested: float | None
    added_parameters: int = 0


def prunable(
    config: Any, unit: HeadUnit = "kv_group", shapes: Mapping[str, Sequence[int]] | None = None
) -> Prunable:
    """Count the units of a model's layers and their parameters.

    Args:
        config: transformers config; no weights are needed.
        unit: what is removed at once in attention.
        shapes: parameter name within a layer -> shape; None: from the model on the meta device.

    Raises:
        ArchitectureError: heads and channels of the family cannot be removed, or the config gives
            other numbers of them than the weights have.
    """
    family = architecture_of(config)
    require_narrowable(family)
    widths = LayerWidths.of(config, family)
    shapes = shapes or layer_shapes(config)
    parts = projection_parts(family, widths, head_size(config))
    _require_shapes(parts, shapes, family.model_type)
    query, key_value, channel = (
        sum(_cost(part, shapes) for part in parts if part.unit == kind)
        for kind in ("query", "key_value", "channel")
    )
    shared, groups = widths.heads_per_group, widths.num_key_value_heads
    within = unit == "q_within" and shared > 1
    sizes = model_sizes(config)
    return Prunable(
        widths=widths,
        head_units=shared if within else groups,
        head_cost=groups * query if within else shared * query + key_value,
        channel_cost=channel,
        per_unit=(groups, 0) if within else (shared, 1),
        total=sizes.total,
        embeddings=sizes.embeddings,
        num_layers=len(sizes.layers),
    )


def layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return parameter name within a layer -> shape, from the model on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        layer = decoder_layers(AutoModelForCausalLM.from_config(config))[0]
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def plan_widths(
    units: Prunable,
    layers: Iterable[int],
    *,
    sparsity: float | None = None,
    ratio: float | None = None,
    multiple: int = 8,
    added_parameters: int = 0,
) -> WidthPlan:
    """Return how many units each of ``layers`` loses.

    Args:
        units: from :func:`prunable`.
        layers: those that may be pruned.
        sparsity: share of the model's parameters to remove.
        ratio: share of units to remove instead, rounded down to whole heads.
        multiple: the channels that stay are a multiple of this.
        added_parameters: parameters that are added: an LM head that a recovery unties.

    Raises:
        SparsityError: neither or both are given, one is out of range, or out of reach.
    """
    layers = tuple(layers)
    if (sparsity is None) == (ratio is None):
        raise SparsityError(
            "Give a sparsity (share of parameters to remove) or the parameter ratio (share of "
            "heads and channels to remove), one of the two."
        )
    for name, value in (("Sparsity", sparsity), ("Ratio", ratio)):
        if value is not None and not 0 < value < 1:
            raise SparsityError(f"{name} {value} is not a share between 0 and 1 (both excluded).")
    _require_layers(units, layers)
    if ratio is not None:
        heads = math.floor(ratio * units.head_units + 1e-9)
        kept = _whole((1 - ratio) * units.widths.intermediate_size, units, multiple)
        return _plan(units, layers, None, ratio, heads, kept, added_parameters)
    assert sparsity is not None
    per_layer = (sparsity * units.total + added_parameters) / len(layers)
    ratio = per_layer / _prunable_parameters(units)
    for heads in sorted(range(units.head_units), key=lambda u: abs(u - ratio * units.head_units)):
        left = (per_layer - heads * units.head_cost) / units.channel_cost
        kept = _whole(units.widths.intermediate_size - left, units, multiple)
        if abs(units.widths.intermediate_size - left - kept) <= multiple / 2:
            plan = _plan(units, layers, sparsity, ratio, heads, kept, added_parameters)
            if plan.removed > 0:
                return plan
    raise _out_of_reach(units, layers, sparsity, multiple, added_parameters)


def _require_shapes(
    parts: Sequence[Part], shapes: Mapping[str, Sequence[int]], model_type: str
) -> None:
    """Refuse a config whose numbers its family does not read (key-value heads of an OPT)."""
    expected: dict[tuple[str, int], int] = {}
    for part in parts:
        key = (part.module, part.axis)
        expected[key] = expected.get(key, 0) + part.count * part.size
    for (module, axis), size in expected.items():
        found = shapes[f"{module}.weight"][axis]
        if found != size:
            raise ArchitectureError(
                f"The weights of '{module}' have {found} {'columns' if axis else 'rows'} and the "
                f"config of this '{model_type}' model makes it {size}; correct its numbers of "
                "heads and channels (num_attention_heads, num_key_value_heads, head_dim, "
                "intermediate size)."
            )


def _cost(part: Part, shapes: Mapping[str, Sequence[int]]) -> int:
    weight = shapes[f"{part.module}.weight"]
    bias = 1 if part.axis == 0 and f"{part.module}.bias" in shapes else 0
    return part.size * (math.prod(weight) // weight[part.axis] + bias)


def _prunable_parameters(units: Prunable) -> int:
    return units.head_units * units.head_cost + units.widths.intermediate_size * units.channel_cost


def _whole(channels: float, units: Prunable, multiple: int) -> int:
    """Return the closest multiple, at least one and at most what there is."""
    closest = max(1, math.floor(channels / multiple + 0.5)) * multiple
    return min(closest, units.widths.intermediate_size)


def _plan(
    units: Prunable,
    layers: tuple[int, ...],
    requested: float | None,
    ratio: float,
    heads: int,
    kept: int,
    added: int,
) -> WidthPlan:
    before = units.widths
    channels = before.intermediate_size - kept
    removed = len(layers) * (heads * units.head_cost + channels * units.channel_cost) - added
    return WidthPlan(
        layers=layers,
        ratio=ratio,
        head_ratio=heads / units.head_units,
        channel_ratio=channels / before.intermediate_size,
        head_units=heads,
        channels=channels,
        widths=LayerWidths(
            before.num_attention_heads - heads * units.per_unit[0],
            before.num_key_value_heads - heads * units.per_unit[1],
            kept,
        ),
        removed=removed,
        total=units.total,
        embeddings=units.embeddings,
        reached=removed / units.total,
        reached_without_embeddings=removed / (units.total - units.embeddings),
        requested=requested,
        added_parameters=added,
    )


def _require_layers(units: Prunable, layers: tuple[int, ...]) -> None:
    if not layers:
        raise SparsityError(
            f"All {units.num_layers} layers are protected, so that nothing can be removed; lower "
            "protect_first or protect_last."
        )


def _out_of_reach(
    units: Prunable, layers: tuple[int, ...], sparsity: float, multiple: int, added: int
) -> SparsityError:
    least = max(0.0, (len(layers) * multiple * units.channel_cost - added) / units.total)
    kept = units.head_cost + min(multiple, units.widths.intermediate_size) * units.channel_cost
    most = (len(layers) * (_prunable_parameters(units) - kept) - added) / units.total
    return SparsityError(
        f"Sparsity {sparsity} is out of reach: with {len(layers)} of {units.num_layers} layers "
        f"prunable, removing heads and channels reaches {least:.4f} to {most:.4f}; choose a share "
        "in that range or protect fewer layers."
    )
