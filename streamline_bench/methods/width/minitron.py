"""Minitron (arXiv 2407.14679, section 2; 2408.11796): widths by the size of activations.

One look at calibration text scores everything that can go. With ``agg(x)`` the size of an
activation, taken over the tokens of a sequence (``sequence``: the mean of |x|, or its L2 norm) and
then over sequences (``batch``: L2 norm or mean):

* a channel of an MLP: agg of its input to the output projection;
* a head: L2 norm over its dimensions of agg of the input to attention's output projection;
* a channel of the residual stream: agg of the normed input of attention and of the MLP, summed over
  all layers.

The lowest go: channels of the stream in every tensor that has them, heads and channels of the MLPs
in each layer. Which dimensions of which tensors are the stream's is found by
:mod:`.stream_width`. All layers keep the same widths, so that the result is a stock checkpoint.

The sizes follow from the share of parameters (:mod:`.minitron_sizes`). With ``iterations`` above 1
the widths go down in that many equal steps, and each step looks at the model that the one before
left (the paper's iterative importance).

Beside NVIDIA's Model-Optimizer: scores are the same. It takes sizes, or searches a grid of them by
a task's score. Its heads go within their groups (``head_unit: q_within``); ``kv_group`` removes
whole groups, scored by the sum of their heads. As there, norms are cut and not rescaled. The
paper's own text is private; here it is the recipe's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from streamline_bench.core.architecture import Architecture, architecture_of, depth_of, undecided
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import ArchitectureError, SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method, Size
from streamline_bench.methods.tools.activations import require_finite, visit_inputs
from streamline_bench.methods.tools.shared_scan import scores_once
from streamline_bench.methods.tools.sizes import Stored
from streamline_bench.methods.tools.steps import step_on
from streamline_bench.methods.width.llm_pruner import UnitScores, highest, keep_units
from streamline_bench.methods.width.minitron_sizes import (
    Aggregation,
    MinitronParameters,
    Sizes,
    plan_sizes,
    widths_of,
)
from streamline_bench.methods.width.narrowing import (
    narrowed_checkpoint,
    prunable_units,
    staying_units,
)
from streamline_bench.methods.width.stream_width import NarrowShapes
from streamline_bench.methods.width.width_plan import HeadUnit, KeptUnits, Prunable
from streamline_bench.modeling.widths import (
    LayerWidths,
    fixed_channels,
    fixed_heads,
    output_paths,
)


@dataclass(frozen=True)
class Importance:
    """Scores of everything that can go, float64 on the CPU.

    Attributes:
        units: layer -> scores of its heads and channels.
        stream: ``[hidden]``; None where no channel of the stream goes.
    """

    units: Mapping[int, UnitScores]
    stream: Tensor | None


class Minitron(Method):
    """Channels of stream and MLPs, and heads, of smallest activations."""

    name = "minitron"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = MinitronParameters
    keeps_stream = False
    removes = "heads and channels"
    seeded = False

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield the sizes for shares in steps of 1/400, each of them once."""
        options = MinitronParameters.model_validate(work.recipe.parameters)
        staying_units(work.config)
        layers, stored = range(depth_of(work.config)), Stored.of(work.reader)
        units = prunable_units(work, layers, options.head_unit)
        shapes = NarrowShapes(work.config, stream="stream" in options.axes)
        seen: set[tuple[int, int]] = set()
        cached, groups = sum(stored.cached or ()), units.widths.num_key_value_heads
        for step in range(1, 400):
            try:
                _, plan = plan_sizes(shapes, units, options, step / 400)
            except SparsityError:
                continue
            gone = groups - plan.widths.num_key_value_heads
            if (plan.removed, gone) not in seen:
                seen.add((plan.removed, gone))
                yield stored.less({"sparsity": step / 400}, parameters=plan.removed,
                                  cached=cached * gone // groups)  # fmt: skip

    def compress(self, work: Compression) -> Compressed:
        """Plan the widths, look at the model as often as asked, slice the stored weights."""
        options = MinitronParameters.model_validate(work.recipe.parameters)
        if work.recipe.sparsity is None:
            raise SparsityError("Minitron needs a sparsity: the share of parameters to remove.")
        stays = staying_units(work.config)
        layers = range(depth_of(work.config))
        units = prunable_units(work, layers, options.head_unit)
        shapes = NarrowShapes(work.config, stream="stream" in options.axes)
        goal, plan = plan_sizes(shapes, units, options, work.recipe.sparsity)
        tokens = work.tokens(work.recipe.calibration)
        start = Sizes(shapes.hidden, 0, units.widths.intermediate_size)
        kept, stream = _everything(start, units, layers)
        looked = work
        for step in range(options.iterations):
            if step:
                looked = _narrowed(work, kept, stream, options)
            before, after = (_between(start, goal, options, n) for n in (step, step + 1))
            scores = _importance_once(looked, layers, widths_of(units, before), options, tokens)
            kept, stream = _fewer(kept, stream, scores, before, after, options.head_unit)
        work.release_model()
        chosen = {
            **options.model_dump(mode="json", exclude={"batch_size"}),
            "size": asdict(plan),
            **({"stays": stays} if stays else {}),
        }
        narrow = stream if "stream" in options.axes else None
        return narrowed_checkpoint(work, kept, chosen, tokens, stream=narrow)


def _between(start: Sizes, goal: Sizes, options: MinitronParameters, step: int) -> Sizes:
    """Return the sizes after ``step`` of the equal steps; between the ends in whole multiples."""

    def at(a: int, b: int, multiple: int) -> int:
        done = step / options.iterations
        return b if done == 1 else a + round((b - a) * done / multiple) * multiple

    return Sizes(
        at(start.hidden, goal.hidden, options.stream_multiple),
        at(start.head_units, goal.head_units, 1),
        at(start.channels, goal.channels, 1),
    )


def _everything(
    start: Sizes, units: Prunable, layers: Sequence[int]
) -> tuple[dict[int, KeptUnits], Tensor]:
    widths = units.widths
    whole = KeptUnits(
        torch.arange(widths.num_attention_heads),
        torch.arange(widths.num_key_value_heads),
        torch.arange(widths.intermediate_size),
    )
    return dict.fromkeys(layers, whole), torch.arange(start.hidden)


def _fewer(
    kept: Mapping[int, KeptUnits],
    stream: Tensor,
    scores: Importance,
    before: Sizes,
    after: Sizes,
    unit: HeadUnit,
) -> tuple[dict[int, KeptUnits], Tensor]:
    """Return what stays of ``kept``; scores and sizes are those of the model that was looked at."""
    heads, channels = after.head_units - before.head_units, before.channels - after.channels
    fewer = {}
    for layer, old in kept.items():
        new = keep_units(scores.units[layer], heads, channels, unit)
        fewer[layer] = KeptUnits(
            old.query[new.query], old.key_value[new.key_value], old.channel[new.channel]
        )
    if scores.stream is not None:
        stream = stream[highest(scores.stream, before.hidden - after.hidden)]
    return fewer, stream


def _narrowed(
    work: Compression,
    kept: Mapping[int, KeptUnits],
    stream: Tensor,
    options: MinitronParameters,
) -> Compression:
    """Write what earlier steps left into the work folder, and return it to be looked at."""
    narrow = stream if "stream" in options.axes else None
    result = narrowed_checkpoint(work, kept, {}, None, stream=narrow)
    work.release_model()
    return step_on(work, result, work.work / "step", {})


def _importance_once(
    work: Compression,
    layers: Sequence[int],
    widths: LayerWidths,
    options: MinitronParameters,
    tokens: CalibrationTokens,
) -> Importance:
    """Return :func:`importance`; that of the whole model serves every size."""

    def look() -> dict[str, Tensor]:
        found = importance(work, layers, widths, options, tokens)
        scores = {
            name: each
            for layer, units in found.units.items()
            for name, each in units.named(layer).items()
        }
        return scores if found.stream is None else {**scores, "stream": found.stream}

    decided_by = options.model_dump(
        mode="json", include={"axes", "sequence", "batch", "batch_size"}
    )
    scores = scores_once(work, tokens, "minitron", decided_by, look)
    units = {layer: UnitScores.of(scores, layer) for layer in layers}
    return Importance(units, scores.get("stream"))


def importance(
    work: Compression,
    layers: Sequence[int],
    widths: LayerWidths,
    options: MinitronParameters,
    tokens: CalibrationTokens,
) -> Importance:
    """Look at the model once and score its units; zeros for units that all stay.

    Args:
        work: with the model to look at, whose layers all have ``widths``.

    Raises:
        ArchitectureError: it is not known what its attention or its MLPs read.
        NumericsError: activations are NaN or infinite; the layer is named.
    """
    family = architecture_of(work.config)
    normed = _normed_inputs(family, work.config) if "stream" in options.axes else []
    goes = (
        "heads" in options.axes and not fixed_heads(family),
        ("channels" in options.axes and not fixed_channels(family)),
    )
    outputs = [path for path, one in zip(output_paths(family), goes, strict=True) if one]
    sizes: dict[tuple[int, str], Magnitude] = defaultdict(
        lambda: Magnitude(options.sequence, options.batch)
    )
    paths = (*normed, *outputs)
    visit_inputs(
        work.model, dict.fromkeys(layers, paths), tokens,
        lambda layer, path, rows, *_: sizes[layer, path].add(rows),
        batch_size=options.batch_size, by_sequence=True, work=work.work, progress=work.progress,
    )  # fmt: skip
    units = {}
    for layer in layers:
        query, channel = (
            sizes[layer, path].of(layer).view(count, -1).norm(dim=1)
            if one
            else torch.zeros(count, dtype=torch.float64)
            for path, count, one in zip(
                output_paths(family),
                (widths.num_attention_heads, widths.intermediate_size),
                goes,
                strict=True,
            )
        )
        key_value = torch.zeros(widths.num_key_value_heads, dtype=torch.float64)
        units[layer] = UnitScores(query, key_value, channel)
    whole = [sizes[layer, path].of(layer) for layer in layers for path in normed]
    return Importance(units, torch.stack(whole).sum(dim=0) if whole else None)


def _normed_inputs(family: Architecture, config: Any) -> list[str]:
    """Return the modules of a layer that read the normed stream, one of each sub-layer."""
    reason = undecided(family, *(("query",) if family.experts else ("query", "up")))
    if reason:
        raise ArchitectureError(
            f"Channels of the residual stream of model type '{family.model_type}' cannot be "
            f"scored: {reason}; remove heads and channels of the MLPs only (parameters.axes), or "
            "use another method."
        )
    attention = f"{family.attention}." if family.attention else ""
    latent = "q_a_proj" if getattr(config, "q_lora_rank", None) else "q_proj"
    query = latent if family.latent else family.fused_qkv or family.query
    if family.experts:
        return [attention + query, family.mlp]
    mlp = f"{family.mlp}." if family.mlp else ""
    return [attention + query, mlp + (family.fused_gate_up or family.up)]


class Magnitude:
    """Sizes of activations per column, over the tokens of sequences and over sequences.

    Args:
        sequence, batch: mean of absolute values, or L2 norm, over one and the other.
    """

    def __init__(self, sequence: Aggregation, batch: Aggregation) -> None:
        self._sequence, self._batch = sequence, batch
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Add one sequence ``[tokens, width]``."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        size = wide.abs().mean(dim=0) if self._sequence == "mean" else wide.norm(dim=0)
        size = size.double()
        self._sum = self._sum + (size.square() if self._batch == "l2" else size)
        self._count += 1

    def of(self, layer: int) -> Tensor:
        """Return the sizes, float64 ``[width]`` on the CPU.

        Raises:
            NumericsError: one is NaN or infinite; the layer is named.
        """
        total = torch.as_tensor(self._sum).cpu()
        require_finite(total, layer)
        return total.sqrt() if self._batch == "l2" else total / self._count
