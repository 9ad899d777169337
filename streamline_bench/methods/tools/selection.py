"""Which layers are removed: from one score per layer, as a block, or as another method chooses.

The methods of removal are each one way to choose. A method that puts something in the place of
the removed layers takes any of them by its parameter ``selection``.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field, model_validator

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Frozen, Recipe
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.core.similarity import Block, LastState, Metric, Similarity
from streamline_bench.core.surgery import SizePlan, block_keep
from streamline_bench.errors import NumericsError, RecipeError, SparsityError
from streamline_bench.methods.base import (
    METHODS,
    Compressed,
    Compression,
    Method,
    get_method,
    in_words,
)
from streamline_bench.methods.tools.layer_removal import drop_layers, size_plan
from streamline_bench.methods.tools.shared_scan import scan_once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selected:
    """The layers that a method removes.

    Attributes:
        layers: indices of layers of the source, in any order.
        facts: how they were chosen, for the manifest.
        tokens: the calibration tokens that were looked at, if any were.
    """

    layers: Sequence[int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    tokens: CalibrationTokens | None = None


class LayerSelection(Method):
    """A method that removes layers and changes nothing else."""

    @abstractmethod
    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        """Return the ``plan.n_layers`` layers to remove.

        Args:
            options: the parameters, as :attr:`parameters`.
        """

    def parts(self, recipe: Recipe) -> tuple[str, str] | None:
        """The method itself, and no patch."""
        return self.words(self.parameters.model_validate(recipe.parameters)), "none"

    def words(self, options: Any) -> str:
        """The choice of layers in words."""
        return in_words(self.name, options)

    def cuts(self, options: Any) -> int | None:
        """How many runs of neighbours are removed; None: it is not known before."""
        return None

    def compress(self, work: Compression) -> Compressed:
        """Choose the layers and drop them."""
        plan = size_plan(work)
        options = self.parameters.model_validate(work.recipe.parameters)
        found = self.select(work, options, plan)
        return drop_layers(work, found.layers, plan, chosen=found.facts, tokens=found.tokens)


class SelectionSpec(Frozen):
    """Another method that chooses the layers, by its name, or with parameters of its own.

    Attributes:
        method: a method that removes layers and changes nothing else, such as ``sleb``.
        parameters: of that method.
    """

    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, payload: Any) -> Any:
        return {"method": payload} if isinstance(payload, str) else payload

    @model_validator(mode="after")
    def _selects(self) -> SelectionSpec:
        try:
            self.selector.parameters.model_validate(self.parameters)
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def selector(self) -> LayerSelection:
        """The method.

        Raises:
            RecipeError: it does not merely remove layers, or there is no such method.
        """
        method = get_method(self.method)
        if isinstance(method, LayerSelection):
            return method
        known = [name for name in METHODS if isinstance(get_method(name), LayerSelection)]
        raise RecipeError(
            f"method '{self.method}' does more than choose layers, so that it cannot be a "
            f"selection{suggest_or_list(self.method, known)}"
        )

    @property
    def options(self) -> Any:
        """The parameters, as the method's own schema has them."""
        return self.selector.parameters.model_validate(self.parameters)

    def select(self, work: Compression, plan: SizePlan) -> Selected:
        """Return what the method chooses, its name among the facts."""
        found = self.selector.select(work, self.options, plan)
        facts = {"method": self.method, **found.facts}
        return Selected(found.layers, facts, found.tokens)


