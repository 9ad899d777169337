"""FLAP (arXiv 2312.11983): removes heads and channels whose input to the next map hardly varies.

A column j of an output projection (of attention, or of the MLP) that reads an input of mean m_j
could be replaced by a constant: what is lost is the fluctuation of the input. Its score is
``Var(X_j) * ||W_:j||^2`` (WIFV); scores of attention are squared, as in the authors' code. Scores
are standardised over the columns of each projection, a head's is the mean of its columns', and the
lowest of all heads and channels of the model are removed, counted in parameters. Removed columns
leave their mean behind, as a bias of the output projection: ``b + W[:, gone] @ m[gone]``.

Layers differ in width and have biases that their family may lack, so that the result is of model
type ``streamline``.

Differences from the authors' code: query heads that share a key-value head are one unit (it knows
models without sharing only); variances are over all tokens (it adds up squares around a running
mean, from the second sequence on); a layer keeps at least one unit of each kind; a bias that is
there is added to (it is replaced there); the share is of all the model's parameters, biases taken
off (there: of the layers' weights). Channels go in blocks of ``channel_multiple`` of neighbouring
scores; 1 is the authors' way.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from streamline_bench.core.architecture import architecture_of, depth_of
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Frozen, Recipe
from streamline_bench.core.surgery import Removal
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method, Size
from streamline_bench.methods.tools.activations import Moments, require_finite, visit_inputs
from streamline_bench.methods.tools.shared_scan import scores_once
from streamline_bench.methods.tools.sizes import Stored
from streamline_bench.methods.width.narrowing import (
    narrowed_checkpoint,
    prunable_units,
    staying_units,
)
from streamline_bench.methods.width.width_plan import KeptUnits, Prunable
from streamline_bench.modeling.widths import (
    LayerWidths,
    Part,
    output_paths,
    projection_parts,
)

Metric = Literal["WIFV", "IFV", "WIFN"]


class FLAPParameters(Frozen):
    """Parameters of the method ``flap``.

    Attributes:
        metric: of a column: ``WIFV`` variance of its input times the squared norm of its weights;
            ``IFV`` variance alone; ``WIFN`` norm of its input times the mean of its absolute
            weights, not centred.
        compensate: leave the mean of what is removed behind, as a bias.
        channel_multiple: channels that stay are a multiple of this.
        batch_size: sequences in one pass.
    """

    metric: Metric = "WIFV"
    compensate: bool = True
    channel_multiple: int = Field(8, ge=1)
    batch_size: int = Field(1, ge=1)


@dataclass(frozen=True)
class ColumnScores:
    """Scores of the columns of one layer's output projections, and the mean of their inputs.

    All float64 on the CPU; None where such units cannot be removed.

    Attributes:
        heads: ``[query heads * head size]``, not standardised.
        channels: ``[channels]``.
        means: path of the projection -> mean of its input.
    """

    heads: Tensor | None
    channels: Tensor | None
    means: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdaptivePlan(Removal):
    """What the search over the whole model arrived at; new biases are taken off what is removed.

    Attributes:
        threshold: highest standardised score that was removed.
        widths: layer -> what it keeps.
    """

    threshold: float
    widths: Mapping[int, Mapping[str, int]]


class FLAP(Method):
    """Heads and channels that fluctuate least, over the whole model, with their means kept."""

    name = "flap"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = FLAPParameters
    removes = "heads and channels"
    seeded = False

    def stock(self, recipe: Recipe) -> bool:
        """Layers of different widths are not stock."""
        return False

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield shares in steps of a ten-thousandth.

        A result is within half a unit of its share. Which units go is not known before: all keys
        and values may stay.
        """
        options = FLAPParameters.model_validate(work.recipe.parameters)
        staying_units(work.config)
        layers, stored = range(depth_of(work.config)), Stored.of(work.reader)
        units, multiple = prunable_units(work, layers), options.channel_multiple
        hidden = int(work.config.hidden_size) * options.compensate
        largest = max(units.head_cost, multiple * units.channel_cost)
        stays = units.head_cost + min(multiple, units.widths.intermediate_size) * units.channel_cost
        most = len(layers) * (units.layer_parameters - stays - 2 * hidden)
        for step in range(1, 10_000):
            wanted = step / 10_000 * units.total
            if largest <= wanted <= most:
                yield stored.less({"sparsity": step / 10_000},
                                  parameters=int(wanted - largest / 2))  # fmt: skip

    def compress(self, work: Compression) -> Compressed:
        """Score the columns, search the structure, slice the weights, add the biases."""
        options = FLAPParameters.model_validate(work.recipe.parameters)
        stays = staying_units(work.config)
        layers = range(depth_of(work.config))
        units = prunable_units(work, layers)
        if work.recipe.sparsity is None:
            raise SparsityError("FLAP needs a sparsity: the share of parameters to remove.")
        tokens = work.tokens(work.recipe.calibration)
        scores = _scores(work, layers, options, tokens)
        new_bias = {path: not _has_bias(work, path) and options.compensate
                    for path in output_paths(architecture_of(work.config))}  # fmt: skip
        bias_cost = [int(work.config.hidden_size) * new for new in new_bias.values()]
        kept, plan = search(
            scores, units, work.recipe.sparsity, multiple=options.channel_multiple,
            bias_cost=(bias_cost[0], bias_cost[1]),
        )  # fmt: skip
        biases = _biases(work, scores, kept) if options.compensate else {}
        chosen = {
            "metric": options.metric,
            "compensate": options.compensate,
            "size": asdict(plan),
            **({"stays": stays} if stays else {}),
        }
        return narrowed_checkpoint(work, kept, chosen, tokens, biases)


