"""Layers merged into a layer below them, from the top downwards, as long as the model's last hidden
states keep their direction: LaCo (arXiv 2402.11187) and sliding layer merging (arXiv 2502.19159).

The share of layers is no knob of either. Here the search stops at the wanted depth; without a
``threshold``, the highest one that gets there is found by bisection.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Frozen, Recipe
from streamline_bench.core.surgery import SizePlan
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compressed, Compression
from streamline_bench.methods.depth.merge_search import (
    LaCoRange,
    LaCoSearch,
    Merge,
    MergeRange,
    MergeRule,
    MergeSearch,
    Mixture,
    SlidingSearch,
    merged_mixture,
    require_equal_shapes,
)
from streamline_bench.methods.tools.layer_removal import (
    drop_layers,
    size_plan,
    stored_linear_weights,
)
from streamline_bench.methods.tools.selection import LayerSelection, Selected

log = logging.getLogger(__name__)


class MergeParameters(Frozen):
    """Parameters of methods that merge layers.

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


@dataclasses.dataclass(frozen=True)
class _Found:
    """Merges, the least cosine at which each stayed, how many were tried, and stored names."""

    merges: Sequence[Merge]
    threshold: float
    trials: int
    tokens: CalibrationTokens
    stored: Sequence[Mapping[str, str]]


class LayerMerging(LayerSelection):
    """A method that searches for merges and writes the merged layers.

    As another method's ``selection`` it gives the layers that are merged away; what they were
    merged into stays as it was.
    """

    passes = frozenset({"merges"})
    streamed = True
    seeded = False

    @abstractmethod
    def check_range(self, options: Any, depth: int) -> None:
        """Refuse parameters that do not suit the number of layers (SparsityError)."""

    @abstractmethod
    def search(
        self, work: Compression, options: Any, tokens: CalibrationTokens, depth: int
    ) -> MergeSearch[Any]:
        """Return the search, not yet entered."""

    def parts(self, recipe: Recipe) -> tuple[str, str]:
        """The layers merged away, and what they are merged into."""
        return self.words(self.parameters.model_validate(recipe.parameters)), "merged layers"

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        """Search for the merges and return the layers that they remove."""
        return self._selected(self._merges(work, options, plan), options)

    def compress(self, work: Compression) -> Compressed:
        """Search for the merges, then write the merged layers from the stored weights."""
        options: Any = self.parameters.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        found = self._merges(work, options, plan)
        chosen = self._selected(found, options)
        result = drop_layers(work, chosen.layers, plan, chosen=chosen.facts, tokens=chosen.tokens)
        mixed = mixtures(found.merges, options.merge)
        return _with_merged(work, result, mixed, set(chosen.layers), found.stored)

    def _merges(self, work: Compression, options: Any, plan: SizePlan) -> _Found:
        """Search, at the threshold given or the highest that gets there.

        Raises:
            SparsityError: the threshold, or the range, does not reach the size.
        """
        stored = stored_linear_weights(work.reader, plan.num_layers)
        require_equal_shapes(
            [{n: work.reader.entry(full).shape for n, full in layer.items()} for layer in stored]
        )
        self.check_range(options, plan.num_layers)
        tokens = work.tokens(work.recipe.calibration)
        with self.search(work, options, tokens, plan.num_layers) as search:
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
                f"Merging with threshold {threshold} removes {len(removed)} layers of the "
                f"{plan.n_layers} asked for; lower it, or leave it out, and it is searched for."
            )
        return _Found(merges, threshold, trials, tokens, stored)

    def _selected(self, found: _Found, options: Any) -> Selected:
        facts = {
            "merge": options.merge,
            "threshold": found.threshold,
            "merges": [dataclasses.asdict(merge) for merge in found.merges],
            "trials": found.trials,
        }
        return Selected(_removed(found.merges), facts, found.tokens)


class LaCoParameters(LaCoRange, MergeParameters):
    """Parameters of the method ``laco``."""


class LaCo(LayerMerging):
    """Layer collapse: equally many layers merged each time."""

    name = "laco"
    parameters: ClassVar[type[BaseModel]] = LaCoParameters

    def check_range(self, options: Any, depth: int) -> None:
        """Refuse a range that leaves the model or is smaller than a merge."""
        highest = depth if options.highest is None else options.highest
        if highest > depth:
            raise SparsityError(
                f"LaCo's highest is {highest} and the model has {depth} layers; give at most that."
            )
        if options.layers_per_merge > highest - options.lowest:
            raise SparsityError(
                f"LaCo's layers_per_merge is {options.layers_per_merge} and its range, from lowest "
                f"{options.lowest} to highest {highest}, holds {highest - options.lowest} layers; "
                "give at most that."
            )

    def search(
        self, work: Compression, options: Any, tokens: CalibrationTokens, depth: int
    ) -> LaCoSearch:
        """LaCo's own."""
        return LaCoSearch(
            work.model, tokens, options, options.merge, options.activations_gb, work.work
        )


class SlidingMergeParameters(MergeParameters):
    """Parameters of the method ``sliding_merge``.

    Attributes:
        protect_first, protect_last: the first and the last so many layers are left as they are;
            the authors' code leaves the last one.
    """

    protect_first: int = Field(0, ge=0)
    protect_last: int = Field(1, ge=0)


class SlidingMerge(LayerMerging):
    """Windows of neighbours merged into one, each as long as the threshold lets it grow."""

    name = "sliding_merge"
    parameters: ClassVar[type[BaseModel]] = SlidingMergeParameters

    def check_range(self, options: Any, depth: int) -> None:
        """Refuse a range without two layers."""
        if depth - options.protect_last - options.protect_first < 2:
            raise SparsityError(
                f"With protect_first={options.protect_first} and "
                f"protect_last={options.protect_last} no two of {depth} layers can be merged; "
                "protect fewer layers."
            )

    def search(
        self, work: Compression, options: Any, tokens: CalibrationTokens, depth: int
    ) -> SlidingSearch:
        """Windows among the layers that are not protected."""
        span = MergeRange(lowest=options.protect_first, highest=depth - options.protect_last)
        return SlidingSearch(
            work.model, tokens, span, options.merge, options.activations_gb, work.work
        )


def highest_threshold(
    search: MergeSearch[Any], n: int, bisections: int = 12, *, progress: bool = True
) -> float:
    """Return the highest threshold found by bisection at which ``n`` layers are merged away.

    Raises:
        SparsityError: not even merging everything in the range removes as many.
    """
    reaching, failing = -1.0, 1.0
    most = len(_removed(search.run(reaching, n)))
    if most < n:
        raise SparsityError(
            f"The search can merge away {most} layers in its range, and {n} are asked for; widen "
            "the range (lowest, highest or protect_first, protect_last), or let LaCo merge more "
            "layers (layers_per_merge, interval)."
        )
    for _ in tqdm(
        range(bisections), unit="threshold", desc="merges", delay=2, disable=not progress
    ):
        middle = (reaching + failing) / 2
        if len(_removed(search.run(middle, n))) == n:
            reaching = middle
        else:
            failing = middle
    log.info("merges: threshold %.4f", reaching)
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
