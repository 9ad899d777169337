"""What the methods share that only drop layers: size, and the checkpoint that remains."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layer_names, layers_prefix
from streamline_bench.core.surgery.layers import pruned_config
from streamline_bench.core.surgery.sparsity import SizePlan, layers_for_sparsity, of_layers
from streamline_bench.methods.base import Compressed, Compression

if TYPE_CHECKING:
    from streamline_bench.core.data.calibration import CalibrationTokens

__all__ = [
    "config_json",
    "drop_layers",
    "is_linear_weight",
    "size_plan",
    "stored_linear_weights",
    "untied_head_parameters",
]


def size_plan(work: Compression, added_parameters: int = 0) -> SizePlan:
    """Return how many layers the recipe's sparsity (or number of layers) amounts to.

    Args:
        added_parameters: what a replacement puts in; a head that the recovery unties is counted
            here.

    Raises:
        SparsityError: out of range, or out of reach for this model.
    """
    return layers_for_sparsity(
        work.reader,
        work.recipe.sparsity,
        n_layers=work.recipe.n_layers,
        added_parameters=added_parameters + untied_head_parameters(work),
    )


def untied_head_parameters(work: Compression) -> int:
    """Return how many parameters the recipe's recovery adds, which may give a tied head its own.

    Partial fine-tuning trains the LM head and leaves the embeddings alone.
    """
    recovery = work.recipe.recovery
    row = architecture_of(work.config)
    head = f"{row.stored_as.get(row.lm_head, row.lm_head)}.weight"
    if recovery is None or recovery.kind != "partial" or head in work.reader.parameter_names:
        return 0
    path = f"{row.embeddings[0]}.weight"
    # A checkpoint of the bare base model leaves the base's name out.
    name = path if path in work.reader.names else path.removeprefix(f"{row.base}.")
    return work.reader.entry(name).numel


def drop_layers(
    work: Compression,
    removed: Sequence[int],
    plan: SizePlan,
    *,
    chosen: Mapping[str, Any],
    tokens: CalibrationTokens | None = None,
    artefacts: Mapping[str, str] | None = None,
) -> Compressed:
    """Return the result of dropping ``removed`` and changing nothing else.

    Args:
        removed: layer indices of the source, in any order.
        plan: from :func:`size_plan`; recorded.
        chosen: what the method decided (scores, order, …); recorded.
        tokens: what it looked at.
        artefacts: file name -> text to lay beside the weights.
    """
    gone = sorted(set(removed))
    depth = work.config.num_hidden_layers
    keep = [index for index in range(depth) if index not in gone]
    return Compressed(
        config=config_json(pruned_config(work.config, keep)),
        names=layer_names(work.reader, architecture_of(work.config), keep),
        layers_after=len(keep),
        chosen={
            "removed_layers": gone,
            **chosen,
            "size": asdict(of_layers(plan, work.reader, gone)),
        },
        calibration=tokens.summary() if tokens is not None else {},
        artefacts=artefacts or {},
    )


def config_json(config: Any) -> dict[str, Any]:
    """Return a transformers config as the mapping that ``config.json`` holds."""
    parsed: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return parsed


def is_linear_weight(name: str, dimensions: int) -> bool:
    """Whether a tensor of a decoder layer is a projection's weight.

    Those have two dimensions, or three where experts are fused; norms have one. Biases are left
    out by name: fused experts have two-dimensional ones.
    """
    return dimensions >= 2 and not name.endswith("bias")


def stored_linear_weights(reader: CheckpointReader, num_layers: int) -> list[dict[str, str]]:
    """Return, for each of the decoder's layers, name within the layer -> name in the checkpoint.

    Layers beyond the decoder (multi-token prediction) are not listed.
    """
    row = architecture_of(reader.config)
    pattern = re.compile(re.escape(layers_prefix(reader, row)) + r"\.(\d+)\.(.+)")
    layers: list[dict[str, str]] = [{} for _ in range(num_layers)]
    for name in reader.names:
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) >= len(layers) or name.endswith(row.buffers):
            continue
        if is_linear_weight(name, len(reader.entry(name).shape)):
            layers[int(match[1])][match[2]] = name
    return layers
