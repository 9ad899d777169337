"""Shortened LLaMA by perplexity (arXiv 2402.02834): the layers whose absence the model's
likelihood suffers least from go, ranked once, each left out alone.

Perplexity is ``exp`` of the mean loss that is compared here, so that the order is the same.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field

from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.depth import drop_layers, size_plan
from streamline_bench.methods.layer_scores import ProtectedEnds, record, select_lowest
from streamline_bench.methods.skip_losses import skip_losses

__all__ = ["ShortenedLlamaPPL", "ShortenedLlamaPPLParameters"]


class ShortenedLlamaPPLParameters(ProtectedEnds):
    """Parameters of the method ``shortened_llama_ppl``.

    Attributes:
        activations_gb: most memory for the states of a batch, in 10^9 bytes.
    """

    activations_gb: float = Field(8.0, gt=0)


class ShortenedLlamaPPL(Method):
    """One-shot ranking by the loss without each layer."""

    name = "shortened_llama_ppl"
    parameters: ClassVar[type[BaseModel]] = ShortenedLlamaPPLParameters

    def compress(self, work: Compression) -> Compressed:
        """Evaluate the model without each layer and drop those it misses least."""
        options = ShortenedLlamaPPLParameters.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        tokens = work.tokens(work.recipe.calibration)
        losses = skip_losses(
            work.model,
            tokens,
            candidates,
            activations_gb=options.activations_gb,
            progress=work.progress,
        )
        removed = select_lowest(losses, plan.n_layers)
        chosen = record(losses, removed, "nats per token without the layer")
        chosen["protected"] = options.protected(candidates, plan.num_layers)
        return drop_layers(work, removed, plan, chosen=chosen, tokens=tokens)