def cuts_of(layers: Sequence[int]) -> list[range]:
    """Return the runs of neighbours among some layers, in order."""
    runs: list[range] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1].stop == layer:
            runs[-1] = range(runs[-1].start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    return runs


def proportional_ends(depth: int) -> tuple[int, int]:
    """Return how many layers at either end stay: 4 and 2 of 32 or more, in proportion below."""
    return min(4, math.ceil(depth / 8)), min(2, math.ceil(depth / 16))


class ProtectedEnds(Frozen):
    """Parameters of methods that leave the ends of the model alone.

    Attributes:
        protect_first: the first so many layers are never removed.
        protect_last: the last so many layers are never removed.

    None is in proportion to the depth, see :func:`proportional_ends`, and gives way, the last
    layers first, where more layers have to be removed than that leaves.
    """

    protect_first: int | None = Field(0, ge=0)
    protect_last: int | None = Field(0, ge=0)

    def most(self, num_layers: int) -> int:
        """Return how many layers may be removed."""
        return num_layers - (self.protect_first or 0) - (self.protect_last or 0)

    def candidates(self, num_layers: int, n: int) -> range:
        """Return the layers that may be removed, and log which may not.

        Raises:
            SparsityError: they are fewer than the ``n`` to remove.
        """
        first, last = proportional_ends(num_layers)
        spare = max(0, num_layers - n)
        first = min(first, spare) if self.protect_first is None else self.protect_first
        last = min(last, max(0, spare - first)) if self.protect_last is None else self.protect_last
        allowed = range(first, num_layers - last)
        if len(allowed) < n:
            raise SparsityError(
                f"Cannot remove {n} of {num_layers} layers: with protect_first={first} and "
                f"protect_last={last} only {len(allowed)} are unprotected; protect fewer layers or "
                "remove fewer."
            )
        if first or last:
            log.info(
                "protected: the first %d and the last %d of %d layers", first, last, num_layers
            )
        if len(allowed) == n:
            log.warning(
                "All %d unprotected layers are removed, so that the scores decide nothing; "
                "protect fewer layers or remove fewer.",
                n,
            )
        return allowed

    @staticmethod
    def protected(candidates: range, num_layers: int) -> dict[str, int]:
        """Return for the manifest how many layers at each end were protected."""
        return {"first": candidates.start, "last": num_layers - candidates.stop}


def select_lowest(scores: Mapping[int, float], n: int) -> list[int]:
    """Return the ``n`` layers of lowest score, lowest first; of equals the shallower first.

    Raises:
        NumericsError: a score is NaN or infinite; the layer is named.
        SparsityError: there are fewer than ``n`` layers.
    """
    for layer, score in scores.items():
        if not math.isfinite(score):
            raise NumericsError(
                f"The score of layer {layer} is {score}; check the weights, or try another dtype."
            )
    if n > len(scores):
        raise SparsityError(f"Cannot remove {n} of {len(scores)} scored layers; remove fewer.")
    return sorted(scores, key=lambda layer: (scores[layer], layer))[:n]


class RankedLayers(LayerSelection):
    """A method that gives each layer one score and drops the layers of the lowest scores."""

    parameters: ClassVar[type[BaseModel]] = ProtectedEnds

    @abstractmethod
    def scores(
        self, work: Compression, options: Any, candidates: range, tokens: CalibrationTokens | None
    ) -> tuple[Mapping[str, Any], Mapping[int, float]]:
        """Return facts about the score, for the manifest, and layer -> score.

        Args:
            options: the parameters, as :attr:`parameters`.
            candidates: the layers that may be removed; each needs a score.
            tokens: calibration tokens; None if the method is not ``calibrated``.
        """

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        """Score the layers and take the lowest."""
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        tokens = work.tokens(work.recipe.calibration) if self.calibrated else None
        facts, scores = self.scores(work, options, candidates, tokens)
        removed = select_lowest({layer: scores[layer] for layer in candidates}, plan.n_layers)
        chosen = {
            **facts,
            "order": removed,
            "scores": {str(layer): float(score) for layer, score in scores.items()},
            "protected": options.protected(candidates, plan.num_layers),
        }
        return Selected(removed, chosen, tokens)


class BlockSearch(Frozen):
    """Parameters of methods that replace one block of layers.

    Attributes:
        metric: how blocks are ranked: mean cosine of all tokens, or the angular distance of the
            last token.
        last_state: the state after the last layer, ``raw`` or after the final norm (as
            implementations that read ``output_hidden_states`` take it).
        start: take the block that starts at this layer instead of searching for it.
        allow_first_layer: let the block contain layer 0. No paper's rule forbids it, and on large
            models it never happens; on small ones it ruins the model.
    """

    metric: Metric = "cosine"
    last_state: LastState = "raw"
    start: int | None = Field(None, ge=0)
    allow_first_layer: bool = False

    def most(self, num_layers: int) -> int:
        """Return how many layers may be removed."""
        return num_layers - (not self.allow_first_layer if self.start is None else self.start)

    def choose(self, similarity: Similarity, n: int) -> Block:
        """Return the block of ``n`` layers.

        Raises:
            SparsityError: it leaves the model.
        """
        if self.start is None:
            allow = self.allow_first_layer
            block = similarity.best_block(n, metric=self.metric, allow_first_layer=allow)
        else:
            block = block_at(similarity, self.start, n, self.metric)
        log.info("block: layers %d to %d", block.start, block.stop - 1)
        return block


def block_at(similarity: Similarity, start: int, n: int, metric: Metric) -> Block:
    """Return the block of ``n`` layers that the user asked for, with its score.

    Raises:
        SparsityError: it leaves the model.
    """
    block_keep(similarity.num_layers, start, n)
    return Block(start, n, float(similarity.scores(n, metric)[start]), metric)


def non_overlapping(similarity: Similarity, n: int, count: int, metric: Metric) -> list[Block]:
    """Return ``count`` blocks of ``n`` layers, taken greedily best first, ordered by place.

    Layer 0 is never part of one (ReplaceMe, arXiv 2505.02819: distances begin at ``h_1``).

    Raises:
        SparsityError: fewer blocks fit into the model.
    """
    scores = similarity.scores(n, metric)
    costs: Any = -scores if metric == "cosine" else scores
    taken: list[Block] = []
    for start in 1 + np.argsort(costs[1:], kind="stable"):
        if len(taken) < count and all(start + n <= b.start or start >= b.stop for b in taken):
            taken.append(Block(int(start), n, float(scores[start]), metric))
    if len(taken) < count:
        raise SparsityError(
            f"{similarity.num_layers} layers hold only {len(taken)} of {count} separate blocks of "
            f"{n} layers (layer 0 stays); take fewer blocks or remove fewer layers."
        )
    return sorted(taken, key=lambda block: block.start)


def merge_adjacent(blocks: list[Block], similarity: Similarity) -> list[Block]:
    """Return the blocks with neighbours joined into one; scores are those of the joined ends."""
    merged: list[Block] = []
    for block in blocks:
        if merged and merged[-1].stop == block.start:
            joined = merged.pop()
            block = block_at(similarity, joined.start, joined.n + block.n, block.metric)
        merged.append(block)
    return merged


class SelectedBy(Frozen):
    """Parameters of methods that let another method choose the layers.

    Attributes:
        selection: the method that chooses the layers, by name or with ``method`` and
            ``parameters``; None: the method's own way.
    """

    selection: SelectionSpec | None = None

    def words(self) -> str:
        """The choice of layers in words."""
        chosen = self.selection
        return "" if chosen is None else chosen.selector.words(chosen.options)

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """The method that chooses the layers, if it is another one, and those that it uses."""
        chosen = self.selection
        if chosen is None:
            return ()
        return (chosen.method, *chosen.selector.uses(chosen.parameters))

    @property
    def streamed(self) -> bool:
        """Whether the layers can be chosen with a streamed model."""
        return self.selection is None or self.selection.selector.streamed

    @property
    def seeded(self) -> bool:
        """Whether the choice of layers reads the seed."""
        chosen = self.selection
        return chosen is not None and chosen.selector.reads_seed(chosen.parameters)

    @property
    def calibrated(self) -> bool:
        """Whether the choice of layers reads calibration text."""
        chosen = self.selection
        return chosen is None or chosen.selector.reads_calibration(chosen.parameters)


class AnySelection(BlockSearch, SelectedBy):
    """Parameters of methods that work with any choice of layers.

    Without ``selection``, the block whose ends are most alike is removed.
    """

    @model_validator(mode="after")
    def _one_choice(self) -> AnySelection:
        if self.selection is not None and self.start is not None:
            raise ValueError("give start or selection, not both")
        return self

    def words(self) -> str:
        """The choice of layers in words."""
        others = type(self).model_fields.keys() - BlockSearch.model_fields.keys()
        return super().words() or in_words(f"{self.metric} block", self, {"metric", *others})

    def most(self, num_layers: int) -> int:
        """Return how many layers may be removed."""
        if self.selection is None:
            return super().most(num_layers)
        options = self.selection.selector.parameters.model_validate(self.selection.parameters)
        return int(getattr(options, "most", lambda depth: depth)(num_layers))

    def most_cuts(self, num_layers: int, n: int, new: int = 0) -> int:
        """Return into how many runs removed layers fall apart at most.

        Args:
            n: layers fewer than before.
            new: layers that come in the place of each run; so many more are removed.
        """
        known = self._known_cuts
        return known if known is not None else max(1, min(n, (num_layers - n + 1) // (new + 1)))

    def select(self, work: Compression, plan: SizePlan) -> Selected:
        """Return the layers to remove."""
        if self.selection is not None:
            return self.selection.select(work, plan)
        tokens = work.tokens(work.recipe.calibration)
        block = self.choose(scan_once(work, tokens, self.last_state), plan.n_layers)
        facts = {"start": block.start, "score": block.score, "metric": block.metric}
        return Selected(range(block.start, block.stop), facts, tokens)

    def with_networks(self, work: Compression, parameters: int) -> tuple[SizePlan, Selected]:
        """Return size and layers where every run of removed layers gets a network.

        Args:
            parameters: of one network. More layers are removed where they take up much.
        """
        networks, needed = 0, self.cuts
        while needed > networks:
            networks = needed
            plan = size_plan(work, networks * parameters)
            found = self.select(work, plan)
            needed = len(cuts_of(found.layers))
        return replace(plan, added_parameters=needed * parameters), found

    def with_new_layers(self, work: Compression, new: int) -> tuple[SizePlan, Selected]:
        """Return size and layers where every run of removed layers gets ``new`` other ones.

        So many more are removed. How many runs there are depends on how many layers go: the number
        of runs that was found is tried until it stays.

        Raises:
            SparsityError: there are too few layers, a run is no longer than what it would get, or
                no number of runs stays.
        """
        plan, cuts, tried = size_plan(work), self.cuts, list[int]()
        while cuts not in tried:
            tried.append(cuts)
            total = plan.n_layers + cuts * new
            if total > plan.num_layers:
                raise SparsityError(
                    f"Removing {plan.n_layers} layers and replacing {cuts * new} more needs "
                    f"{total} layers, and the model has {plan.num_layers}; remove fewer."
                )
            found = self.select(work, replace(plan, n_layers=total))
            runs = cuts_of(found.layers)
            if len(runs) == cuts:
                _refuse_short(runs, new)
                return plan, found
            cuts = len(runs)
        raise SparsityError(
            f"No choice of layers makes the model {plan.n_layers} layers smaller with {new} new in "
            f"the place of each run of removed ones ({', '.join(map(str, tried))} runs were "
            "tried); take another n_layers, or a network that is no layer."
        )

    @property
    def cuts(self) -> int:
        """How many runs of neighbours are removed, as far as that is known before; else 1."""
        return self._known_cuts or 1

    @property
    def _known_cuts(self) -> int | None:
        chosen = self.selection
        return 1 if chosen is None else chosen.selector.cuts(chosen.options)


def _refuse_short(runs: Sequence[range], new: int) -> None:
    for run in runs:
        if len(run) <= new:
            raise SparsityError(
                f"Of layers {run.start} to {run.stop - 1}, {len(run)} in number, {new} would be "
                "put back, so that nothing is removed there; take a selection of longer blocks, "
                "fewer replacement.layers, or a network that is no layer."
            )


class OnSelection(Method):
    """A method whose parameters are a :class:`SelectedBy`."""

    parameters: ClassVar[type[BaseModel]] = AnySelection

    def streams(self, recipe: Recipe) -> bool:
        """Whether the method and the choice of layers both work with a streamed model."""
        return self.streamed and self._selection(recipe.parameters).streamed

    def uses(self, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        """The method that chooses the layers."""
        return self._selection(parameters).chosen_by

    def reads_seed(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the method or the choice of layers does."""
        return self.seeded or self._selection(parameters).seeded

    def parts(self, recipe: Recipe) -> tuple[str, str] | None:
        """The choice of layers, and the method with its other parameters."""
        options = self._selection(recipe.parameters)
        return options.words(), in_words(self.name, options, AnySelection.model_fields)

    def files(self, parameters: Mapping[str, Any]) -> Sequence[Path]:
        """Those of the method that chooses the layers."""
        selection = self._selection(parameters).selection
        return () if selection is None else selection.selector.files(selection.parameters)

    def _selection(self, parameters: Mapping[str, Any]) -> SelectedBy:
        options = self.parameters.model_validate(parameters)
        assert isinstance(options, SelectedBy)
        return options