def column_score(metric: Metric, weight: Tensor, moments: Moments, layer: int) -> Tensor:
    """Return the score of each column of an output projection, float64 ``[in]`` on the CPU.

    Args:
        weight: ``[out, in]``.
        moments: of its input.
    """
    variance = moments.variance(layer)
    if metric == "IFV":
        return variance
    wide = weight.double()
    if metric == "WIFV":
        return variance * wide.square().sum(dim=0)
    count = moments.count
    power = variance * ((count - 1) / count) + moments.mean.cpu().square()
    return wide.abs().mean(dim=0) * power.sqrt()


def _scores(
    work: Compression, layers: Sequence[int], options: FLAPParameters, tokens: CalibrationTokens
) -> dict[int, ColumnScores]:
    decided_by = [options.metric, options.batch_size]
    found = scores_once(
        work, tokens, "flap", decided_by, lambda: _looked(work, layers, options, tokens)
    )
    modules = [part.module for part in _outputs(work.config).values()]
    return {
        layer: ColumnScores(
            found.get(f"{layer}.query"),
            found.get(f"{layer}.channel"),
            {module: found[f"{layer}.mean.{module}"] for module in modules},
        )
        for layer in layers
    }


def _looked(
    work: Compression, layers: Sequence[int], options: FLAPParameters, tokens: CalibrationTokens
) -> dict[str, Tensor]:
    """Return scores and means of each layer, by ``LAYER.KIND`` and ``LAYER.mean.MODULE``."""
    outputs = _outputs(work.config)
    moments: dict[tuple[int, str], Moments] = defaultdict(Moments)
    visit_inputs(
        work.model, {layer: [part.module for part in outputs.values()] for layer in layers}, tokens,
        lambda layer, path, rows: moments[layer, path].add(rows),
        batch_size=options.batch_size, work=work.work, progress=work.progress,
    )  # fmt: skip

    looked: dict[str, Tensor] = {}
    for layer in layers:
        for kind, part in outputs.items():
            weight, found = _weight(work, layer, part), moments[layer, part.module]
            scores = column_score(options.metric, weight, found, layer)
            require_finite(scores, layer)
            looked[f"{layer}.{kind}"] = scores.square() if kind == "query" else scores
            looked[f"{layer}.mean.{part.module}"] = found.mean.cpu()
    return looked


def _outputs(config: Any) -> dict[str, Part]:
    """Return the columns of output projections: of ``query`` heads and of ``channel``."""
    family = architecture_of(config)
    parts = projection_parts(family, LayerWidths.of(config, family), config)
    return {part.unit: part for part in parts if part.axis == 1}


def _weight(work: Compression, layer: int, part: Part) -> Tensor:
    """Return a stored projection as ``[out, in]``."""
    prefix = layers_prefix(work.reader, architecture_of(work.config))
    stored = work.reader.tensor(f"{prefix}.{layer}.{part.tensor}")
    return stored.T if part.transposed else stored


def _has_bias(work: Compression, path: str) -> bool:
    prefix = layers_prefix(work.reader, architecture_of(work.config))
    return f"{prefix}.0.{path}.bias" in set(work.reader.names)


def standardised(scores: Tensor) -> Tensor:
    """Return scores with mean 0 and (unbiased) standard deviation 1; zeros if all are equal."""
    apart = scores - scores.mean()
    deviation = scores.std()
    return apart / deviation if float(deviation) > 0 else torch.zeros_like(scores)


