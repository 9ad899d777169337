"""LLM-Streamline (arXiv 2403.19135): drop the block that changes the hidden states least,
and train one lightweight network to stand in for it.

The number of layers fewer in the result is what ``n_layers`` (or the sparsity solver) says. A
replacement of kind ``layer`` takes k slots of its own, so that a block of n + k layers is removed;
the feed-forward kinds are not decoder layers, so that a block of n is removed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from pydantic import BaseModel

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.writer import layer_names, layers_prefix
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.replacement import network_parameters
from streamline_bench.core.similarity import Block
from streamline_bench.core.surgery import SizePlan, block_keep, of_layers, pruned_config
from streamline_bench.core.training import TrainingResult, train_replacement
from streamline_bench.errors import NumericsError, SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.tools.layer_removal import (
    BlockSearch,
    as_stored,
    attached,
    config_json,
    scan_artefact,
    scan_once,
    size_plan,
)

log = logging.getLogger(__name__)


class Streamline(Method):
    """Contiguous block removal with an optional trained replacement."""

    name = "streamline"
    parameters: ClassVar[type[BaseModel]] = BlockSearch
    reads = frozenset({"replacement", "training", "reference_quirks"})

    def stock(self, recipe: Recipe) -> bool:
        """Layers are stock; feed-forward networks in their place are not."""
        return recipe.replacement.kind in ("none", "layer")

    def compress(self, work: Compression) -> Compressed:
        """Scan, choose the block, train the replacement if there is one."""
        options = BlockSearch.model_validate(work.recipe.parameters)
        plan = _size_plan(work)
        block_size = plan.n_layers + _slots(work)
        tokens = work.tokens(work.recipe.calibration)
        similarity = scan_once(work, tokens, options.last_state)
        block = options.choose(similarity, block_size)
        result = _train(work, block)
        gone = range(block.start + _slots(work), block.stop)
        config, names, tensors, layers_after = _assemble(work, block, result)
        scores = similarity.scores(block.n, options.metric)
        artefacts = scan_artefact(work)
        if result is not None:
            curve = "".join(json.dumps(row) + "\n" for row in result.curve)
            artefacts["training_curve.jsonl"] = curve
        return Compressed(
            config=config,
            names=names,
            tensors=tensors,
            layers_after=layers_after,
            chosen={
                "start": block.start,
                "removed_layers": list(range(block.start, block.stop)),
                "score": block.score,
                "metric": options.metric,
                "last_state": options.last_state,
                "best_start_without_guard": int(
                    scores.argmax() if options.metric == "cosine" else scores.argmin()
                ),
                "size": asdict(of_layers(plan, work.reader, gone)),
            },
            calibration=tokens.summary(),
            training=dict(result.summary) if result else None,
            artefacts=artefacts,
        )


def _slots(work: Compression) -> int:
    """Decoder layers that the replacement itself puts in."""
    replacement = work.recipe.replacement
    return replacement.layers if replacement.kind == "layer" else 0


def _size_plan(work: Compression) -> SizePlan:
    replacement = work.recipe.replacement
    added = 0
    if replacement.kind not in ("none", "layer"):
        added = network_parameters(replacement, work.config)
    plan = size_plan(work, added)
    total = work.config.num_hidden_layers
    if plan.n_layers + _slots(work) > total:
        raise SparsityError(
            f"Removing {plan.n_layers} layers and replacing {_slots(work)} more needs "
            f"{plan.n_layers + _slots(work)} layers, and the model has {total}; remove fewer."
        )
    return plan


def _train(work: Compression, block: Block) -> TrainingResult | None:
    recipe = work.recipe
    if recipe.replacement.kind == "none":
        return None
    data = recipe.training.data
    if data.source == "auto":
        data = data.model_copy(update={"source": recipe.calibration.source})
    result = train_replacement(
        work.model,
        start=block.start,
        n=block.n,
        spec=recipe.replacement,
        training=recipe.training,
        tokens=work.tokens(data),
        work=work.work / "training",
        seed=recipe.seed,
        device=work.device,
        progress=work.progress,
        quirks=recipe.reference_quirks,
        weights_sha256=work.reader.fingerprint(progress=work.progress),
    )
    for name, tensor in result.state.items():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(f"The trained replacement's '{name}' is not finite; lower the lr.")
    return result


def _assemble(
    work: Compression, block: Block, result: TrainingResult | None
) -> tuple[dict[str, Any], dict[str, str], dict[str, torch.Tensor], int]:
    """Return (config, copied names, new tensors, layers after)."""
    slots = _slots(work)
    depth = work.config.num_hidden_layers
    keep = block_keep(depth, block.start + slots, block.n - slots)
    family = architecture_of(work.config)
    names = dict(layer_names(work.reader, family, keep))
    host = pruned_config(work.config, keep)
    if result is None:
        return config_json(host), names, {}, len(keep)
    if slots:
        prefix = layers_prefix(work.reader, family)
        tensors = {}
        for key, tensor in result.state.items():
            index, _, rest = key.partition(".")
            tensors[f"{prefix}.{block.start + int(index)}.{rest}"] = tensor
        # Whole layers, not name by name: a checkpoint may store experts one by one that are fused
        # in the model.
        replaced = tuple(f"{prefix}.{block.start + i}." for i in range(slots))
        names = {new: old for new, old in names.items() if not new.startswith(replaced)}
        return config_json(host), names, as_stored(work, block.start, tensors), len(keep)
    config, tensors = attached(work, block.start, host, work.recipe.replacement, result.state)
    return config, names, tensors, len(keep)
