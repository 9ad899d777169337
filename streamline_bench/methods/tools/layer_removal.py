"""What methods share that remove layers: how many, which ones, and the checkpoint that remains.

Layers are chosen from one score per layer, or as a block from the similarity of one scan.
"""

from __future__ import annotations

import json
import logging
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from streamline_bench.core.architecture import architecture_of, config_of, depth_of
from streamline_bench.core.architecture_guard import facts_of, tensors_by_layer
from streamline_bench.core.checkpoint.quantization import MODELOPT_NAME, renumbered
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layer_dtype, layer_names, layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Frozen, ReplacementSpec
from streamline_bench.core.similarity import Block, LastState, Metric, Similarity
from streamline_bench.core.surgery import (
    SizePlan,
    block_keep,
    layers_for_sparsity,
    of_layers,
    pruned_config,
)
from streamline_bench.errors import NumericsError, SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.tools.shared_scan import SIMILARITY_FILE

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def size_plan(work: Compression, added_parameters: int = 0) -> SizePlan:
    """Return how many layers the recipe's sparsity (or number of layers) amounts to.

    Args:
        added_parameters: what a replacement puts in.

    Raises:
        SparsityError: out of range, or out of reach for this model.
    """
    return layers_for_sparsity(
        work.reader,
        work.recipe.sparsity,
        n_layers=work.recipe.n_layers,
        added_parameters=added_parameters,
    )


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


def drop_layers(
    work: Compression,
    removed: Sequence[int],
    plan: SizePlan,
    *,
    chosen: Mapping[str, Any],
    tokens: CalibrationTokens | None = None,
) -> Compressed:
    """Return the result of dropping ``removed`` and changing nothing else.

    Args:
        removed: layer indices of the source, in any order.
        plan: from :func:`size_plan`; recorded.
        chosen: what the method decided (scores, order, …); recorded.
        tokens: what it looked at.
    """
    gone = sorted(set(removed))
    keep = [index for index in range(depth_of(work.config)) if index not in gone]
    size = asdict(of_layers(plan, work.reader, gone))
    family = architecture_of(work.config)
    pruned = pruned_config(work.config, keep)
    names = {**layer_names(work.reader, family, keep), **_shared_names(work, keep)}
    tensors = _of_kept_layers(work, pruned, keep)
    return Compressed(
        config=config_json(pruned),
        names={new: old for new, old in names.items() if new not in tensors},
        tensors=tensors,
        layers_after=len(keep),
        chosen={"removed_layers": gone, **chosen, "size": size},
        calibration=tokens.summary() if tokens is not None else {},
        artefacts=_files(work, keep),
    )


