"""The loss of a model without each of its layers in turn, the layers below it computed once.

A pass over the present model records the input of each candidate layer; a candidate's own
evaluation begins above it. That is about half of the layers that evaluations from the bottom run.
Batches are the outer loop and candidates the inner one, so that one batch's states are held,
whatever the amount of calibration text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tqdm import tqdm

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.tools.likelihood import count_targets, next_token_loss
from streamline_bench.methods.tools.partial_forward import PartialForward, require_finite_states

__all__ = ["affordable_batch", "skip_losses"]


def skip_losses(
    model: Any,
    tokens: CalibrationTokens,
    candidates: Sequence[int],
    *,
    removed: Collection[int] = (),
    activations_gb: float = 8.0,
    progress: bool = True,
    description: str = "layers skipped",
) -> dict[int, float]:
    """Return layer -> mean negative log-likelihood per token (nats) without it.

    The values are those of separate passes through models without the layer: the same operations
    on the same numbers.

    Args:
        model: a causal LM; neither its weights nor its mode are changed.
        candidates: layers to leave out, one at a time.
        removed: layers left out always.
        activations_gb: most memory for the states and logits of a batch, in 10^9 bytes.

    Raises:
        CalibrationError: no token follows another, or one sequence exceeds the memory.
        NumericsError: the model's own states, or a loss, are NaN or infinite; the layer is named.
    """
    targets = count_targets(tokens)
    batch_size = affordable_batch(model, tokens, len(decoder_layers(model)), activations_gb)
    sums = dict.fromkeys(candidates, 0.0)
    total = len(sums) * len(tokens)
    with (
        PartialForward(model) as forward,
        tqdm(total=total, unit="seq", desc=description, delay=2, disable=not progress) as bar,
    ):
        for ids, mask in tokens.batches(batch_size, trim=True):
            last = forward.hidden(ids, mask, skip=removed, record=True)
            require_finite_states(forward.states, last, mask)
            del last
            for layer in sums:
                logits = forward.logits(
                    ids, mask, start=layer + 1, state=forward.states[layer], skip=removed
                )
                sums[layer] += next_token_loss(logits, ids, mask).item()
                bar.update(len(ids))
    for layer, loss in sums.items():
        if not abs(loss) < float("inf"):
            raise NumericsError(
                f"The loss of the model without layer {layer} is {loss}; check the weights, or "
                "try another dtype."
            )
    return {layer: loss / targets for layer, loss in sums.items()}


def affordable_batch(
    model: Any, tokens: CalibrationTokens, boundaries: int, activations_gb: float, limit: int = 8
) -> int:
    """Return how many sequences' states (at ``boundaries``) and logits fit into the memory.

    Raises:
        CalibrationError: not even one sequence does.
    """
    embedding = model.get_input_embeddings().weight
    vocabulary, hidden = embedding.shape
    values = (boundaries + 1) * hidden + 3 * vocabulary
    each = tokens.input_ids.shape[1] * values * max(embedding.element_size(), 4)
    if each > activations_gb * 1e9:
        raise CalibrationError(
            f"States and logits of one sequence of {tokens.input_ids.shape[1]} tokens need "
            f"{each / 1e9:.3g} GB and activations_gb is {activations_gb}; raise it or shorten "
            "sequence_length."
        )
    return int(min(limit, len(tokens), activations_gb * 1e9 // each))
