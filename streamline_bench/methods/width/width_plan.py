"""From "a quarter fewer parameters" to fewer heads and channels per layer, and to a checkpoint.

Every layer that may be pruned loses the same ratio of heads and of channels (LLM-Pruner,
arXiv 2305.11627, prunes each layer by itself). Heads are whole and channels stay a multiple, so the
ratios differ a little: the heads come as close as they can, and the channels make up the rest.

Tensors are sliced. Where all layers have the same widths, a stock config is tried first; then a
stock family with the same modules that takes any number of heads (Llama's config insists that they
divide the hidden size, Mistral's does not); all else is of model type ``streamline``.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from streamline_bench.core.architecture import Architecture, architecture_of
from streamline_bench.core.architecture_inference import meta_model
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import LazyTensors, layers_prefix
from streamline_bench.core.forward import hidden_of
from streamline_bench.core.streaming import held_layer, layer_copy
from streamline_bench.core.surgery import Removal, model_sizes
from streamline_bench.errors import (
    ArchitectureError,
    ResourceError,
    SparsityError,
    StreamlineBenchError,
    library_errors,
)
from streamline_bench.methods.width.stream_width import (
    NarrowShapes,
    resized_entries,
    stored_axes,
)
from streamline_bench.modeling import register, streamline_config
from streamline_bench.modeling.widths import (
    LayerWidths,
    Part,
    fixed_heads,
    head_size,
    projection_parts,
    require_narrowable,
    resize_layer,
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
        head_units: how many head units there are, and ``head_cost``: parameters of each; 0 where
            heads cannot be removed.
        channel_cost: parameters of one MLP channel; 0 where channels cannot be removed.
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

    @property
    def removable(self) -> str:
        """What can be removed, in words."""
        kinds = (("heads", self.head_units), ("channels", self.channel_cost))
        return " and ".join(name for name, there in kinds if there)

    @property
    def layer_parameters(self) -> int:
        """Parameters of all heads and channels of one layer."""
        return self.head_units * self.head_cost + self.widths.intermediate_size * self.channel_cost

    def whole(self, channels: float, multiple: int) -> int:
        """Return the closest multiple, at least one and at most what there is.

        Channels that cannot be removed all stay.
        """
        if not self.channel_cost:
            return self.widths.intermediate_size
        closest = max(1, math.floor(channels / multiple + 0.5)) * multiple
        return min(closest, self.widths.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class WidthPlan(Removal):
    """How many units every prunable layer loses.

    Attributes:
        layers: the layers that are pruned.
        ratio: the common share of heads and channels that was aimed at.
        head_ratio, channel_ratio: the shares removed, in whole heads.
        head_units, channels: how many each of the layers loses.
        widths: what each of the layers keeps.
    """

    layers: tuple[int, ...]
    ratio: float
    head_ratio: float
    channel_ratio: float
    head_units: int
    channels: int
    widths: LayerWidths


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
    heads_stay = bool(fixed_heads(family))
    if not shapes:
        prefix = f"{family.layers}.0."
        everything = _shapes(config).items()
        shapes = {name.removeprefix(prefix): s for name, s in everything if name.startswith(prefix)}
    parts = projection_parts(family, widths, config)
    _require_shapes(parts, shapes, family)
    query, key_value, channel = (
        sum(_cost(part, shapes) for part in parts if part.unit == kind)
        for kind in ("query", "key_value", "channel")
    )
    shared, groups = widths.heads_per_group, widths.num_key_value_heads
    within = unit == "q_within" and shared > 1
    sizes = model_sizes(config)
    return Prunable(
        widths=widths, head_units=0 if heads_stay else shared if within else groups,
        head_cost=groups * query if within else shared * query + key_value, channel_cost=channel,
        per_unit=(groups, 0) if within else (shared, 1), total=sizes.total,
        embeddings=sizes.embeddings, num_layers=len(sizes.layers),
    )  # fmt: skip


def plan_widths(
    units: Prunable,
    layers: Iterable[int],
    *,
    sparsity: float | None = None,
    ratio: float | None = None,
    multiple: int = 8,
) -> WidthPlan:
    """Return how many heads and channels each of ``layers`` loses.

    Args:
        sparsity: share of the model's parameters to remove.
        ratio: share of units to remove instead, rounded down to whole heads. What cannot be
            removed stays.
        multiple: the channels that stay are a multiple of this.

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
    if not layers:
        raise SparsityError(
            f"All {units.num_layers} layers are protected, so that nothing can be removed; lower "
            "protect_first or protect_last."
        )
    channels = units.widths.intermediate_size
    if ratio is not None:
        heads = math.floor(ratio * units.head_units + 1e-9)
        kept = units.whole((1 - ratio) * channels, multiple)
        plan = _plan(units, layers, None, ratio, heads, kept)
        if not plan.head_units and not plan.channels:
            raise SparsityError(
                f"Ratio {ratio} removes nothing: a layer has {units.head_units} removable heads or "
                f"groups and {channels if units.channel_cost else 0} channels in steps of "
                f"{multiple}; give a larger ratio."
            )
        return plan
    assert sparsity is not None
    per_layer = sparsity * units.total / len(layers)
    ratio = per_layer / units.layer_parameters
    counts = range(max(units.head_units, 1))
    for heads in sorted(counts, key=lambda u: abs(u - ratio * units.head_units)):
        missed = per_layer - heads * units.head_cost
        left = channels - missed / units.channel_cost if units.channel_cost else channels
        kept = units.whole(left, multiple)
        step = multiple * units.channel_cost or units.head_cost
        if abs(missed - (channels - kept) * units.channel_cost) <= step / 2:
            plan = _plan(units, layers, sparsity, ratio, heads, kept)
            if plan.removed > 0:
                return plan
    step = multiple * units.channel_cost or units.head_cost
    least = len(layers) * step / units.total
    stay = units.head_cost + min(multiple, channels) * units.channel_cost
    most = len(layers) * (units.layer_parameters - stay) / units.total
    raise SparsityError(
        f"Sparsity {sparsity} is out of reach: with {len(layers)} of {units.num_layers} layers "
        f"prunable, removing {units.removable} reaches {least:.4f} to {most:.4f}; "
        "choose a share in that range or protect fewer layers."
    )


