"""LaCo (arXiv 2402.11187): layers are merged into the layer below them, from the top downwards,
as long as the model's last hidden states keep their direction.

The share of layers is not a knob of LaCo. Here it stops at the wanted depth; without a
``threshold``, the highest one that gets there is found by bisection.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.depth.merge_search import (
    Merge,
    MergeRange,
    MergeRule,
    MergeSearch,
    Mixture,
    merged_mixture,
    require_equal_shapes,
)
from streamline_bench.methods.tools.layer_removal import (
    drop_layers,
    size_plan,
    stored_linear_weights,
)

log = logging.getLogger(__name__)


class LaCoParameters(MergeRange):
    """Parameters of the method ``laco``.

    Attributes:
        merge: ``reference`` (what the authors' code computes: the last merged layer's projections
            take the base's place) or ``rdsc`` (the paper's sum of differences).
        threshold: least cosine at which a merge stays; None: the highest that reaches the size.
        bisections: how finely that one is found (each halves the range from -1 to 1).
        activations_gb: most memory for the dense model's states, in 10^9 bytes.
    """

    merge: MergeRule = "reference"
    threshold: float | None = Field(None, ge=-1, lt=1)
    bisections: int = Field(12, ge=1)
    activations_gb: float = Field(8.0, gt=0)


class LaCo(Method):
    """Layer collapse: merges instead of plain removal."""

    name = "laco"
    passes = frozenset({"merges"})
    streamed = True
    parameters: ClassVar[type[BaseModel]] = LaCoParameters
    seeded = False

    def compress(self, work: Compression) -> Compressed:
        """Search for the merges, then write the merged layers from the stored weights."""
        options = LaCoParameters.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        stored = stored_linear_weights(work.reader, plan.num_layers)
        require_equal_shapes(
            [{n: work.reader.entry(full).shape for n, full in layer.items()} for layer in stored]
        )
        _require_range(options, plan.num_layers)
        tokens = work.tokens(work.recipe.calibration)
        with MergeSearch(
            work.model, tokens, options, options.merge, options.activations_gb, work.work
        ) as search:
            threshold = options.threshold
            if threshold is None:
                threshold = highest_threshold(
                    search, plan.n_layers, options.bisections, progress=work.progress
                )
            merges = search.run(threshold, plan.n_layers)
            trials = search.trials
        removed = _removed(merges)
        if len(removed) < plan.n_layers:
            raise SparsityError(
                f"LaCo with threshold {threshold} removes {len(removed)} layers of the "
                f"{plan.n_layers} asked for; lower it, or leave it out, and it is searched for."
            )
        chosen = {
            "merge": options.merge,
            "threshold": threshold,
            "merges": [dataclasses.asdict(merge) for merge in merges],
            "trials": trials,
        }
        result = drop_layers(work, removed, plan, chosen=chosen, tokens=tokens)
        return _with_merged(work, result, mixtures(merges, options.merge), set(removed), stored)


def highest_threshold(
    search: MergeSearch, n: int, bisections: int = 12, *, progress: bool = True
) -> float:
    """Return the highest threshold found by bisection at which ``n`` layers are merged away.

    Raises:
        SparsityError: not even merging everything in the range removes as many.
    """
    reaching, failing = -1.0, 1.0
    most = len(_removed(search.run(reaching, n)))
    if most < n:
        raise SparsityError(
            f"LaCo can merge away {most} layers in its range, and {n} are asked for; widen lowest "
            "and highest, lower interval, or raise layers_per_merge."
        )
    for _ in tqdm(range(bisections), unit="threshold", desc="laco", delay=2, disable=not progress):
        middle = (reaching + failing) / 2
        if len(_removed(search.run(middle, n))) == n:
            reaching = middle
        else:
            failing = middle
    log.info("LaCo: threshold %.4f", reaching)
    return reaching


def mixtures(merges: Sequence[Merge], rule: MergeRule) -> dict[int, Mixture]:
    """Return base layer -> the mixture of source layers that its projections become."""
    mixed: dict[int, Mixture] = {}
    for merge in merges:
        of = [mixed.get(layer, {layer: 1.0}) for layer in (merge.base, *merge.others)]
        mixed[merge.base] = merged_mixture(of[0], of[1:], rule)
    removed = _removed(merges)
    return {base: mixture for base, mixture in mixed.items() if base not in removed}


def _removed(merges: Sequence[Merge]) -> list[int]:
    return [layer for merge in merges for layer in merge.others]


def _require_range(options: LaCoParameters, num_layers: int) -> None:
    highest = num_layers if options.highest is None else options.highest
    if highest > num_layers:
        raise SparsityError(
            f"LaCo's highest is {highest} and the model has {num_layers} layers; give at most that."
        )
    if options.layers_per_merge > highest - options.lowest:
        raise SparsityError(
            f"LaCo's layers_per_merge is {options.layers_per_merge} and its range, from lowest "
            f"{options.lowest} to highest {highest}, holds {highest - options.lowest} layers; give "
            "at most that."
        )


def _with_merged(
    work: Compression,
    result: Compressed,
    merged: Mapping[int, Mixture],
    removed: set[int],
    stored: Sequence[Mapping[str, str]],
) -> Compressed:
    """Put the merged layers' projections into a result that merely drops layers."""
    prefix = layers_prefix(work.reader, architecture_of(work.config))
    names, tensors = dict(result.names), {}
    for base, mixture in merged.items():
        position = base - sum(layer < base for layer in removed)
        for suffix in stored[base]:
            new = f"{prefix}.{position}.{suffix}"
            sources = {stored[layer][suffix]: share for layer, share in mixture.items() if share}
            if list(sources.values()) == [1.0]:
                names[new] = next(iter(sources))  # one layer's bytes as they are
            else:
                del names[new]
                tensors[new] = _mixed(work.reader, sources)
    return dataclasses.replace(result, names=names, tensors={**result.tensors, **tensors})


def _mixed(reader: CheckpointReader, sources: Mapping[str, float]) -> torch.Tensor:
    """Return the weighted sum of stored tensors: summed in float64, stored in their dtype."""
    first = reader.tensor(next(iter(sources)))
    total = torch.zeros(first.shape, dtype=torch.float64)
    for name, share in sources.items():
        total.add_(reader.tensor(name), alpha=share)
    return total.to(first.dtype)
