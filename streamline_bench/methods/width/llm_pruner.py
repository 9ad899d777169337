"""LLM-Pruner (arXiv 2305.11627): removes the heads and MLP channels of least effect on the loss.

A head is its rows of queries, keys and values with its columns of the output projection; a channel
is its rows of gate and up with its column of down. A unit is one or the other. Every prunable layer
loses equally many units, its own lowest. Where a family lets only heads go, or only channels, the
others stay, and the log and the manifest say why. Profile ``paper`` does not prune the ends of the
model, so that layers differ in width and the result is of model type ``streamline``; ``uniform``
prunes all layers alike: a stock checkpoint.

Differences from the published implementation: query heads that share a key-value head are scored
with that one (its ``llama3.py`` adds up channels of other heads); gradients are summed in float32;
the ratio is solved for the wanted share of the model's parameters; the result can be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from streamline_bench.core.architecture import Architecture, architecture_of, depth_of
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Frozen, Recipe
from streamline_bench.errors import NumericsError, SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method, Size
from streamline_bench.methods.tools.gradients import (
    GradientSums,
    LayerGradients,
    gradients_by_layer,
)
from streamline_bench.methods.tools.selection import proportional_ends
from streamline_bench.methods.tools.shared_scan import scores_once
from streamline_bench.methods.tools.sizes import Stored, short_share
from streamline_bench.methods.width.narrowing import (
    narrowed_checkpoint,
    prunable_units,
    staying_units,
)
from streamline_bench.methods.width.width_plan import (
    HeadUnit,
    KeptUnits,
    WidthPlan,
    every_plan,
    plan_widths,
)
from streamline_bench.modeling.widths import LayerWidths, Part, projection_parts

Criterion = Literal["param_first", "param_second", "param_mix", "vectorize", "l1", "l2", "random"]


@dataclass(frozen=True)
class UnitScores:
    """Scores of one layer's units, float64 on the CPU.

    Attributes:
        query: ``[heads]``, of rows of queries and columns of the output projection.
        key_value: ``[key-value heads]``, of rows of keys and values.
        channel: ``[channels]``, of the MLP.
    """

    query: Tensor
    key_value: Tensor
    channel: Tensor

    def groups(self) -> Tensor:
        """Return ``[key-value heads]``: each with all query heads that share it."""
        return self.key_value + self.query.view(len(self.key_value), -1).sum(dim=1)

    def named(self, layer: int) -> dict[str, Tensor]:
        """Return the scores by ``LAYER.KIND``, as they are shared by the sizes of a board."""
        return {f"{layer}.{kind}": scores for kind, scores in vars(self).items()}

    @classmethod
    def of(cls, named: Mapping[str, Tensor], layer: int) -> UnitScores:
        """Return a layer's scores from those by name."""
        return cls(*(named[f"{layer}.{each.name}"] for each in fields(cls)))


def needs_gradients(criterion: Criterion) -> bool:
    """Whether calibration tokens are looked at."""
    return criterion not in ("l1", "l2", "random")