def every_plan(
    units: Prunable, layers: Iterable[int], *, multiple: int = 8
) -> Iterator[tuple[float, WidthPlan]]:
    """Yield every plan that :func:`plan_widths` makes of a sparsity, with such a sparsity.

    A plan stays the same between two sparsities at which heads or channels are rounded another way;
    it is asked for once between any two of them. The least is removed first.
    """
    layers = tuple(layers)
    heads, channels = max(units.head_units, 1), units.widths.intermediate_size
    step = multiple * units.channel_cost or units.head_cost
    per_head = units.layer_parameters / heads
    edges = {0.0, float(units.layer_parameters)}
    for count in range(heads):
        low, high = (count - 1) * per_head, (count + 2) * per_head
        gone = count * units.head_cost
        rounded = [(channels - (k + 0.5) * multiple) * units.channel_cost
                   for k in range(channels // multiple + 1)]  # fmt: skip
        least = (channels - min(multiple, channels)) * units.channel_cost
        ends = [-step / 2, least + step / 2]
        edges.add((count + 0.5) * per_head)
        edges.update(gone + x for x in (*rounded, *ends) if low <= gone + x <= high)
    seen: set[tuple[int, int]] = set()
    for one, two in pairwise(sorted(edges)):
        sparsity = (one + two) / 2 * len(layers) / units.total
        try:
            plan = plan_widths(units, layers, sparsity=sparsity, multiple=multiple)
        except SparsityError:
            continue
        if (plan.head_units, plan.channels) not in seen:
            seen.add((plan.head_units, plan.channels))
            yield sparsity, plan


def _require_shapes(
    parts: Sequence[Part], shapes: Mapping[str, Sequence[int]], family: Architecture
) -> None:
    """Refuse a config whose numbers its family does not read (key-value heads of an OPT)."""
    model_type = family.model_type
    expected: dict[tuple[str, int, int], int] = {}
    for part in parts:
        key = (part.tensor, part.axis, part.dim)
        expected[key] = expected.get(key, 0) + part.count * part.size
    for (tensor, axis, dim), size in expected.items():
        if tensor not in shapes:
            raise ArchitectureError(
                f"Layer 0 of this '{model_type}' model has no '{tensor}', so that its heads and "
                "channels cannot be removed; use a method that removes layers."
            )
        found = shapes[tensor][dim]
        if found != size and family.inferred:
            raise ArchitectureError(
                f"Heads and channels of model type '{model_type}' cannot be removed: it is not "
                f"known how the {found} {'columns' if axis else 'rows'} of '{tensor}' are shared "
                "out among them; use a method that removes layers."
            )
        if found != size:
            raise ArchitectureError(
                f"The weights of '{tensor}' have {found} {'columns' if axis else 'rows'} and the "
                f"config of this '{model_type}' model makes it {size}; correct its numbers of "
                "heads and channels (num_attention_heads, num_key_value_heads, head_dim, "
                "intermediate size)."
            )


def _cost(part: Part, shapes: Mapping[str, Sequence[int]]) -> int:
    weight = shapes[part.tensor]
    bias = 1 if part.axis == 0 and f"{part.module}.bias" in shapes else 0
    return part.size * (math.prod(weight) // weight[part.dim] + bias)


def _plan(
    units: Prunable,
    layers: tuple[int, ...],
    requested: float | None,
    ratio: float,
    heads: int,
    kept: int,
) -> WidthPlan:
    before = units.widths
    channels = before.intermediate_size - kept
    removed = len(layers) * (heads * units.head_cost + channels * units.channel_cost)
    return WidthPlan(
        layers=layers,
        ratio=ratio,
        head_ratio=heads / max(units.head_units, 1),
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
        requested=requested,
    )


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptUnits:
    """Indices of the heads and channels that a layer keeps, in increasing order, int64."""

    query: Tensor
    key_value: Tensor
    channel: Tensor

    @property
    def widths(self) -> LayerWidths:
        """How many of each there are."""
        return LayerWidths(len(self.query), len(self.key_value), len(self.channel))


def sliced_tensors(
    reader: CheckpointReader,
    config: Any,
    kept: Mapping[int, KeptUnits],
    stream: Tensor | None = None,
) -> LazyTensors:
    """Return the tensors that change when some layers keep some of their heads and channels.

    Each is sliced from the checkpoint when it is asked for, so that memory holds one at a time.
    Rows of biases follow those of weights; biases of output projections stay whole.

    Args:
        reader: the source.
        config: its transformers config.
        kept: layer -> what it keeps; layers that are not listed keep all.
        stream: channels of the residual stream that stay, increasing; None: all.
    """
    family = architecture_of(config)
    widths, prefix = LayerWidths.of(config, family), layers_prefix(reader, family)
    present = set(reader.names)
    slices: dict[str, dict[int, Tensor]] = defaultdict(dict)
    parts = projection_parts(family, widths, config)
    for layer, units in kept.items():
        for tensor, (dim, lines) in _slices(parts, units, widths).items():
            name = f"{prefix}.{layer}.{tensor}"
            if name in present:
                slices[name][dim] = lines
    if stream is not None:
        for name, dims in stored_axes(reader, config).items():
            slices[name] |= dict.fromkeys(dims, stream)

    def sliced(name: str) -> Tensor:
        tensor = reader.tensor(name)
        for dim, lines in slices[name].items():
            tensor = tensor.index_select(dim, lines)
        return tensor

    return LazyTensors(slices, sliced)


def _slices(
    parts: Sequence[Part], units: KeptUnits, widths: LayerWidths
) -> dict[str, tuple[int, Tensor]]:
    """Return tensor in a layer -> dimension and what stays along it; each along one only."""
    pieces: dict[tuple[str, int], list[Tensor]] = {}
    for part in parts if units.widths != widths else ():
        indices: Tensor = getattr(units, part.unit)
        if part.unit != "channel" and units.query.numel() == widths.num_attention_heads:
            continue
        lines = part.offset + (indices[:, None] * part.size + torch.arange(part.size)).view(-1)
        places = {part.tensor: part.dim}
        if part.axis == 0 and not part.vector:
            places[f"{part.module}.bias"] = 0
        for tensor, dim in places.items():
            pieces.setdefault((tensor, dim), []).append(lines)
    return {tensor: (dim, torch.cat(lines)) for (tensor, dim), lines in pieces.items()}


@torch.no_grad()
def check_narrowed(model: Any, layer: int, units: KeptUnits) -> None:
    """Check on one layer of a loaded model that slicing it computes what zeroing its units does.

    For families whose parts were inferred. The model is left as it was.

    Raises:
        ArchitectureError: it does not, or the narrow layer does not run.
    """
    with held_layer(model, layer) as wide:
        _check_narrowed(model, wide, layer_copy(model, layer), units)


def _check_narrowed(model: Any, wide: Any, narrow: Any, units: KeptUnits) -> None:
    config, family = model.config, architecture_of(model.config)
    parts = projection_parts(family, LayerWidths.of(config, family), config)
    resize_layer(narrow, family, config, units.widths)
    slices = _slices(parts, units, LayerWidths.of(config, family))
    columns = {part.tensor for part in parts if part.axis == 1}
    originals: dict[str, Tensor] = {}
    for name, parameter in narrow.named_parameters():
        source = wide.get_parameter(name)
        if name not in slices:  # biases of output projections, norms
            parameter.data = source.data
            continue
        dim, lines = slices[name][0], slices[name][1].to(source.device)
        parameter.data = source.data.index_select(dim, lines)
        if name in columns:
            originals[name] = source.data.clone()
            gone = torch.ones(source.shape[dim], dtype=torch.bool, device=source.device)
            gone[lines] = False
            source.data.index_fill_(dim, gone.nonzero().view(-1), 0)
    seen: dict[str, Any] = {}

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["wide"] = hidden_of(output)
        seen["narrow"] = hidden_of(narrow(*args, **kwargs))

    what = f"Heads and channels of model type '{family.model_type}' cannot be removed"
    narrower = f"{what}: a layer with fewer of them does not run"
    handle = wide.register_forward_hook(hook, with_kwargs=True)
    ids = torch.arange(1, 9, device=model.get_input_embeddings().weight.device)[None]
    try:
        with library_errors(narrower, "use a method that removes layers", ArchitectureError):
            model(ids, use_cache=False)
    finally:
        handle.remove()
        for name, kept in originals.items():
            wide.get_parameter(name).data = kept
    error = float((seen["narrow"] - seen["wide"]).float().norm() / seen["wide"].float().norm())
    if not error < _NARROW_ERROR:
        raise ArchitectureError(
            f"{what}: a layer without them computes something else than one with them zeroed (by "
            f"{error:.0%}); use a method that removes layers."
        )


_NARROW_ERROR = 0.02
"""Share of a layer's output; rounding of bfloat16 stays below."""


def narrowed_config(
    config: Any, widths: Mapping[int, LayerWidths], hidden: int | None = None
) -> Any:
    """Return the config of the result, of the most widely understood kind that can hold it.

    Args:
        config: of the source.
        widths: layer -> its widths; layers that are not listed keep theirs.
        hidden: channels of the residual stream; None: all.

    Raises:
        ArchitectureError: no stock class holds fewer channels of the stream.
    """
    register()
    family = architecture_of(config)
    source = LayerWidths.of(config, family)
    depth = getattr(config, family.depth_key)
    layers = [widths.get(layer, source) for layer in range(depth)]
    if len(set(layers)) == 1:
        for model_type in (family.model_type, family.any_heads):
            found = _stock_config(config, model_type, layers[0], hidden) if model_type else None
            if found is not None:
                return found
        if hidden is not None:
            raise ArchitectureError(
                f"No class of model type '{family.model_type}' holds a hidden size of {hidden} "
                f"with {layers[0].num_attention_heads} heads; choose another embedding_multiple."
            )
        log.warning(
            "No stock class holds %d heads and %d channels of model type '%s'; the result is of "
            "model type 'streamline'.",
            layers[0].num_attention_heads, layers[0].intermediate_size, family.model_type,
        )  # fmt: skip
    return streamline_config(config, layer_widths=layers)


def _stock_config(
    config: Any, model_type: str, widths: LayerWidths, hidden: int | None
) -> Any | None:
    """Return a stock config with these widths in all layers; None if its model is another one."""
    family = architecture_of(config)
    entries = config.to_dict() | widths.entries(family)
    if hidden is not None:
        entries = resized_entries(config, hidden, widths)
    elif widths.num_attention_heads != config.num_attention_heads:
        entries["head_dim"] = head_size(config)
    config_class: Any = CONFIG_MAPPING[model_type]
    if model_type != config.model_type:
        entries = _translated(entries, type(config), config_class)
    try:
        with library_errors(f"A config of {model_type}"):
            made = config_class.from_dict(entries)
            if hidden is not None:
                wanted = NarrowShapes(config).shapes(hidden, widths)
            else:
                depth = getattr(config, family.depth_key)
                wanted = _shapes(streamline_config(config, layer_widths=[widths] * depth))
            same = _shapes(made) == wanted
    except ResourceError:
        raise
    except StreamlineBenchError as error:
        log.info("%s cannot hold %s: %s", model_type, widths, error)
        return None
    return made if same else None


def _translated(entries: Mapping[str, Any], source: Any, target: Any) -> dict[str, Any]:
    """Return a config's entries for a family with the same modules.

    What only the source family knows is dropped; what only the target knows is set to None.
    """
    known, other = target().to_dict(), source().to_dict()
    kept = {key: value for key, value in entries.items() if key in known or key not in other}
    kept.pop("model_type", None)
    return {
        **kept,
        **{key: None for key in known if key not in other},
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[target.model_type]],
    }


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    named = meta_model(config).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}
