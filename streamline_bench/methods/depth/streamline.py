"""LLM-Streamline (arXiv 2403.19135): drop the block that changes the hidden states least,
and train one lightweight network to stand in for it.

The number of layers fewer in the result is what ``n_layers`` (or the sparsity solver) says. A
replacement of kind ``layer`` takes k slots of its own, so that a block of n + k layers is removed;
the feed-forward kinds are not decoder layers, so that a block of n is removed.
"""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

from pydantic import BaseModel

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.replacement import network_parameters
from streamline_bench.core.similarity import Block
from streamline_bench.core.training import TrainingResult, train_replacement
from streamline_bench.errors import NumericsError, SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.tools.layer_removal import as_stored, attached, drop_layers, size_plan
from streamline_bench.methods.tools.selection import BlockSearch
from streamline_bench.methods.tools.shared_scan import scan_once


class Streamline(Method):
    """Contiguous block removal with an optional trained replacement."""

    name = "streamline"
    parameters: ClassVar[type[BaseModel]] = BlockSearch
    reads = frozenset({"replacement", "training", "reference_quirks"})
    seeded = False  # but for the training of a replacement

    def stock(self, recipe: Recipe) -> bool:
        """Layers are stock; feed-forward networks in their place are not."""
        return recipe.replacement.kind in ("none", "layer")

    def streams(self, recipe: Recipe) -> bool:
        """Whether no pass goes backwards through the model."""
        return recipe.replacement.kind == "none" or recipe.training.objective not in ("lm", "kd")

    def compress(self, work: Compression) -> Compressed:
        """Scan, choose the block, train the replacement if there is one."""
        options = BlockSearch.model_validate(work.recipe.parameters)
        replacement, slots = work.recipe.replacement, _slots(work)
        network = replacement.kind not in ("none", "layer")
        plan = size_plan(work, network_parameters(replacement, work.config) if network else 0)
        if plan.n_layers + slots > plan.num_layers:
            raise SparsityError(
                f"Removing {plan.n_layers} layers and replacing {slots} more needs "
                f"{plan.n_layers + slots} layers, and the model has {plan.num_layers}; remove "
                "fewer."
            )
        tokens = work.tokens(work.recipe.calibration)
        similarity = scan_once(work, tokens, options.last_state)
        block = options.choose(similarity, plan.n_layers + slots)
        trained = _train(work, block)
        scores = similarity.scores(block.n, options.metric)
        best = scores.argmax() if options.metric == "cosine" else scores.argmin()
        chosen = {
            "start": block.start, "removed_layers": list(range(block.start, block.stop)),
            "score": block.score, "metric": options.metric, "last_state": options.last_state,
            "best_start_without_guard": int(best),
        }  # fmt: skip
        gone = range(block.start + slots, block.stop)
        result = drop_layers(work, gone, plan, chosen=chosen, tokens=tokens)
        return result if trained is None else _with_trained(work, block, result, trained)


def _slots(work: Compression) -> int:
    """Decoder layers that the replacement itself puts in."""
    replacement = work.recipe.replacement
    return replacement.layers if replacement.kind == "layer" else 0


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
        at_once=work.at_once,
    )
    for name, tensor in result.state.items():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(f"The trained replacement's '{name}' is not finite; lower the lr.")
    return result


def _with_trained(
    work: Compression, block: Block, result: Compressed, trained: TrainingResult
) -> Compressed:
    """Put the trained replacement into a result that merely drops layers."""
    config, names, slots = result.config, result.names, _slots(work)
    if slots:
        prefix = layers_prefix(work.reader, architecture_of(work.config))
        state = {}
        for key, tensor in trained.state.items():
            index, _, rest = key.partition(".")
            state[f"{prefix}.{block.start + int(index)}.{rest}"] = tensor
        # Whole layers, not name by name: a checkpoint may store experts one by one that are fused
        # in the model.
        replaced = tuple(f"{prefix}.{block.start + i}." for i in range(slots))
        names = {new: old for new, old in names.items() if not new.startswith(replaced)}
        tensors = as_stored(work, block.start, state)
    else:
        config, tensors = attached(
            work, [range(block.start, block.stop)], work.recipe.replacement, [trained.state]
        )
    curve = "".join(json.dumps(row) + "\n" for row in trained.curve)
    return dataclasses.replace(
        result,
        config=config,
        names=names,
        tensors={**result.tensors, **tensors},
        training=dict(trained.summary),
        artefacts={**result.artefacts, "training_curve.jsonl": curve},
    )
