"""What the methods share that only drop layers: size, and the checkpoint that remains."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.quantization import MODELOPT_NAME, renumbered
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layer_dtype, layer_names, layers_prefix
from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.surgery.layers import pruned_config
from streamline_bench.core.surgery.sparsity import SizePlan, layers_for_sparsity, of_layers
from streamline_bench.methods.base import Compressed, Compression
from streamline_bench.methods.tools.layer_selection import (
    ProtectedEnds,
    scan_artefact,
    select_lowest,
)

if TYPE_CHECKING:
    from torch import Tensor

    from streamline_bench.core.data.calibration import CalibrationTokens


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
    family = architecture_of(work.config)
    head = f"{family.stored_as.get(family.lm_head, family.lm_head)}.weight"
    if recovery is None or recovery.kind != "partial" or head in work.reader.parameter_names:
        return 0
    path = f"{family.embeddings[0]}.weight"
    # A checkpoint of the bare base model leaves the base's name out.
    name = path if path in work.reader.names else path.removeprefix(f"{family.base}.")
    return work.reader.entry(name).numel


def drop_layers(
    work: Compression,
    removed: Sequence[int],
    plan: SizePlan,
    *,
    chosen: Mapping[str, Any],
    tokens: CalibrationTokens | None = None,
) -> Compressed:
    """Return the result of dropping ``removed`` and changing nothing else.

    Args:
        removed: layer indices of the source, in any order.
        plan: from :func:`size_plan`; recorded.
        chosen: what the method decided (scores, order, …); recorded.
        tokens: what it looked at.
    """
    gone = sorted(set(removed))
    depth = work.config.num_hidden_layers
    keep = [index for index in range(depth) if index not in gone]
    size = asdict(of_layers(plan, work.reader, gone))
    return Compressed(
        config=config_json(pruned_config(work.config, keep)),
        names=layer_names(work.reader, architecture_of(work.config), keep),
        layers_after=len(keep),
        chosen={"removed_layers": gone, **chosen, "size": size},
        calibration=tokens.summary() if tokens is not None else {},
        artefacts={**scan_artefact(work), **_modelopt_file(work, keep)},
    )


def drop_lowest(
    work: Compression,
    plan: SizePlan,
    scores: Mapping[int, float],
    candidates: range,
    what: str,
    tokens: CalibrationTokens | None = None,
    **chosen: Any,
) -> Compressed:
    """Return the result of dropping the layers of lowest score.

    Args:
        scores: of the candidates at least; recorded.
        candidates: the layers that may be removed.
        what: what the score is; recorded.
    """
    removed = select_lowest({layer: scores[layer] for layer in candidates}, plan.n_layers)
    chosen = {
        "score": what,
        "order": removed,
        "scores": {str(layer): float(score) for layer, score in scores.items()},
        "protected": ProtectedEnds.protected(candidates, plan.num_layers),
        **chosen,
    }
    return drop_layers(work, removed, plan, chosen=chosen, tokens=tokens)


def attached(
    work: Compression, start: int, config: Any, spec: ReplacementSpec, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of a network in the place of a removed block.

    Args:
        start: first layer of the block.
        config: of the model without the block.
        state: tensors of the network by name.
    """
    from streamline_bench.modeling import Attachment, streamline_config

    family = architecture_of(work.config)
    attachment = Attachment.of(spec, work.config, start - 1)
    layers = layers_prefix(work.reader, family)
    prefix = attachment.tensor_prefix(config).replace(family.layers, layers, 1)
    tensors = {prefix + name: tensor for name, tensor in state.items()}
    return config_json(streamline_config(config, [attachment])), as_stored(work, start, tensors)


def as_stored(work: Compression, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast tensors to the dtype in which the source stores a layer."""
    dtype = layer_dtype(work.reader, architecture_of(work.config), layer)
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def _modelopt_file(work: Compression, keep: Sequence[int]) -> dict[str, str]:
    """Return the settings that modelopt keeps in a file of its own, for the layers that stay."""
    path = work.folder / MODELOPT_NAME
    if not path.is_file():
        return {}
    settings = json.loads(path.read_text(encoding="utf-8"))
    return {MODELOPT_NAME: json.dumps(renumbered(settings, keep), indent=4) + "\n"}


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
    family = architecture_of(reader.config)
    pattern = re.compile(re.escape(layers_prefix(reader, family)) + r"\.(\d+)\.(.+)")
    layers: list[dict[str, str]] = [{} for _ in range(num_layers)]
    for name in reader.names:
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) >= len(layers) or name.endswith(family.buffers):
            continue
        if is_linear_weight(name, len(reader.entry(name).shape)):
            layers[int(match[1])][match[2]] = name
    return layers
