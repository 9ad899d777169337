"""Removal of single attentions and MLPs, by similarity or by the loss of what is left.

- :class:`SublayerDrop` (arXiv 2406.15786): one-shot. The importance of a sub-layer is
  ``1 - E[cos(x, x + f(norm(x)))]``, between the residual stream before and behind it, over all
  tokens; the least important go. Attention drop, MLP drop, and joint drop, which ranks both
  together.
- :class:`BlockPruner` (arXiv 2406.10594): one attention or MLP after the other, each time the one
  without which the remaining model has the lowest perplexity.

Both remove a sub-layer with its norm. A layer without attention caches no keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of, decoder_layers, depth_of
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import (
    LayersEntangled,
    PartialForward,
    entangled,
    require_finite_states,
    sent,
    walk_states,
)
from streamline_bench.core.state_store import state_store, states_bytes
from streamline_bench.core.streaming import is_streamed
from streamline_bench.errors import NumericsError
from streamline_bench.methods.base import Compressed, Compression, Method, Size
from streamline_bench.methods.tools.likelihood import greedy_search, skip_losses
from streamline_bench.methods.tools.shared_scan import scores_once, steps_once
from streamline_bench.methods.tools.sizes import Stored, stored_bytes
from streamline_bench.methods.tools.sublayer_removal import (
    Removal,
    SublayerParameters,
    require_two_sublayers,
)
from streamline_bench.modeling.sublayers import Sublayer, SublayerKind


class _SublayerMethod(Method):
    removes = "sub-layers"
    seeded = False

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield the model without 1, 2, … sub-layers, those of the fewest bytes."""
        options: Any = self.parameters.model_validate(work.recipe.parameters)
        recipe = work.recipe.model_copy(update={"sparsity": None})
        removal = Removal(replace(work, recipe=recipe), options.model_copy(update={"sublayers": 1}))
        reader, stored = work.reader, Stored.of(work.reader)
        of = removal.tensors
        nbytes = {one: sum(stored_bytes(reader, name) for name in of[one])
                  for one in removal.candidates}  # fmt: skip
        cached = {(layer, kind): stored.cached[layer] * (kind == "attention")
                  for layer, kind in nbytes} if stored.cached else {}  # fmt: skip
        counts = sorted(removal.parameters([one]) for one in nbytes)
        taken: list[Sublayer] = []
        for one in sorted(nbytes, key=lambda one: nbytes[one]):
            if not removal.allowed([*taken, one]):
                continue
            taken.append(one)
            n = len(taken)
            yield stored.less(
                {"parameters.sublayers": n}, parameters=sum(counts[:n]),
                nbytes=sum(nbytes[one] for one in taken), cached=sum(sorted(cached.values())[:n]),
            )  # fmt: skip

    def stock(self, recipe: Any) -> bool:
        """No stock class has layers without attention or MLP."""
        return False


class SublayerDrop(_SublayerMethod):
    """The sub-layers whose outputs change the stream least, all at once."""

    name = "sublayer_drop"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = SublayerParameters

    def compress(self, work: Compression) -> Compressed:
        """Score the sub-layers and leave out those of the highest cosine."""
        options = SublayerParameters.model_validate(work.recipe.parameters)
        removal = Removal(work, options)
        tokens = work.tokens(work.recipe.calibration)
        require_two_sublayers(work.model, tokens)
        kinds: tuple[SublayerKind, ...] = ("attention", "mlp")

        def look() -> dict[str, Tensor]:
            cosines = sublayer_cosines(work, tokens)
            depth = range(depth_of(work.config))
            return {kind: torch.tensor([cosines[layer, kind] for layer in depth],
                                       dtype=torch.float64) for kind in kinds}  # fmt: skip

        found = scores_once(work, tokens, self.name, "cosines", look)
        scores: dict[Sublayer, float] = {
            (layer, kind): score
            for kind in kinds
            for layer, score in enumerate(found[kind].tolist())
        }
        for (layer, kind), score in scores.items():
            if not abs(score) <= 1.1:
                raise NumericsError(
                    f"The cosine of layer {layer}'s {kind} is {score}; check the weights, or try "
                    "another dtype."
                )
        # Of equals the first candidate, as in a stable sort.
        order = sorted(removal.candidates, key=lambda each: -scores[each])
        facts = {
            "score": "cosine of the stream before and behind the sub-layer",
            "scores": _by_kind(removal, scores),
        }
        return removal.result(removal.chosen(order), facts=facts, tokens=tokens)