def search(
    scores: Mapping[int, ColumnScores],
    units: Prunable,
    sparsity: float,
    *,
    multiple: int = 1,
    bias_cost: tuple[int, int] = (0, 0),
) -> tuple[dict[int, KeptUnits], AdaptivePlan]:
    """Remove the lowest standardised scores of the whole model until the share is reached.

    Args:
        scores: of every layer.
        units: what each layer could lose.
        sparsity: share of the model's parameters.
        multiple: channels that stay are a multiple of this; each block counts with its mean score.
        bias_cost: parameters of the bias that a layer gets when it loses heads, and channels.

    Raises:
        SparsityError: it is out of range or of reach.
    """
    if not 0 < sparsity < 1:
        raise SparsityError(f"Sparsity {sparsity} is not a share between 0 and 1 (both excluded).")
    groups, shared = units.widths.num_key_value_heads, units.widths.heads_per_group
    places: list[tuple[int, str, Tensor]] = []  # layer, kind, indices of the block
    values: list[float] = []
    costs: list[int] = []
    for layer, found in scores.items():
        if found.heads is not None:
            of_group = standardised(found.heads).view(groups, -1).mean(dim=1)
            order = torch.argsort(of_group, stable=True)
            for place, group in enumerate(order[:-1]):
                places.append((layer, "group", group.view(1)))
                values.append(float(of_group[group]))
                costs.append(units.head_cost - bias_cost[0] * (place == 0))
        if found.channels is not None:
            channel = standardised(found.channels)
            order = torch.argsort(channel, stable=True)
            first = len(order) % multiple or multiple  # what stays is a multiple
            starts = [0, *range(first, len(order), multiple)]
            for place, (start, end) in enumerate(itertools.pairwise(starts)):
                block = order[start:end]
                places.append((layer, "channel", block))
                values.append(float(channel[block].mean()))
                costs.append(len(block) * units.channel_cost - bias_cost[1] * (place == 0))
    ranked = sorted(range(len(values)), key=values.__getitem__)  # stable: lower layers first
    sums = torch.tensor([0, *(costs[i] for i in ranked)]).cumsum(0)
    wanted = sparsity * units.total
    count = int((sums - wanted).abs().argmin())
    if count == 0 or abs(int(sums[count]) - wanted) > max(costs) / 2:
        least, most = min(costs, default=0) / units.total, int(sums[-1]) / units.total
        raise SparsityError(
            f"Sparsity {sparsity} is out of reach: removing {units.removable} of "
            f"{units.num_layers} layers reaches {least:.4f} to {most:.4f}; choose a share in that "
            "range."
        )
    gone: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    for index in ranked[:count]:
        layer, kind, block = places[index]
        gone[layer, kind].append(block)

    def left(layer: int, kind: str, of: int) -> Tensor:
        stays = torch.ones(of, dtype=torch.bool)
        for block in gone.get((layer, kind), ()):
            stays[block] = False
        return stays.nonzero().view(-1)

    kept = {}
    for layer in scores:
        group = left(layer, "group", groups)
        query = torch.arange(groups * shared).view(groups, shared)[group].reshape(-1)
        channels = left(layer, "channel", units.widths.intermediate_size)
        kept[layer] = KeptUnits(query, group, channels)
    removed = int(sums[count])
    return kept, AdaptivePlan(
        threshold=values[ranked[count - 1]],
        widths={layer: units_kept.widths.to_dict() for layer, units_kept in kept.items()},
        removed=removed, total=units.total, embeddings=units.embeddings, requested=sparsity,
    )  # fmt: skip


def _biases(
    work: Compression, scores: Mapping[int, ColumnScores], kept: Mapping[int, KeptUnits]
) -> dict[int, dict[str, Tensor]]:
    """Return the biases that stand for what is removed, in the dtype of the weights."""
    prefix = layers_prefix(work.reader, architecture_of(work.config))
    present, outputs = set(work.reader.names), _outputs(work.config)
    biases: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for layer, units in kept.items():
        for kind, part in outputs.items():
            stays: Tensor = getattr(units, kind)
            if len(stays) == part.count:
                continue
            means = scores[layer].means[part.module].view(part.count, part.size).clone()
            means[stays] = 0
            weight = _weight(work, layer, part)
            bias = weight.double() @ means.view(-1)
            name = f"{prefix}.{layer}.{part.module}.bias"
            if name in present:
                bias += work.reader.tensor(name).double()
            biases[layer][part.module] = bias.to(weight.dtype)
    return dict(biases)
