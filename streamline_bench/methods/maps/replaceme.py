"""ReplaceMe (arXiv 2505.02819): a removed block becomes a linear map inside the MLP before it.

Layers ``s .. s + n - 1`` are removed. With M the MLP output of layer ``s - 1`` and Y the rest of
the stream there (``h_s = Y + M``), a map A is fitted so that ``M A + Y`` resembles ``h_{s+n}``, and
folded into that MLP's output projection. The result is a stock checkpoint.

Differences from the published implementation: padding is ignored; the least-squares system is
solved by Cholesky with a ridge relative to its diagonal; the target after the last layer is its raw
output, because the folded model applies the final norm itself; every block of several is fitted on
the original model, for the cosine objective too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from streamline_bench.core.architecture import (
    Architecture,
    architecture_of,
    decoder_layers,
    undecided,
)
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.surgery import SizePlan
from streamline_bench.errors import ArchitectureError, SparsityError
from streamline_bench.methods.base import Compressed, Compression, Size
from streamline_bench.methods.maps.mlp_maps import (
    Gap,
    ReplaceMeParameters,
    composed_maps,
    find_gaps,
    fit_maps,
    map_errors,
)
from streamline_bench.methods.tools.layer_removal import drop_layers, size_plan
from streamline_bench.methods.tools.selection import (
    OnSelection,
    Selected,
    cuts_of,
    merge_adjacent,
    non_overlapping,
)
from streamline_bench.methods.tools.shared_scan import scan_once
from streamline_bench.methods.tools.sizes import whole_layers


class ReplaceMe(OnSelection):
    """Every run of removed layers is replaced by a linear map folded into the MLP before it."""

    name = "replaceme"
    passes = frozenset({"maps"})
    streamed = True
    parameters: ClassVar[type[BaseModel]] = ReplaceMeParameters

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield whole layers less, in blocks of equal size; layer 0 stays."""
        blocks = ReplaceMeParameters.model_validate(work.recipe.parameters).blocks
        for size in whole_layers(work, None):
            if size.given["n_layers"] % blocks == 0:
                yield size

    def compress(self, work: Compression) -> Compressed:
        """Scan, choose the blocks, fit their maps on one part of the tokens, fold them."""
        options = ReplaceMeParameters.model_validate(work.recipe.parameters)
        refuse_normed_mlp(architecture_of(work.config))
        plan = size_plan(work)
        if options.selection is None:
            blocks, distances, found = _least_angular(work, options, plan)
        else:
            found = options.selection.select(work, plan)
            blocks, distances = cuts_of(found.layers), []
        tokens = found.tokens or work.tokens(work.recipe.calibration)
        gaps = find_gaps(work, blocks, tokens)
        family, hosts = architecture_of(work.config), {gap.host for gap in gaps}
        targets = {
            host: mlp_output_tensors(work.reader, family, work.model, host) for host in hosts
        }
        fit, held_out = tokens.split(options.validation_share, work.recipe.seed)
        maps, curves = fit_maps(work, gaps, fit, options)
        errors, composed = map_errors(work, gaps, maps, held_out, options.batch_size)
        result = drop_layers(
            work,
            found.layers,
            plan,
            chosen={
                **found.facts,
                "objective": options.objective,
                "blocks": _described(gaps, errors, curves, distances),
                **_described_chains(gaps, composed),
                "tokens_fitted": fit.num_tokens,
                "tokens_held_out": held_out.num_tokens,
            },
            tokens=tokens,
        )
        return _folded(work, result, gaps, maps, targets)


