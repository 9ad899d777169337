"""The next-token loss that likelihood-based selections minimise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamline_bench.errors import CalibrationError

if TYPE_CHECKING:
    from streamline_bench.core.data.calibration import CalibrationTokens

__all__ = ["count_targets", "next_token_loss"]


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the negative log-likelihood summed over all tokens but each sequence's first, nats.

    Sequences are taken one by one, so that only one is held in float32.

    Args:
        logits: ``[batch, seq, vocabulary]``.
        ids: int64 ``[batch, seq]``, padded on the right.
        mask: bool ``[batch, seq]``; pads are neither predicted nor predicted from.

    Returns:
        A scalar: float32, float64 for float64 logits; carries gradients if the logits do.
    """
    total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, tokens, length in zip(logits, ids, mask.sum(dim=1).tolist(), strict=True):
        targets = tokens[1:length].to(logits.device)
        predicted = row[: length - 1].to(total.dtype)
        total = total + nn.functional.cross_entropy(predicted, targets, reduction="sum")
    return total


def count_targets(tokens: CalibrationTokens) -> int:
    """Return how many tokens :func:`next_token_loss` is a sum over.

    Raises:
        CalibrationError: none, as no sequence has a second token.
    """
    count = tokens.num_tokens - len(tokens)
    if count < 1:
        raise CalibrationError(
            f"Calibration source {tokens.source} gives {tokens.num_tokens} tokens in "
            f"{len(tokens)} sequences, so that none follows another; give more text."
        )
    return count
