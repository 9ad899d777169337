"""What one pass of a training reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import sent


@dataclass(frozen=True)
class Batch:
    """Sequences on the model's device; columns in which all are padding are cut.

    Places are counted on the host: a boolean index would wait for the accelerator.

    Attributes:
        ids: int64 ``[batch, seq]``; mask: bool ``[batch, seq]``, true where there is a token.
        rows: which sequences of their set they are, int64 ``[batch]``, on the host.
        kept: int64 ``[tokens]``, places of the tokens among all ``batch * seq``.
        predicting: int64, places of those tokens that predict one that counts.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    kept: Tensor
    predicting: Tensor

    @classmethod
    def of(
        cls,
        ids: Tensor,
        mask: Tensor,
        rows: Tensor,
        targets: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Batch:
        """Send a batch that is on the host.

        Args:
            targets: bool ``[batch, seq]``, true for the tokens to predict; None: all.
            device: None for the host.
        """
        device = device or torch.device("cpu")
        predicting = nn.functional.pad(predicted(mask, targets), (0, 1))  # the last predicts none
        kept, wanted = (each.reshape(-1).nonzero()[:, 0] for each in (mask, predicting))
        return cls(
            sent(ids, device), sent(mask, device), rows, sent(kept, device), sent(wanted, device)
        )


def make_batch(
    tokens: CalibrationTokens, rows: Tensor, device: torch.device, among: Tensor | None = None
) -> Batch:
    """Gather sequences, ``rows`` int64 ``[batch]``; as wide as a batch of the rows ``among``."""
    mask = tokens.attention_mask[rows]
    whole = mask if among is None else tokens.attention_mask[among]
    used = int(whole.any(dim=0).nonzero().max()) + 1
    targets = None if tokens.target_mask is None else tokens.target_mask[rows, :used]
    return Batch.of(tokens.input_ids[rows, :used], mask[:, :used], rows, targets, device)


def predicted(mask: Tensor, targets: Tensor | None) -> Tensor:
    """Return which tokens but the last predict one that counts, bool ``[batch, seq - 1]``."""
    follows = mask[:, 1:] & mask[:, :-1]
    return follows if targets is None else follows & targets[:, 1:]
