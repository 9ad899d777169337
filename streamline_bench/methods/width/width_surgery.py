"""Checkpoints with fewer heads and channels: sliced tensors, and the config that can hold them.

Where all layers have the same widths, a stock config is tried first; then a stock family with the
same modules that takes any number of heads (Llama's config insists that they divide the hidden
size, Mistral's does not); all else is of model type ``streamline``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.errors import ResourceError, StreamlineBenchError, library_errors
from streamline_bench.modeling import register, streamline_config
from streamline_bench.modeling.widths import LayerWidths, head_size, projection_parts

log = logging.getLogger(__name__)

Slices = Mapping[str, tuple[str, int, Tensor]]
"""New tensor -> (source tensor, axis, indices to keep); a tensor is sliced along one axis only."""


@dataclass(frozen=True)
class KeptUnits:
    """Indices of the units that a layer keeps, in increasing order, int64."""

    query: Tensor
    key_value: Tensor
    channel: Tensor

    @property
    def widths(self) -> LayerWidths:
        """How many of each there are."""
        return LayerWidths(len(self.query), len(self.key_value), len(self.channel))


class SlicedTensors(Mapping[str, Tensor]):
    """Tensors sliced from a checkpoint when asked for, so that memory holds one at a time."""

    def __init__(self, reader: CheckpointReader, slices: Slices) -> None:
        self._reader = reader
        self._slices = slices

    def __getitem__(self, name: str) -> Tensor:
        source, axis, indices = self._slices[name]
        return self._reader.tensor(source).index_select(axis, indices)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)


def sliced_tensors(
    reader: CheckpointReader, config: Any, kept: Mapping[int, KeptUnits]
) -> SlicedTensors:
    """Return the tensors that change when some layers keep some of their units.

    Rows of biases follow those of weights; biases of output projections stay whole.

    Args:
        reader: the source.
        config: its transformers config.
        kept: layer -> what it keeps; layers that are not listed keep all.
    """
    family = architecture_of(config)
    widths, prefix = LayerWidths.of(config, family), layers_prefix(reader, family)
    present = set(reader.names)
    slices: dict[str, tuple[str, int, Tensor]] = {}
    for layer, units in kept.items():
        if units.widths == widths:
            continue
        pieces: dict[tuple[str, int], list[Tensor]] = {}
        for part in projection_parts(family, widths, head_size(config)):
            indices: Tensor = getattr(units, part.unit)
            if part.unit != "channel" and units.query.numel() == widths.num_attention_heads:
                continue
            lines = part.offset + (indices[:, None] * part.size + torch.arange(part.size)).view(-1)
            pieces.setdefault((part.module, part.axis), []).append(lines)
        for (module, axis), lines_of in pieces.items():
            for kind in ("weight",) if axis else ("weight", "bias"):
                name = f"{prefix}.{layer}.{module}.{kind}"
                if name in present:
                    slices[name] = (name, axis, torch.cat(lines_of))
    return SlicedTensors(reader, slices)


def narrowed_config(config: Any, widths: Mapping[int, LayerWidths]) -> Any:
    """Return the config of the result, of the most widely understood kind that can hold it.

    Args:
        config: of the source.
        widths: layer -> its widths; layers that are not listed keep theirs.
    """
    register()
    family = architecture_of(config)
    source = LayerWidths.of(config, family)
    depth = getattr(config, family.depth_key)
    layers = [widths.get(layer, source) for layer in range(depth)]
    if len(set(layers)) == 1:
        for model_type in (family.model_type, family.any_heads):
            found = _stock_config(config, model_type, layers[0]) if model_type else None
            if found is not None:
                return found
        log.warning(
            "No stock class holds %d heads and %d channels of model type '%s'; the result is of "
            "model type 'streamline'.",
            layers[0].num_attention_heads, layers[0].intermediate_size, family.model_type,
        )  # fmt: skip
    return streamline_config(config, layer_widths=layers)


def _stock_config(config: Any, model_type: str, widths: LayerWidths) -> Any | None:
    """Return a stock config with these widths in all layers; None if its model is another one."""
    family = architecture_of(config)
    entries = config.to_dict() | widths.entries(family)
    if widths.num_attention_heads != config.num_attention_heads:
        entries["head_dim"] = head_size(config)
    config_class: Any = CONFIG_MAPPING[model_type]
    if model_type != config.model_type:
        entries = _translated(entries, type(config), config_class)
    try:
        with library_errors(f"A config of {model_type}"):
            made = config_class.from_dict(entries)
            depth = getattr(config, family.depth_key)
            own = streamline_config(config, layer_widths=[widths] * depth)
            same = _shapes(made) == _shapes(own)
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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
