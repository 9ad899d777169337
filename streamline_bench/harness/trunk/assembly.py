"""Loads the models of a walk, equal weights once, and sees that they can walk together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.recipe.validation import first_line
from streamline_bench.errors import CheckpointError, StreamlineBenchError
from streamline_bench.harness.trunk.evaluation import model_arguments
from streamline_bench.harness.trunk.journal import Journal
from streamline_bench.harness.trunk.legs import legs_of
from streamline_bench.harness.trunk.lm import TrunkLM
from streamline_bench.harness.trunk.request import TrunkRequest
from streamline_bench.harness.trunk.stack import Stack
from streamline_bench.harness.trunk.walk import Walk, Walker
from streamline_bench.harness.trunk.weights import WeightPool, same_weights

__all__ = ["Assembly", "assemble", "load_model"]

logger = logging.getLogger(__name__)


@dataclass
class Assembly:
    """Models that are ready to walk.

    Attributes:
        models: by label, in walking order; each has joined ``walk`` if there is one.
        walk: None if fewer than two models are left.
        shared_layers: label -> decoder layers that others run for it.
        alone: label -> why it must be evaluated by itself.
        failed: label -> why it cannot be evaluated.
    """

    models: dict[str, TrunkLM] = field(default_factory=dict)
    walk: Walk | None = None
    shared_layers: dict[str, int] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    failed: dict[str, StreamlineBenchError] = field(default_factory=dict)


def load_model(request: TrunkRequest, label: str) -> TrunkLM:
    """Load a label's model as a separate run of the harness does.

    Raises:
        StreamlineBenchError: it cannot be loaded.
    """
    options = {
        "batch_size": str(request.batch_size),
        "max_batch_size": request.max_batch_size,
        "device": request.device,
    }
    try:
        return TrunkLM.create_from_arg_obj(model_arguments(request, label), options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
            raise
        raise CheckpointError(
            f"{request.checkpoints[label]} cannot be loaded ({first_line(error)})."
        ) from error


def assemble(
    request: TrunkRequest,
    labels: Sequence[str],
    stacks: Mapping[str, Stack],
    *,
    journals: Mapping[str, Journal] | None = None,
    progress: bool = True,
) -> Assembly:
    """Load models and let them walk together as far as they can.

    Args:
        labels: in walking order; a single one continues a walk whose other rows are finished.
        journals: see :class:`Walk`.
    """
    assembly = Assembly()
    loaded = _load_all(request, labels, assembly)
    assembly.models = {label: loaded[label] for label in labels if label in loaded}
    _drop_strangers(assembly, stacks)
    if len(assembly.models) < min(2, len(labels)):
        for label in assembly.models:
            assembly.alone[label] = "no other model was left to score it with"
        assembly.models = {}
        return assembly
    order = list(assembly.models)
    walkers = {}
    for label, model in assembly.models.items():
        scorer = model.scorer
        assert scorer is not None
        walkers[label] = Walker(model.model, scorer, stacks[label])
    assembly.walk = Walk(walkers, journals=journals, progress=progress)
    for leg in legs_of(order, stacks):
        assembly.models[leg.label].join(assembly.walk, leg.label)
        assembly.shared_layers[leg.label] = stacks[leg.label].layers_below(leg.start)
    return assembly


def _load_all(
    request: TrunkRequest, labels: Sequence[str], assembly: Assembly
) -> dict[str, TrunkLM]:
    loaded: dict[str, TrunkLM] = {}
    pool = WeightPool()
    for label in [each for each in request.checkpoints if each in labels]:
        try:
            model = load_model(request, label)
        except StreamlineBenchError as error:
            assembly.failed[label] = error
            continue
        except RuntimeError:
            assembly.alone[label] = "there is not enough memory for it beside the others"
            continue
        shared = pool.share(model.model)
        logger.info("'%s' holds %.1f MB of weights with others.", label, shared / 1e6)
        if model.scorer is None:
            assembly.alone[label] = "its LM head cannot be run on chosen positions only"
            continue
        loaded[label] = model
    return loaded


def _drop_strangers(assembly: Assembly, stacks: Mapping[str, Stack]) -> None:
    """Leave out models whose shared layers are others once loaded, whatever the files say."""
    kept: list[str] = []
    for label in list(assembly.models):
        if kept:
            start = legs_of([kept[-1], label], stacks)[1].start
            before, model = assembly.models[kept[-1]].model, assembly.models[label].model
            if not _agree(before, model, stacks[label], start):
                assembly.alone[label] = "its first layers are others once loaded"
                del assembly.models[label]
                continue
        kept.append(label)


def _agree(first: Any, second: Any, stack: Stack, start: int) -> bool:
    embeddings = [model.get_input_embeddings() for model in (first, second)]
    if not same_weights(*embeddings):
        return False
    pairs = list(zip(decoder_layers(first), decoder_layers(second), strict=False))
    for step in stack.steps[:start]:
        ours, theirs = pairs[step.layer]
        if step.attachment:
            agree = same_weights(
                ours.get_submodule("attachment"), theirs.get_submodule("attachment")
            )
        else:
            agree = same_weights(ours, theirs, skip="attachment")
        if not agree:
            return False
    return True
