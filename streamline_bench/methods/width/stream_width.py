"""Which dimensions of a model's tensors are channels of the residual stream, and what fewer save.

The model is built twice on the meta device, with its own hidden size and with twice as many
channels, all else given: the dimensions that grew are channels of the stream. What else a family
computes from the hidden size (head sizes, a factor of the embeddings) shows as well, and such a
stream is left alone: a model with fewer channels would compute something else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from streamline_bench.core.architecture import Architecture, architecture_of, depth_of
from streamline_bench.core.architecture_inference import meta_model
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layer_names
from streamline_bench.errors import ArchitectureError, library_errors
from streamline_bench.modeling.widths import LayerWidths, Unit, head_size, projection_parts

Shape = tuple[int, ...]


def resized_entries(config: Any, hidden: int, widths: LayerWidths) -> dict[str, Any]:
    """Return a config's entries with another hidden size and widths; heads keep their size."""
    entries: dict[str, Any] = config.to_dict() | widths.entries(architecture_of(config))
    entries[config.attribute_map.get("hidden_size", "hidden_size")] = hidden
    return entries | ({} if architecture_of(config).latent else {"head_dim": head_size(config)})


def stream_axes(config: Any) -> dict[str, Shape]:
    """Return name of a tensor -> its dimensions that are channels of the stream.

    Names are those of the model and those of its checkpoints.

    Raises:
        ArchitectureError: other parts of the family follow from the hidden size.
    """
    family = architecture_of(config)
    with library_errors(
        _cannot(family, "it takes no other hidden size"), _ADVICE, ArchitectureError
    ):
        hidden = int(config.hidden_size)
        entries = resized_entries(config, 2 * hidden, LayerWidths.of(config, family))
        before, after = meta_model(config), meta_model(type(config).from_dict(entries))
        _compare_numbers(before, after, family)
        own, wide = _shapes_of(before), _shapes_of(after)
    axes = {}
    for name, shape in own.items():
        other = wide.get(name, ())
        grown = tuple(i for i, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b)
        if len(other) != len(shape) or any(
            (shape[i], other[i]) != (hidden, 2 * hidden) for i in grown
        ):
            raise _refusal(family, f"the shape of '{name}' follows from the hidden size")
        axes[name] = grown
    _refuse_heads(config, family, axes)
    return axes


def _shapes_of(model: Any) -> dict[str, Shape]:
    """Return the shapes of a model's tensors, under their names in it and in checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    stored = revert_weight_conversion(model, dict(state))
    return {name: tuple(tensor.shape) for name, tensor in (*stored.items(), *state.items())}


def _compare_numbers(before: Any, after: Any, family: Architecture) -> None:
    twins = dict(after.named_modules())
    for path, module in before.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and vars(twins[path]).get(key) != value:
                raise _refusal(family, f"'{path}.{key}' follows from the hidden size")


def _refuse_heads(config: Any, family: Architecture, axes: Mapping[str, Shape]) -> None:
    for part in projection_parts(family, LayerWidths.of(config, family), config):
        if part.dim in axes.get(f"{family.layers}.0.{part.tensor}", ()):
            reason = f"the heads or channels of '{part.tensor}' follow from the hidden size"
            raise _refusal(family, reason)


_ADVICE = (
    "remove heads and channels of the MLPs only (parameters.axes=[heads,channels]), or use another "
    "method"
)


def _cannot(family: Architecture, reason: str) -> str:
    what = f"Channels of the residual stream of model type '{family.model_type}' cannot be removed"
    return f"{what}: {reason}"


def _refusal(family: Architecture, reason: str) -> ArchitectureError:
    return ArchitectureError(f"{_cannot(family, reason)}; {_ADVICE}.")


def stored_axes(reader: CheckpointReader, config: Any) -> dict[str, Shape]:
    """Return the tensors of a checkpoint that have channels of the stream -> their dimensions.

    Raises:
        ArchitectureError: see :func:`stream_axes`; or a tensor is stored in another form.
    """
    family, hidden = architecture_of(config), int(config.hidden_size)
    axes, found = stream_axes(config), {}
    others = {*reader.extra_names}
    for name in layer_names(reader, family, range(depth_of(config))).values():
        dims = axes.get(name, axes.get(f"{family.base}.{name}"))
        if dims is None:
            if name in others or name.endswith(family.buffers):
                continue
            raise _refusal(family, f"this checkpoint has a tensor '{name}', which its model lacks")
        shape = reader.entry(name).shape
        if any(dim >= len(shape) or shape[dim] != hidden for dim in dims):
            reason = f"'{name}' is stored as {list(shape)}, and the config makes it another shape"
            raise _refusal(family, reason)
        if dims:
            found[name] = dims
    return found


_Pattern = tuple[Shape, Shape, tuple[tuple[int, Unit, int], ...]]
"""Shape, dimensions that are the stream's, and (dimension, unit, size) of heads and channels."""


class NarrowShapes:
    """Shapes of a model's parameters as functions of its hidden size and layer widths.

    Tied weights count once.

    Raises:
        ArchitectureError: see :func:`stream_axes`, where ``stream`` channels are to be removed.
    """

    def __init__(self, config: Any, *, stream: bool = True) -> None:
        family = architecture_of(config)
        self.hidden = int(config.hidden_size)
        self.widths = LayerWidths.of(config, family)
        axes = stream_axes(config) if stream else {}
        parts = projection_parts(family, self.widths, config)
        self._parameters: list[tuple[str, _Pattern]] = []
        for name, parameter in meta_model(config).named_parameters():
            local = name.removeprefix(f"{family.layers}.").partition(".")[2]
            inside = name.startswith(f"{family.layers}.")
            units = tuple(
                (part.dim if local == part.tensor else 0, part.unit, part.size)
                for part in (parts if inside else ())
                if local == part.tensor
                or (part.axis == 0 and not part.vector and local == f"{part.module}.bias")
            )
            shape = tuple(parameter.shape)
            self._parameters.append((name, (shape, tuple(axes.get(name, ())), units)))
        self._counts = Counter(pattern for _, pattern in self._parameters)

    def shapes(self, hidden: int, widths: LayerWidths) -> dict[str, Shape]:
        """Return name of a parameter -> its shape; all layers have the same widths."""
        made = {pattern: _shape(pattern, hidden, widths) for pattern in self._counts}
        return {name: made[pattern] for name, pattern in self._parameters}

    def parameters(self, hidden: int, widths: LayerWidths) -> int:
        """Return the number of parameters."""
        return sum(
            count * math.prod(_shape(pattern, hidden, widths))
            for pattern, count in self._counts.items()
        )


def _shape(pattern: _Pattern, hidden: int, widths: LayerWidths) -> Shape:
    counts = {
        "query": widths.num_attention_heads,
        "key_value": widths.num_key_value_heads,
        "channel": widths.intermediate_size,
    }
    shape, axes, units = pattern
    sizes = [hidden if dim in axes else size for dim, size in enumerate(shape)]
    for dim in {dim for dim, _, _ in units}:
        sizes[dim] = sum(counts[unit] * size for at, unit, size in units if at == dim)
    return tuple(sizes)
