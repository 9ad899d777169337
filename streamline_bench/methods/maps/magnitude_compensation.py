"""Prune&Comp (arXiv 2507.18212): the residual stream keeps its magnitude across a cut.

Layers add to the stream, so that what follows removed layers meets a smaller one than it was
trained on. The gap of a cut is the mean over sequences and channels of ``|h_t| / |h_s|``, both
averaged over the tokens of the sequence first, with ``h_s`` what enters the removed layers and
``h_t`` what left them. The stream that crosses the cut has to be ``α h_s``, α being the gap.

The paper multiplies the embeddings and every output projection before the cut by α. Here every
output projection behind the cut is divided by α: the next norm takes a common factor out of the
stream again, so that the function is the same (up to the norm's epsilon), while embeddings that the
LM head shares stay as they are.

``iterative`` removes one layer at a time, and chooses each on the model that the steps before left.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from streamline_bench.core.architecture import (
    Architecture,
    architecture_of,
    decoder_layers,
    depth_of,
    undecided,
)
from streamline_bench.core.architecture_inference import meta_model
from streamline_bench.core.boundaries import BoundaryRecorder, latest_outputs
from streamline_bench.core.checkpoint.writer import LazyTensors, layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.forward import run_base
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.surgery import SizePlan, layers_for_sparsity
from streamline_bench.errors import ArchitectureError, NumericsError
from streamline_bench.methods.base import Compressed, Compression
from streamline_bench.methods.maps.boundary_map import boundary_rows, mlp_module
from streamline_bench.methods.maps.replaceme import mlp_output_tensors, refuse_quantised
from streamline_bench.methods.tools.layer_removal import drop_layers, size_plan
from streamline_bench.methods.tools.normal_equations import widened
from streamline_bench.methods.tools.selection import AnySelection, OnSelection, Selected, cuts_of
from streamline_bench.methods.tools.steps import step_on

log = logging.getLogger(__name__)


class MagnitudeCompensationParameters(AnySelection):
    """Parameters of the method ``magnitude_compensation``.

    Attributes:
        iterative: remove one layer at a time, each chosen on the model as it then is.
        compensate: False leaves the gaps, to measure what compensation adds.
    """

    iterative: bool = True
    compensate: bool = True


@dataclasses.dataclass(frozen=True)
class Gap:
    """A cut and its gap.

    Attributes:
        layer: the last layer that was removed there, an index of the source.
        ratio: α.
    """

    layer: int
    ratio: float


class MagnitudeCompensation(OnSelection):
    """Layers chosen by any method; the layers behind each cut write in proportion to the stream."""

    name = "magnitude_compensation"
    parameters: ClassVar[type[BaseModel]] = MagnitudeCompensationParameters
    streamed = True
    seeded = False

    def parts(self, recipe: Recipe) -> tuple[str, str] | None:
        """The choice of layers, and whether magnitudes are put back."""
        options = MagnitudeCompensationParameters.model_validate(recipe.parameters)
        steps = ", one by one" if options.iterative else ""
        return options.words() + steps, self.name if options.compensate else "none"

    def compress(self, work: Compression) -> Compressed:
        """Choose the layers, measure the gaps, divide what is behind them."""
        options = MagnitudeCompensationParameters.model_validate(work.recipe.parameters)
        if options.compensate:
            refuse_unscalable(architecture_of(work.config))
        plan = size_plan(work)
        tokens = work.tokens(work.recipe.calibration)
        if options.compensate:
            require_two_writers(work.model, tokens)
        if options.iterative:
            gaps, found = _step_by_step(work, options, plan, tokens)
        else:
            found = options.select(work, plan)
            cuts = cuts_of(found.layers)
            ratios = gap_ratios(work, tokens, cuts) if options.compensate else [1.0] * len(cuts)
            gaps = [Gap(cut.stop - 1, ratio) for cut, ratio in zip(cuts, ratios, strict=True)]
        chosen = {**found.facts, "gaps": [dataclasses.asdict(gap) for gap in gaps]}
        result = drop_layers(work, found.layers, plan, chosen=chosen, tokens=tokens)
        return _divided(work, result, found.layers, gaps)


def gap_ratios(work: Compression, tokens: CalibrationTokens, cuts: Sequence[range]) -> list[float]:
    """Return α of each cut: the mean over sequences and channels of a ratio of mean magnitudes.

    Raises:
        NumericsError: a state is zero or not finite.
    """
    sums: list[Any] = [0.0] * len(cuts)
    count = 0
    for batch in boundary_rows(
        work.model, tokens, cuts, work=work.work, progress=work.progress, description="magnitudes"
    ):
        count += 1
        for number, rows in enumerate(batch):
            before, behind = (widened(each).abs().mean(0) for each in (rows.stream, rows.target))
            sums[number] = sums[number] + (behind / before).mean()
    ratios = [float(total) / count for total in sums]
    for cut, ratio in zip(cuts, ratios, strict=True):
        if not 0 < ratio < float("inf"):
            raise NumericsError(
                f"The magnitude behind layer {cut.stop - 1} is {ratio} of that before layer "
                f"{cut.start}; check the weights, or try another dtype."
            )
    return ratios


def refuse_unscalable(family: Architecture) -> None:
    """Refuse families in which a layer's output is not in proportion to its output projections.

    Raises:
        ArchitectureError: the family is one of them.
    """
    unknown = undecided(family, "output", "mlp" if family.experts else "down", "norms")
    if family.output_norms:
        unknown = "norms stand between its sub-layers and the residual stream"
    elif not family.final_norm:
        unknown = "it has no norm before the LM head"
    if unknown:
        raise ArchitectureError(
            f"The layers of model type '{family.model_type}' cannot be rescaled through their "
            f"output projections: {unknown}; use linear_patch or ridge_map."
        )


def require_two_writers(model: Any, tokens: CalibrationTokens) -> None:
    """Check on the first sequence that only attention and MLP add to the stream.

    Raises:
        ArchitectureError: without their outputs, a layer does not hand the stream on unchanged.
    """
    family, layers = architecture_of(model.config), decoder_layers(model)
    silent = []
    for index, layer in enumerate(layers):
        path = f"{family.attention}.{family.output}"
        try:
            silent += [layer.get_submodule(path), mlp_module(model, index)]
        except AttributeError as error:
            raise _other_writer(family, index, str(error)) from error
    ids, mask = next(tokens.batches(1, trim=True))
    recorder = BoundaryRecorder(model)
    with torch.no_grad(), latest_outputs(silent, silenced=True), recorder:
        run_base(model, ids, mask)
        states = recorder.states
        for index in range(len(layers)):
            if not torch.equal(states[index], states[index + 1]):
                raise _other_writer(family, index, "it adds something else to the stream")


def _other_writer(family: Architecture, layer: int, why: str) -> ArchitectureError:
    return ArchitectureError(
        f"Layer {layer} of this '{family.model_type}' model cannot be rescaled through the outputs "
        f"of its attention and MLP ({why}); use linear_patch or ridge_map."
    )


def _step_by_step(
    work: Compression,
    options: MagnitudeCompensationParameters,
    plan: SizePlan,
    tokens: CalibrationTokens,
) -> tuple[list[Gap], Selected]:
    """Remove one layer after another; an interrupted search continues after its last whole step."""
    record = work.work / "steps.json"
    gaps = [Gap(**step) for step in json.loads(record.read_text())] if record.exists() else []
    while len(gaps) < plan.n_layers:
        gone = {gap.layer for gap in gaps}
        left = [layer for layer in range(plan.num_layers) if layer not in gone]
        step = _model_left(work, plan, gaps, tokens) if gaps else work
        (layer,) = options.select(step, layers_for_sparsity(step.reader, n_layers=1)).layers
        ratio = 1.0
        if options.compensate:
            (ratio,) = gap_ratios(step, tokens, [range(layer, layer + 1)])
        gaps.append(Gap(left[layer], ratio))
        log.info("step %d: layer %d, magnitude x %.4f", len(gaps), left[layer], ratio)
        atomic_write_text(record, json.dumps([dataclasses.asdict(gap) for gap in gaps]))
        step.release_model()
    shutil.rmtree(work.work / "step", ignore_errors=True)
    name = options.selection.method if options.selection else f"one layer, {options.metric}"
    order = [gap.layer for gap in gaps]
    return gaps, Selected(order, {"method": name, "order": order})


def _model_left(
    work: Compression, plan: SizePlan, gaps: Sequence[Gap], tokens: CalibrationTokens
) -> Compression:
    """Write what the steps so far leave, from the source's weights, so that rounding does not add.

    Its folder is part of the scratch folder; the one of the step before it goes.
    """
    folder = work.work / "step"
    shutil.rmtree(folder, ignore_errors=True)
    removed = [gap.layer for gap in gaps]
    result = _divided(work, drop_layers(work, removed, plan, chosen={}), removed, gaps)
    return step_on(work, result, folder, {work.recipe.calibration.model_dump_json(): tokens})


def _divided(
    work: Compression, result: Compressed, removed: Sequence[int], gaps: Sequence[Gap]
) -> Compressed:
    """Return the result with the output projections behind each cut divided by its ratio.

    Computed in float64; biases are divided as well.

    Raises:
        ArchitectureError: the output projections are quantised.
    """
    family = architecture_of(work.config)
    prefix = layers_prefix(work.reader, family)
    divisors: dict[str, tuple[str, float]] = {}
    kept = [layer for layer in range(depth_of(work.config)) if layer not in removed]
    for place, layer in enumerate(kept):
        divisor = math.prod(gap.ratio for gap in gaps if gap.layer < layer)
        if divisor == 1.0:
            continue
        for old in _writers(work, family, layer):
            new = f"{prefix}.{place}." + old.removeprefix(f"{prefix}.{layer}.")
            divisors[new] = (old, divisor)

    def make(name: str) -> Tensor:
        if name not in divisors:
            return result.tensors[name]
        old, divisor = divisors[name]
        stored = work.reader.tensor(old)
        return (stored.to(torch.float64) / divisor).to(stored.dtype)

    names = {new: old for new, old in result.names.items() if new not in divisors}
    tensors = LazyTensors([*result.tensors, *divisors], make)
    return dataclasses.replace(result, names=names, tensors=tensors)


def _writers(work: Compression, family: Architecture, layer: int) -> list[str]:
    """Return the stored tensors by which attention and MLP of a layer write to the stream.

    The model is looked at without its weights: another one may be in memory.
    """
    output = f"{layers_prefix(work.reader, family)}.{layer}.{family.attention}.{family.output}"
    known = set(work.reader.names)
    names = [name for name in (f"{output}.weight", f"{output}.bias") if name in known]
    refuse_quantised(work.reader, names)
    return [*names, *mlp_output_tensors(work.reader, family, meta_model(work.config), layer)]
