"""What methods that remove heads and channels share: which units there are, and the checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from streamline_bench.core.architecture import Architecture, architecture_of, depth_of
from streamline_bench.core.architecture_guard import layer_kinds
from streamline_bench.core.architecture_inference import entries_of
from streamline_bench.core.checkpoint.writer import LazyTensors, layer_names, layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.base import Compressed, Compression
from streamline_bench.methods.tools.layer_removal import config_json
from streamline_bench.methods.width.width_plan import (
    HeadUnit,
    KeptUnits,
    Prunable,
    check_narrowed,
    narrowed_config,
    prunable,
    sliced_tensors,
)
from streamline_bench.modeling.widths import (
    LayerWidths,
    fixed_channels,
    fixed_heads,
    output_paths,
    projection_parts,
    require_narrowable,
)

log = logging.getLogger(__name__)

UNITS_FILE = "pruned_units.json"

Biases = Mapping[int, Mapping[str, Tensor]]
"""Layer -> path of a projection in it -> its new bias ``[out]``."""


def staying_units(config: Any) -> dict[str, str]:
    """Return what of each layer cannot be removed -> why, and log it.

    Raises:
        ArchitectureError: neither heads nor channels can be.
    """
    family = architecture_of(config)
    require_narrowable(family)
    _refuse_own_widths(config)
    reasons = {"heads": fixed_heads(family), "channels": fixed_channels(family)}
    stays = {kind: reason for kind, reason in reasons.items() if reason}
    for kind, reason in stays.items():
        log.warning("all %s stay: %s", kind, reason)
    return stays


def _refuse_own_widths(config: Any) -> None:
    reason = ""
    if entries_of(config).get("per_layer_config"):
        reason = "its config gives some layers widths of their own (per_layer_config)"
    elif getattr(config, "num_attention_heads", None) is None:
        reason = "its config gives no number of attention heads"
    if reason:
        raise ArchitectureError(
            f"Heads and channels of this '{config.model_type}' model cannot be removed: {reason}; "
            "use a method that removes layers."
        )


def prunable_units(
    work: Compression, layers: Iterable[int], unit: HeadUnit = "kv_group"
) -> Prunable:
    """Count what each of ``layers`` could lose.

    Raises:
        ArchitectureError: some layers are of another kind (linear attention, dense MLPs), or
            :func:`.prunable` refuses the model.
    """
    family = architecture_of(work.config)
    prefix = f"{layers_prefix(work.reader, family)}.0."
    shapes = {
        name.removeprefix(prefix): work.reader.entry(name).shape
        for name in work.reader.names
        if name.startswith(prefix)
    }
    units = prunable(work.config, unit, shapes)
    _require_parts(work, family, layers)
    return units


def _require_parts(work: Compression, family: Architecture, layers: Iterable[int]) -> None:
    parts = projection_parts(family, LayerWidths.of(work.config, family), work.config)
    prefix, present = layers_prefix(work.reader, family), set(work.reader.names)
    for layer in layers:
        for part in parts:
            if f"{prefix}.{layer}.{part.tensor}" not in present:
                raise ArchitectureError(
                    f"Layer {layer} of this '{family.model_type}' model has no '{part.tensor}', so "
                    "that its heads and channels cannot be removed; use a method that removes "
                    "layers."
                )


def narrowed_checkpoint(
    work: Compression,
    kept: Mapping[int, KeptUnits],
    chosen: Mapping[str, Any],
    tokens: CalibrationTokens | None,
    biases: Biases | None = None,
    stream: Tensor | None = None,
) -> Compressed:
    """Slice the stored weights to the units that stay.

    Args:
        kept: layer -> what it keeps; layers that are not listed keep all.
        chosen: what the method decided.
        biases: of output projections, in place of those that they have.
        stream: channels of the residual stream that stay, in increasing order; None: all.

    Raises:
        ArchitectureError: a family that was inferred computes something else with fewer units, or
            its stream cannot be narrowed.
    """
    family, reader = architecture_of(work.config), work.reader
    before = LayerWidths.of(work.config, family)
    if family.inferred and any(units.widths != before for units in kept.values()):
        kinds = layer_kinds(work.config)
        for layer in {kinds[layer]: layer for layer in kept}.values():
            check_narrowed(work.model, layer, kept[layer])
    prefix = layers_prefix(reader, family)
    added = {
        f"{prefix}.{layer}.{path}.bias": bias
        for layer, of_layer in (biases or {}).items()
        for path, bias in of_layer.items()
    }
    sliced = sliced_tensors(reader, work.config, kept, stream)
    tensors = LazyTensors(
        [*sliced, *added], lambda name: added[name] if name in added else sliced[name]
    )
    depth = depth_of(work.config)
    names = layer_names(reader, family, range(depth))
    unlisted = added.keys() - set(reader.names)

    def flags(layer: int) -> dict[str, bool]:
        has = (f"{prefix}.{layer}.{path}.bias" in unlisted for path in output_paths(family))
        return dict(zip(("output_bias", "down_bias"), has, strict=True))

    widths = {layer: replace(units.widths, **flags(layer)) for layer, units in kept.items()}
    config = narrowed_config(work.config, widths, None if stream is None else len(stream))
    return Compressed(
        config=config_json(config),
        names={new: old for new, old in names.items() if new not in tensors},
        tensors=tensors,
        layers_after=depth,
        chosen={**chosen, "model_type": config.model_type},
        calibration=tokens.summary() if tokens is not None else {},
        artefacts={UNITS_FILE: _removed_units(kept, before, stream, work.config)},
    )


def _removed_units(
    kept: Mapping[int, KeptUnits], before: LayerWidths, stream: Tensor | None, config: Any
) -> str:
    def gone(indices: Tensor, count: int) -> list[int]:
        return sorted(set(range(count)) - set(indices.tolist()))

    removed: dict[str, Any] = {
        str(layer): {
            "heads": gone(units.query, before.num_attention_heads),
            "key_value_heads": gone(units.key_value, before.num_key_value_heads),
            "channels": gone(units.channel, before.intermediate_size),
        }
        for layer, units in kept.items()
    }
    if stream is not None:
        removed["stream"] = gone(stream, int(config.hidden_size))
    return json.dumps(removed) + "\n"