def _least_angular(
    work: Compression, options: ReplaceMeParameters, plan: SizePlan
) -> tuple[list[range], list[float], Selected]:
    """Return the blocks of least angular distance, those distances, and all layers to remove.

    Raises:
        SparsityError: the layers cannot be divided, or fewer blocks fit into the model.
    """
    if plan.n_layers % options.blocks:
        raise SparsityError(
            f"{plan.n_layers} layers cannot be divided into {options.blocks} blocks of equal "
            f"size; choose n_layers as a multiple of {options.blocks}, or other blocks."
        )
    tokens = work.tokens(work.recipe.calibration)
    similarity = scan_once(work, tokens, options.last_state)
    found = non_overlapping(similarity, plan.n_layers // options.blocks, options.blocks, "angular")
    if options.merge_consecutive:
        found = merge_adjacent(found, similarity)
    blocks = [range(block.start, block.stop) for block in found]
    removed = [layer for block in blocks for layer in block]
    return blocks, [block.score for block in found], Selected(removed, {}, tokens)


def _described(
    gaps: list[Gap],
    errors: list[dict[str, float]],
    curves: list[list[float]],
    distances: list[float],
) -> list[dict[str, Any]]:
    """Return what the manifest says of each block; the distances are those of its own search."""
    known = [{"angular_distance": distance} for distance in distances] or [{} for _ in gaps]
    return [
        {
            "start": gap.block.start, "stop": gap.block.stop, **distance,
            "map_in_layer": gap.host, "on_whole_stream": gap.follows,
            "residual_multiplier": gap.scale, "boundary_mse": error,
            **({"loss_per_epoch": curve} if curve else {}),
        }
        for gap, error, curve, distance in zip(gaps, errors, curves, known, strict=True)
    ]  # fmt: skip


def _described_chains(gaps: list[Gap], errors: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Return what the maps of adjacent blocks do together; empty without adjacent blocks."""
    chains = [
        {
            "start": min(gap.block.start for gap in gaps if gap.host == host),
            "stop": max(gap.block.stop for gap in gaps if gap.host == host),
            "map_in_layer": host,
            "boundary_mse": error,
        }
        for host, error in errors.items()
    ]
    return {"composed": chains} if chains else {}


def _folded(
    work: Compression,
    result: Compressed,
    gaps: list[Gap],
    maps: list[Tensor],
    targets: dict[int, dict[str, int]],
) -> Compressed:
    """Return the result with the maps folded into each host's MLP output tensors, in their dtype.

    Computed in float64. A map ``[hidden, hidden]`` is for row vectors (``y A``).
    """
    new_name = {old: new for new, old in result.names.items()}
    tensors = {}
    for host, a in composed_maps(gaps, [a.to("cpu", torch.float64) for a in maps]).items():
        for old, axis in targets[host].items():
            source = work.reader.tensor(old)
            wide = source.to(torch.float64)
            mapped = a.T @ wide if axis == -2 else wide @ a
            tensors[new_name[old]] = mapped.to(source.dtype).contiguous()
    names = {new: old for new, old in result.names.items() if new not in tensors}
    return dataclasses.replace(result, names=names, tensors={**result.tensors, **tensors})


_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPERT_DOWN = ("down_proj", "w2")  # in a file; w2 is Mixtral's name there


def refuse_normed_mlp(family: Architecture) -> None:
    """Refuse families with a norm between the MLP and the residual stream, or with an unknown MLP.

    Raises:
        ArchitectureError: the family is one of them.
    """
    unknown = undecided(family, "mlp" if family.experts else "down", "norms")
    if unknown:
        raise ArchitectureError(
            f"No map can be folded into the MLP of model type '{family.model_type}': {unknown}; "
            "use linear_patch or ridge_map, which put the map after the layer."
        )
    if family.mlp_output_norm:
        raise ArchitectureError(
            f"Model type '{family.model_type}' has a norm ('{family.mlp_output_norm}') between the "
            "MLP and the residual stream, so that a map of the MLP's output cannot be folded into "
            "its weights; use linear_patch or ridge_map, which put the map after the layer."
        )


def mlp_output_tensors(
    reader: CheckpointReader, family: Architecture, model: Any, layer: int
) -> dict[str, int]:
    """Return the tensors that write a layer's MLP output: name -> the axis of the hidden size.

    Args:
        model: the loaded model; it has the number of experts and the layout of fused ones.

    Raises:
        ArchitectureError: they are not where the family keeps them, or are quantised.
    """
    prefix = f"{layers_prefix(reader, family)}.{layer}."
    names = {name[len(prefix) :] for name in reader.names if name.startswith(prefix)}
    mlp = decoder_layers(model)[layer].get_submodule(family.mlp) if family.experts else None
    experts = mlp._modules.get(family.experts) if mlp is not None else None  # None: a dense layer
    found = _dense(family, names) if experts is None else _mixture(names, experts)
    if not found:
        raise ArchitectureError(
            f"Layer {layer} of this '{family.model_type}' checkpoint has no MLP output projection "
            "that a map could be folded into; use linear_patch or ridge_map."
        )
    hidden = int(model.config.hidden_size)
    for name, axis in found.items():
        shape = reader.entry(prefix + name).shape
        if len(shape) == 3 and shape[axis] != hidden:  # Llama 4 stores experts the other way round
            found[name] = -3 - axis
    refuse_quantised(reader, [prefix + name for name in found])
    return {prefix + name: axis for name, axis in sorted(found.items())}


def refuse_quantised(reader: CheckpointReader, names: Iterable[str]) -> None:
    """Refuse tensors into which no factor and no map can be folded.

    Raises:
        ArchitectureError: one of them is quantised.
    """
    for name in names:
        dtype = reader.entry(name).dtype
        if dtype not in _FLOATS:
            raise ArchitectureError(
                f"Tensor {name} is stored as {dtype}; no map can be folded into quantised weights; "
                "give an unquantised checkpoint."
            )


def _dense(family: Architecture, names: set[str]) -> dict[str, int]:
    weight, bias = (
        ".".join(filter(None, (family.mlp, family.down, kind))) for kind in ("weight", "bias")
    )
    if weight not in names:
        return {}
    found = {weight: -1 if family.transposed else -2}
    if bias in names:
        found[bias] = -1
    return found


def _mixture(names: set[str], experts: nn.Module) -> dict[str, int]:
    down = "|".join(_EXPERT_DOWN)
    single = re.compile(rf"(?:.+\.)?experts\.(\d+)\.(?:{down})\.(weight|bias)")
    shared = re.compile(rf"(?:.+\.)?shared_experts?\.(?:{down})\.(weight|bias)")
    fused = re.compile(rf"(?:.+\.)?experts\.(?:{down})(_bias)?")
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name in names:
        if match := single.fullmatch(name):
            seen.add(int(match[1]))
            found[name] = -2 if match[2] == "weight" else -1
        elif match := shared.fullmatch(name):
            found[name] = -2 if match[1] == "weight" else -1
        elif match := fused.fullmatch(name):
            seen.update(range(_count(experts)))
            found[name] = -1 if match[1] or getattr(experts, "is_transposed", False) else -2
    if seen != set(range(_count(experts))):
        return {}
    return found


def _count(experts: nn.Module) -> int:
    count: Any = getattr(experts, "num_experts", None)
    return int(count if count is not None else len(list(experts.children())))
