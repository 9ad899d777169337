"""What methods share that remove layers: how many, and the checkpoint that remains."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streamline_bench.core.architecture import architecture_of, config_of, depth_of
from streamline_bench.core.architecture_guard import facts_of, tensors_by_layer
from streamline_bench.core.checkpoint.quantization import MODELOPT_NAME, renumbered
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layer_dtype, layer_names, layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.surgery import (
    SizePlan,
    layers_for_sparsity,
    of_layers,
    pruned_config,
)
from streamline_bench.methods.base import Compressed, Compression
from streamline_bench.methods.tools.shared_scan import SIMILARITY_FILE
from streamline_bench.methods.tools.task_questions import SEARCHED_FILE

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def size_plan(work: Compression, added_parameters: int = 0) -> SizePlan:
    """Return how many layers the recipe's sparsity (or number of layers) amounts to.

    Args:
        added_parameters: what a replacement puts in.

    Raises:
        SparsityError: out of range, or out of reach for this model.
    """
    return layers_for_sparsity(
        work.reader,
        work.recipe.sparsity,
        n_layers=work.recipe.n_layers,
        added_parameters=added_parameters,
    )


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
    keep = [index for index in range(depth_of(work.config)) if index not in gone]
    size = asdict(of_layers(plan, work.reader, gone))
    family = architecture_of(work.config)
    pruned = pruned_config(work.config, keep)
    names = {**layer_names(work.reader, family, keep), **_shared_names(work, keep)}
    tensors = _of_kept_layers(work, pruned, keep)
    return Compressed(
        config=config_json(pruned),
        names={new: old for new, old in names.items() if new not in tensors},
        tensors=tensors,
        layers_after=len(keep),
        chosen={"removed_layers": gone, **chosen, "size": size},
        calibration=tokens.summary() if tokens is not None else {},
        artefacts=_files(work, keep),
    )


def _of_kept_layers(work: Compression, pruned: Any, keep: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors outside the layers that have a part for each, with those that stay."""
    import torch

    family = architecture_of(work.config)
    found: dict[str, Tensor] = {}
    for name, dimension in tensors_by_layer(work.config, pruned, family).items():
        bare = name.removeprefix(f"{family.base}.")
        stored = name if name in work.reader.names else bare
        if stored in work.reader.names:
            parts = work.reader.tensor(stored).chunk(depth_of(work.config), dimension)
            found[stored] = torch.cat([parts[index] for index in keep], dimension)
    return found


def _shared_names(work: Compression, keep: Sequence[int]) -> dict[str, str]:
    """Return new name -> old one of weights that a removed layer holds for others, too."""
    family = architecture_of(work.config)
    prefix, names = layers_prefix(work.reader, family), set(work.reader.names)
    found: dict[str, str] = {}
    shared = facts_of(work.config, family).shared
    for place, index in enumerate(keep):
        for name, holder in shared[index].items():
            old = f"{prefix}.{holder}.{name}"
            if holder not in keep and old in names and old not in found.values():
                found[f"{prefix}.{place}.{name}"] = old
    return found


def attached(
    work: Compression,
    cuts: Sequence[range],
    spec: ReplacementSpec,
    states: Sequence[Mapping[str, Tensor]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of networks in the place of removed layers.

    Args:
        cuts: the removed layers, by run of neighbours.
        states: for each cut, tensors of its network by name.
    """
    from streamline_bench.modeling import Attachment, streamline_config

    family = architecture_of(work.config)
    gone = {layer for cut in cuts for layer in cut}
    keep = [layer for layer in range(depth_of(work.config)) if layer not in gone]
    config, layers = pruned_config(work.config, keep), layers_prefix(work.reader, family)
    attachments, tensors = [], {}
    for cut, state in zip(cuts, states, strict=True):
        before = sum(layer < cut.start for layer in keep)
        attachment = Attachment.of(spec, work.config, before - 1)
        attachments.append(attachment)
        prefix = attachment.tensor_prefix(config).replace(family.layers, layers, 1)
        own = {prefix + name: tensor for name, tensor in state.items()}
        tensors.update(as_stored(work, cut.start, own))
    return config_json(streamline_config(config, attachments)), tensors


def as_stored(work: Compression, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast tensors to the dtype in which the source stores a layer."""
    dtype = layer_dtype(work.reader, architecture_of(work.config), layer)
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def _files(work: Compression, keep: Sequence[int]) -> dict[str, str]:
    """Return the scan, the documents searched, and modelopt's file of settings, where they are.

    The settings are those of the layers that stay.
    """
    modelopt, found = work.folder / MODELOPT_NAME, {}
    for name in (SIMILARITY_FILE, SEARCHED_FILE):
        if (work.work / name).exists():
            found[name] = (work.work / name).read_text(encoding="utf-8")
    if modelopt.is_file():
        settings = json.loads(modelopt.read_text(encoding="utf-8"))
        wrapper = work.reader.wrapper
        if wrapper is None:
            settings = renumbered(settings, keep)
        else:  # which names layers of towers as well
            settings = wrapper.outer_settings(
                renumbered(wrapper.text_settings(settings), keep), settings
            )
        found[MODELOPT_NAME] = json.dumps(settings, indent=4) + "\n"
    return found


def config_json(config: Any) -> dict[str, Any]:
    """Return a transformers config as the mapping that ``config.json`` holds.

    Entries that transformers 5 calls otherwise have their older names as well, so that other
    readers find them, unless transformers 5 would then read another config.
    """
    parsed: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    kind = type(config)

    def read(entries: Mapping[str, Any]) -> Any:
        return config_of(kind, entries).to_dict()

    expected = read(parsed)
    for key, value in _older_names(parsed).items():
        both = {key: value, **parsed}
        # Some configs take one of the two names only.
        with suppress(TypeError, ValueError, KeyError, AttributeError):
            parsed = both if read(both) == expected else parsed
    return parsed


def _older_names(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config that older versions of transformers call otherwise."""
    found = {"torch_dtype": parsed["dtype"]} if parsed.get("dtype") else {}
    rope = parsed.get("rope_parameters") or {}
    if isinstance(rope.get("full_attention"), Mapping):  # settings per kind of layer
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    found |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    return found


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