def _by_kind(removal: Removal, scores: dict[Sublayer, float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for layer, kind in removal.candidates:
        found.setdefault(kind, {})[str(layer)] = scores[layer, kind]
    return found


def sublayer_cosines(
    work: Compression, tokens: CalibrationTokens, batch_size: int = 4
) -> dict[Sublayer, float]:
    """Return the mean cosine of the stream before and behind each sub-layer, over all tokens.

    Cosines are computed in float32 and summed in float64.

    Raises:
        ArchitectureError: the layers of a streamed model cannot be run one by one.
    """
    model, batches = work.model, list(tokens.batches(batch_size, trim=True))
    depth, sums = len(decoder_layers(model)), dict[Sublayer, Tensor]()

    def add(layer: int, number: int, before: Tensor, behind: Tensor) -> None:
        between, counted = middles.pop(layer), sent(batches[number][1], before.device)
        for kind, one, other in (("attention", before, between), ("mlp", between, behind)):
            cosines = nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)
            total = cosines.double().masked_fill(~counted, 0.0).sum()
            each: Any = layer, kind
            sums[each] = sums[each] + total if each in sums else total

    with torch.no_grad(), _between(model) as middles:
        if is_streamed(model):
            size = 2 * states_bytes(model, batches)
            try:
                with state_store(model, size, work.work) as store:
                    walk_states(model, batches, {depth}, store, visit=add, progress=work.progress)
            except LayersEntangled:
                raise entangled(model) from None
        else:
            bar = tqdm(batches, desc="similarity", delay=2, disable=not work.progress)
            with PartialForward(model) as forward:
                for number, (ids, mask) in enumerate(bar):
                    last = forward.hidden(ids, mask, record=True)
                    require_finite_states(forward.states, last, mask)
                    for layer in range(depth):
                        add(layer, number, forward.states[layer], forward.states[layer + 1])
    return {each: float(total) / tokens.num_tokens for each, total in sums.items()}


@contextmanager
def _between(model: Any) -> Iterator[dict[int, Tensor]]:
    """Yield layer -> the last states between its sub-layers."""
    row, seen = architecture_of(model.config), dict[int, Tensor]()

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [
        layer.get_submodule(row.mlp_norm or row.mlp).register_forward_pre_hook(
            watch(index), with_kwargs=True
        )
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class BlockPrunerParameters(SublayerParameters):
    """Parameters of the method ``block_pruner``.

    Attributes:
        activations_gb: most memory for the states of a batch, in 10^9 bytes.
    """

    activations_gb: float = Field(8.0, gt=0)


class BlockPruner(_SublayerMethod):
    """Greedy removal of sub-layers by the loss of what is left."""

    name = "block_pruner"
    streamed = True
    passes = frozenset({"losses"})
    parameters: ClassVar[type[BaseModel]] = BlockPrunerParameters

    def compress(self, work: Compression) -> Compressed:
        """Remove sub-layers greedily; an interrupted search continues after its last whole step."""
        options = BlockPrunerParameters.model_validate(work.recipe.parameters)
        removal = Removal(work, options)
        tokens = work.tokens(work.recipe.calibration)
        require_two_sublayers(work.model, tokens)
        losses = partial(
            skip_losses, work.model, tokens, activations_gb=options.activations_gb, work=work.work,
            progress=work.progress,
        )  # fmt: skip

        def candidates(order: Sequence[Sublayer]) -> list[Sublayer]:
            if removal.enough(order):
                return []
            left = (each for each in removal.candidates if each not in order)
            return [each for each in left if removal.allowed([*order, each])]

        decided_by = options.model_dump(mode="json", exclude={"sublayers"})
        with steps_once(work, tokens, self.name, decided_by) as record:
            steps = greedy_search(
                record,
                candidates,
                lambda left, order: losses(
                    left, removed=order, description=f"sub-layer {len(order) + 1} to remove"
                ),
            )
        removed = removal.chosen(step.part for step in steps)
        facts = {
            "score": "nats per token of the model left",
            "loss_after_step": [step.loss for step in steps[: len(removed)]],
        }
        return removal.result(removed, facts=facts, tokens=tokens)