def _of_kept_layers(work: Compression, pruned: Any, keep: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors outside the layers that have a part for each, with those that stay."""
    import torch

    family = architecture_of(work.config)
    found: dict[str, Tensor] = {}
    for name, dimension in tensors_by_layer(work.config, pruned, family).items():
        bare = name.removeprefix(f"{family.base}.")
        stored = name if name in work.reader.names else bare
        if stored in work.reader.names:
            parts = work.reader.tensor(stored).chunk(depth_of(work.config), dimension)
            found[stored] = torch.cat([parts[index] for index in keep], dimension)
    return found


def _shared_names(work: Compression, keep: Sequence[int]) -> dict[str, str]:
    """Return new name -> old one of weights that a removed layer holds for others, too."""
    family = architecture_of(work.config)
    prefix, names = layers_prefix(work.reader, family), set(work.reader.names)
    found: dict[str, str] = {}
    shared = facts_of(work.config, family).shared
    for place, index in enumerate(keep):
        for name, holder in shared[index].items():
            old = f"{prefix}.{holder}.{name}"
            if holder not in keep and old in names and old not in found.values():
                found[f"{prefix}.{place}.{name}"] = old
    return found


class RankedLayers(Method):
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

    def compress(self, work: Compression) -> Compressed:
        """Score the layers and drop the lowest."""
        options: Any = self.parameters.model_validate(work.recipe.parameters)
        plan = size_plan(work)
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
        return drop_layers(work, removed, plan, chosen=chosen, tokens=tokens)


def attached(
    work: Compression, block: Block, spec: ReplacementSpec, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of a network in the place of a removed block.

    Args:
        state: tensors of the network by name.
    """
    from streamline_bench.modeling import Attachment, streamline_config

    family = architecture_of(work.config)
    keep = block_keep(depth_of(work.config), block.start, block.n)
    config = pruned_config(work.config, keep)
    attachment = Attachment.of(spec, work.config, block.start - 1)
    layers = layers_prefix(work.reader, family)
    prefix = attachment.tensor_prefix(config).replace(family.layers, layers, 1)
    tensors = {prefix + name: tensor for name, tensor in state.items()}
    stored = as_stored(work, block.start, tensors)
    return config_json(streamline_config(config, [attachment])), stored


def as_stored(work: Compression, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast tensors to the dtype in which the source stores a layer."""
    dtype = layer_dtype(work.reader, architecture_of(work.config), layer)
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def _files(work: Compression, keep: Sequence[int]) -> dict[str, str]:
    """Return the scan, and the settings that modelopt keeps in a file of its own, where they are.

    The settings are those of the layers that stay.
    """
    scanned, modelopt = work.work / SIMILARITY_FILE, work.folder / MODELOPT_NAME
    found = {}
    if scanned.exists():
        found[SIMILARITY_FILE] = scanned.read_text(encoding="utf-8")
    if modelopt.is_file():
        settings = json.loads(modelopt.read_text(encoding="utf-8"))
        wrapper = work.reader.wrapper
        if wrapper is None:
            settings = renumbered(settings, keep)
        else:  # which names layers of towers as well
            settings = wrapper.outer_settings(
                renumbered(wrapper.text_settings(settings), keep), settings
            )
        found[MODELOPT_NAME] = json.dumps(settings, indent=4) + "\n"
    return found


def config_json(config: Any) -> dict[str, Any]:
    """Return a transformers config as the mapping that ``config.json`` holds.

    Entries that transformers 5 calls otherwise have their older names as well, so that other
    readers find them, unless transformers 5 would then read another config.
    """
    parsed: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    kind = type(config)

    def read(entries: Mapping[str, Any]) -> Any:
        return config_of(kind, entries).to_dict()

    expected = read(parsed)
    for key, value in _older_names(parsed).items():
        both = {key: value, **parsed}
        # Some configs take one of the two names only.
        with suppress(TypeError, ValueError, KeyError, AttributeError):
            parsed = both if read(both) == expected else parsed
    return parsed


def _older_names(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config that older versions of transformers call otherwise."""
    found = {"torch_dtype": parsed["dtype"]} if parsed.get("dtype") else {}
    rope = parsed.get("rope_parameters") or {}
    if isinstance(rope.get("full_attention"), Mapping):  # settings per kind of layer
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    found |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    return found


def is_linear_weight(name: str, dimensions: int) -> bool:
    """Whether a tensor of a decoder layer is a projection's weight.

    Those have two dimensions, or three where experts are fused; norms have one. Biases are left
    out by name: fused experts have two-dimensional ones.
    """
    return dimensions >= 2 and not name.endswith("bias")


def stored_linear_weights(reader: CheckpointReader, num_layers: int) -> list[dict[str, str]]:
    """Return, for each of the decoder's layers, name within the layer -> name in the checkpoint.

    Layers beyond the decoder (multi-token prediction) are not listed.
    """
    family = architecture_of(reader.config)
    pattern = re.compile(re.escape(layers_prefix(reader, family)) + r"\.(\d+)\.(.+)")
    layers: list[dict[str, str]] = [{} for _ in range(num_layers)]
    for name in reader.names:
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) >= len(layers) or name.endswith(family.buffers):
            continue
        if is_linear_weight(name, len(reader.entry(name).shape)):
            layers[int(match[1])][match[2]] = name
    return layers
