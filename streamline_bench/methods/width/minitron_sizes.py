"""Parameters of Minitron, and from "a quarter fewer parameters" to a hidden size and layer widths.

The share of parameters is spread over the axes at one ratio, in whole heads and multiples; channels
of the MLPs, where they may go, make up the rest. The published models of Llama 3.1 and Mistral NeMo
lose channels of stream and MLPs and keep their heads (arXiv 2408.11796), which is the default.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.surgery import Removal
from streamline_bench.errors import SparsityError
from streamline_bench.methods.width.stream_width import NarrowShapes
from streamline_bench.methods.width.width_plan import HeadUnit, Prunable
from streamline_bench.modeling.widths import LayerWidths

Axis = Literal["stream", "heads", "channels"]
Aggregation = Literal["mean", "l2"]


class MinitronParameters(Frozen):
    """Parameters of the method ``minitron``.

    Attributes:
        axes: what is removed: channels of the residual stream, heads, channels of the MLPs.
        sequence, batch: how sizes of activations are taken over the tokens of a sequence, and over
            sequences.
        head_unit: what is removed at once where query heads share key-value heads.
        iterations: steps in which the widths go down, each with a look of its own.
        stream_multiple, channel_multiple: channels that stay are a multiple of these.
        batch_size: sequences in one pass.
    """

    axes: tuple[Axis, ...] = Field(("stream", "channels"), min_length=1)
    sequence: Aggregation = "mean"
    batch: Aggregation = "l2"
    head_unit: HeadUnit = "q_within"
    iterations: int = Field(1, ge=1)
    stream_multiple: int = Field(8, ge=1)
    channel_multiple: int = Field(8, ge=1)
    batch_size: int = Field(1, ge=1)

    @field_validator("axes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value  # of a command line


@dataclass(frozen=True)
class Sizes:
    """How wide a model is, and how many head units each layer has lost."""

    hidden: int
    head_units: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class MinitronPlan(Removal):
    """The widths that all layers keep.

    Attributes:
        ratio: the common share of each axis that was to stay.
        hidden_size: channels of the residual stream.
        widths: heads and channels of each layer.
    """

    ratio: float
    hidden_size: int
    widths: LayerWidths


def plan_sizes(
    shapes: NarrowShapes, units: Prunable, options: MinitronParameters, sparsity: float
) -> tuple[Sizes, MinitronPlan]:
    """Return the widths that come closest to a share of the model's parameters.

    Every axis keeps about the same ratio; channels of the MLPs, where they may go, make up the
    rest.

    Raises:
        SparsityError: it is out of range, or no widths come within half a step of it.
    """
    if not 0 < sparsity < 1:
        raise SparsityError(f"Sparsity {sparsity} is not a share between 0 and 1 (both excluded).")
    search = _Search(shapes, units, options)
    wanted = (1 - sparsity) * units.total
    low, high = 0.0, 1.0
    for _ in range(40):
        ratio = (low + high) / 2
        low, high = (ratio, high) if search.at(ratio) < wanted else (low, ratio)
    found = min(search.near(ratio, wanted), key=lambda each: search.key(each, ratio, wanted))
    size = search.parameters(found)
    if abs(size - wanted) > search.step(found) / 2 + 1 or size >= units.total:
        least, most = (1 - search.parameters(each) / units.total for each in search.ends())
        raise SparsityError(
            f"Sparsity {sparsity} is out of reach: removing {' and '.join(options.axes)} reaches "
            f"{least:.4f} to {most:.4f}; choose a share in that range, or other axes or multiples."
        )
    return found, MinitronPlan(
        ratio=ratio, hidden_size=found.hidden, widths=widths_of(units, found),
        removed=units.total - size, total=units.total, embeddings=units.embeddings,
        requested=sparsity,
    )  # fmt: skip


def widths_of(units: Prunable, sizes: Sizes) -> LayerWidths:
    """Return the widths of each layer."""
    own, (query, key_value) = units.widths, units.per_unit
    return LayerWidths(
        own.num_attention_heads - query * sizes.head_units,
        own.num_key_value_heads - key_value * sizes.head_units,
        sizes.channels,
    )


class _Search:
    """Sizes that may be chosen, and what they amount to."""

    def __init__(self, shapes: NarrowShapes, units: Prunable, options: MinitronParameters) -> None:
        self._shapes, self._units, self._options = shapes, units, options
        self._stream = "stream" in options.axes
        self._heads = units.head_units if "heads" in options.axes else 0
        self._channels = "channels" in options.axes and bool(units.channel_cost)
        self._all = Sizes(shapes.hidden, 0, units.widths.intermediate_size)
        if not (self._stream or self._heads or self._channels):
            raise SparsityError(
                f"Nothing of this model can be removed on the axes {', '.join(options.axes)}: its "
                f"layers can lose {units.removable}; choose other axes."
            )

    def parameters(self, sizes: Sizes) -> int:
        return self._shapes.parameters(sizes.hidden, widths_of(self._units, sizes))

    def at(self, ratio: float) -> int:
        """Return the parameters with this share of every axis, multiples left out of account."""
        return self.parameters(
            Sizes(
                max(1, round(ratio * self._all.hidden)) if self._stream else self._all.hidden,
                min(round((1 - ratio) * self._heads), max(self._heads - 1, 0)),
                max(1, round(ratio * self._all.channels)) if self._channels else self._all.channels,
            )
        )

    def near(self, ratio: float, wanted: float) -> list[Sizes]:
        """Return the sizes around a ratio, each with the channels that the rest asks for."""
        hidden = [self._all.hidden]
        if self._stream:
            step = self._options.stream_multiple
            hidden = _around(ratio * self._all.hidden, step, self._all.hidden)
        heads = [0]
        if self._heads:
            lost = (1 - ratio) * self._heads
            heads = sorted({min(n, self._heads - 1) for n in (math.floor(lost), math.ceil(lost))})
        found = [
            Sizes(size, lost, self._all.channels) for size, lost in itertools.product(hidden, heads)
        ]
        return [self._with_channels(each, wanted) for each in found] if self._channels else found

    def _with_channels(self, sizes: Sizes, wanted: float) -> Sizes:
        one = self._channel_cost(sizes)
        left = sizes.channels - (self.parameters(sizes) - wanted) / one
        return replace(sizes, channels=self._units.whole(left, self._options.channel_multiple))

    def _channel_cost(self, sizes: Sizes) -> int:
        fewer = replace(sizes, channels=sizes.channels - 1)
        return self.parameters(sizes) - self.parameters(fewer)

    def step(self, sizes: Sizes) -> int:
        """Return the parameters of the finest step from these sizes."""
        if self._channels:
            return self._options.channel_multiple * self._channel_cost(sizes)
        hidden, heads = sizes.hidden, sizes.head_units
        other = (
            replace(sizes, hidden=hidden + self._options.stream_multiple)
            if self._stream
            else replace(sizes, head_units=heads - 1 if heads else 1)
        )
        return abs(self.parameters(other) - self.parameters(sizes))

    def key(self, sizes: Sizes, ratio: float, wanted: float) -> tuple[bool, float, float]:
        """Order sizes: within half a step first, then those at the most even ratios."""
        missed = abs(self.parameters(sizes) - wanted)
        shares = [sizes.hidden / self._all.hidden] if self._stream else []
        shares += [1 - sizes.head_units / self._heads] if self._heads else []
        shares += [sizes.channels / self._all.channels] if self._channels else []
        uneven = max(abs(share - ratio) for share in shares)
        return missed > self.step(sizes) / 2 + 1, uneven, missed

    def ends(self) -> tuple[Sizes, Sizes]:
        """Return the largest sizes with something gone, and the smallest."""
        options, everything = self._options, self._all
        smallest = Sizes(
            min(options.stream_multiple, everything.hidden) if self._stream else everything.hidden,
            max(self._heads - 1, 0),
            min(options.channel_multiple, everything.channels)
            if self._channels
            else everything.channels,
        )
        if self._channels:
            one = replace(everything, channels=everything.channels - options.channel_multiple)
        elif self._stream:
            one = replace(everything, hidden=everything.hidden - options.stream_multiple)
        else:
            one = replace(everything, head_units=1)
        return one, smallest


def _around(value: float, multiple: int, most: int) -> list[int]:
    """Return the multiples next to a value, from one of them to what there is."""
    below = max(math.floor(value / multiple), 1) * multiple
    return sorted({min(below, most), min(below + multiple, most)})
