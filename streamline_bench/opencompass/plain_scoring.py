"""The slow way that every causal LM allows: one text, all logits, float32 log-softmax."""

from __future__ import annotations

import torch

from streamline_bench.harness.scoring.forward import Forward
from streamline_bench.opencompass.perplexity import ScoredText

__all__ = ["plain_logprob"]


def plain_logprob(forward: Forward, text: ScoredText) -> float:
    """Return the summed log-probability (nats) of a text's spans."""
    if not text.spans:
        return 0.0
    ids = torch.tensor([list(text.ids)])
    logprobs = forward.all_logits(ids)[0].float().log_softmax(-1).cpu()
    total = 0.0
    for start, end in text.spans:
        picked = logprobs[start - 1 : end - 1].gather(-1, ids[0, start:end, None])
        total += float(picked.double().sum())
    return total