def salience(weight: Tensor, criterion: Criterion, sums: GradientSums | None = None) -> Tensor:
    """Return what each weight counts, with its sign, in float32 or better."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if criterion == "l1" or criterion == "l2":
        return wide if criterion == "l1" else wide.square()
    if sums is None:
        raise ValueError(f"criterion {criterion} needs gradients")
    if criterion in ("param_first", "vectorize"):
        return wide * sums.mean
    if sums.squares is None:
        raise ValueError(f"criterion {criterion} needs squared gradients")
    second = wide.square() * sums.squares
    return second if criterion == "param_second" else wide * sums.mean - second / 2


def score_units(
    layer: int,
    parts: Sequence[Part],
    widths: LayerWidths,
    counted: Callable[[str], Tensor],
    *,
    vectorize: bool = False,
) -> UnitScores:
    """Return the scores of a layer's units; zero where they have no part in ``parts``.

    Args:
        layer: named in errors.
        parts: what belongs to whom; vectors do not count.
        widths: how many units there are.
        counted: path of a projection -> what its weights count, as they are stored.
        vectorize: sum over each row (column) before taking the absolute value.

    Raises:
        NumericsError: a score is NaN or infinite; the layer is named.
    """
    counts = {
        "query": widths.num_attention_heads,
        "key_value": widths.num_key_value_heads,
        "channel": widths.intermediate_size,
    }
    sums = {kind: torch.zeros(count, dtype=torch.float64) for kind, count in counts.items()}
    for module in _projections(parts):
        values = counted(module)
        for part in (part for part in parts if part.module == module):
            own = values.narrow(part.dim, part.offset, part.count * part.size)
            if vectorize:
                lines = own.sum(dim=1 - part.dim, dtype=torch.float64).abs()
            else:
                lines = own.abs().sum(dim=1 - part.dim, dtype=torch.float64)
            sums[part.unit] += lines.view(part.count, part.size).sum(dim=1).cpu()
    for kind, scores in sums.items():
        if not bool(torch.isfinite(scores).all()):
            raise NumericsError(
                f"A {kind} score of layer {layer} is NaN or infinite; check the weights, or try "
                "another dtype."
            )
    return UnitScores(sums["query"], sums["key_value"], sums["channel"])


def _projections(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.module for part in parts if not part.vector))


class LLMPrunerParameters(Frozen):
    """Parameters of the method ``llm_pruner``.

    Attributes:
        criterion: what a weight counts, see :func:`salience`; ``random`` draws the scores.
        profile: ``paper`` protects layers at both ends; ``uniform`` none.
        protect_first, protect_last: layers at the ends that stay as they are, for ``paper``. None:
            the paper's 4 and 2 of 32, in proportion for shallower models.
        head_unit: what is removed at once where query heads share key-value heads.
        ratio: share of heads and channels to remove, instead of a sparsity (the published
            implementation's ``pruning_ratio``).
        channel_multiple: channels that stay are a multiple of this.
    """

    criterion: Criterion = "param_first"
    profile: Literal["paper", "uniform"] = "paper"
    protect_first: int | None = Field(None, ge=0)
    protect_last: int | None = Field(None, ge=0)
    head_unit: HeadUnit = "kv_group"
    ratio: float | None = Field(None, gt=0, lt=1)
    channel_multiple: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _uniform_protects_nothing(self) -> LLMPrunerParameters:
        if self.profile == "uniform" and (self.protect_first or self.protect_last):
            raise ValueError("profile 'uniform' protects no layer; leave it out or take 'paper'")
        return self

    def layers(self, depth: int) -> range:
        """Return the layers that are pruned."""
        if self.profile == "uniform":
            return range(depth)
        first, last = self.protect_first, self.protect_last
        usual_first, usual_last = proportional_ends(depth)
        first = usual_first if first is None else first
        last = usual_last if last is None else last
        return range(first, max(first, depth - last))


class LLMPruner(Method):
    """Structured pruning of heads and channels by their share in the loss."""

    name = "llm_pruner"
    passes = frozenset({"gradients"})
    streamed = True
    parameters: ClassVar[type[BaseModel]] = LLMPrunerParameters
    removes = "heads and channels"

    def reads_calibration(self, parameters: Mapping[str, Any]) -> bool:
        return needs_gradients(LLMPrunerParameters.model_validate(parameters).criterion)

    def reads_seed(self, parameters: Mapping[str, Any]) -> bool:
        return LLMPrunerParameters.model_validate(parameters).criterion == "random"

    def stock(self, recipe: Recipe) -> bool:
        """Layers of different widths are not stock."""
        return bool(recipe.parameters.get("profile", "paper") == "uniform")

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield every pair of numbers of heads and channels that a sparsity gives."""
        options = LLMPrunerParameters.model_validate(work.recipe.parameters)
        staying_units(work.config)
        layers, stored = options.layers(depth_of(work.config)), Stored.of(work.reader)
        units = prunable_units(work, layers, options.head_unit)
        groups = units.widths.num_key_value_heads
        cached = sum(stored.cached[layer] for layer in layers) if stored.cached else 0
        for between, plan in every_plan(units, layers, multiple=options.channel_multiple):

            def same(sparsity: float, plan: WidthPlan = plan) -> bool:
                try:
                    found = plan_widths(
                        units, layers, sparsity=sparsity, multiple=options.channel_multiple
                    )
                except SparsityError:
                    return False
                return found.widths == plan.widths

            share = short_share(plan.reached, same) or short_share(between, same)
            if share is not None:
                gone = plan.head_units * units.per_unit[1]
                yield stored.less(
                    {"sparsity": share}, parameters=plan.removed, cached=cached * gone // groups
                )

    def compress(self, work: Compression) -> Compressed:
        """Plan the widths, score the units, keep each layer's highest, slice the stored weights."""
        options = LLMPrunerParameters.model_validate(work.recipe.parameters)
        stays = staying_units(work.config)
        family = architecture_of(work.config)
        plan = _plan(work, options)
        looks = needs_gradients(options.criterion)
        tokens = work.tokens(work.recipe.calibration) if looks else None
        scores = _scores(work, family, plan, options, tokens)
        kept = {
            layer: keep_units(of_layer, plan.head_units, plan.channels, options.head_unit)
            for layer, of_layer in scores.items()
        }
        chosen = {
            "criterion": options.criterion,
            "profile": options.profile,
            "head_unit": options.head_unit,
            "size": asdict(plan),
            **({"stays": stays} if stays else {}),
        }
        return narrowed_checkpoint(work, kept, chosen, tokens)


def keep_units(
    scores: UnitScores, head_units: int, channels: int, unit: HeadUnit = "kv_group"
) -> KeptUnits:
    """Return the units that one layer keeps; of equal scores the lower index is removed first.

    Args:
        head_units, channels: how many it loses.
    """
    within_groups = scores.query.view(len(scores.key_value), -1)
    groups, shared = within_groups.shape
    heads = torch.arange(groups * shared).view(groups, shared)
    if unit == "q_within" and shared > 1:
        stay = torch.stack([highest(group, head_units) for group in within_groups])
        query, key_value = heads.gather(1, stay), torch.arange(groups)
    else:
        key_value = highest(scores.groups(), head_units)
        query = heads[key_value]
    return KeptUnits(query.reshape(-1), key_value, highest(scores.channel, channels))


def highest(scores: Tensor, removed: int) -> Tensor:
    """Return the indices left without the ``removed`` lowest, in increasing order."""
    return torch.sort(torch.argsort(scores, stable=True)[removed:]).values


def _plan(work: Compression, options: LLMPrunerParameters) -> WidthPlan:
    layers = options.layers(depth_of(work.config))
    return plan_widths(
        prunable_units(work, layers, options.head_unit),
        layers,
        sparsity=work.recipe.sparsity,
        ratio=options.ratio,
        multiple=options.channel_multiple,
    )


def _scores(
    work: Compression,
    family: Architecture,
    plan: WidthPlan,
    options: LLMPrunerParameters,
    tokens: CalibrationTokens | None,
) -> dict[int, UnitScores]:
    widths, criterion = LayerWidths.of(work.config, family), options.criterion
    if criterion == "random":
        generator = torch.Generator().manual_seed(work.recipe.seed)
        sizes = (widths.num_attention_heads, widths.num_key_value_heads, widths.intermediate_size)
        return {
            layer: UnitScores(
                *(torch.rand(n, generator=generator, dtype=torch.float64) for n in sizes)
            )
            for layer in plan.layers
        }
    parts = projection_parts(family, widths, work.config)
    vectorize = criterion == "vectorize"
    if tokens is None:  # the stored weights: the model is never built
        prefix = layers_prefix(work.reader, family)

        def stored(layer: int, module: str) -> Tensor:
            return salience(work.reader.tensor(f"{prefix}.{layer}.{module}.weight"), criterion)

        return {
            layer: score_units(layer, parts, widths, partial(stored, layer), vectorize=vectorize)
            for layer in plan.layers
        }
    wanted = {
        layer: [f"{module}.weight" for module in _projections(parts)] for layer in plan.layers
    }
    squares = criterion in ("param_second", "param_mix")

    def look() -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for layer, found in gradients_by_layer(
            work.model, wanted, tokens, squares=squares, work=work.work, progress=work.progress
        ):

            def counted(module: str, found: LayerGradients = found) -> Tensor:
                weight, sums = found[f"{module}.weight"]
                return salience(weight, criterion, sums)

            units = score_units(layer, parts, widths, counted, vectorize=vectorize)
            scores.update(units.named(layer))
        return scores

    decided_by = [sorted(wanted), criterion, vectorize]
    scores = scores_once(work, tokens, "llm_pruner", decided_by, look)
    return {layer: UnitScores.of(scores, layer) for layer in plan.layers}
