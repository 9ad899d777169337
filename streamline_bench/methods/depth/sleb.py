"""SLEB (arXiv 2402.09025): removes one layer after another. Each step removes the layer without
which the remaining model has the lowest loss.

Of two redundant neighbours only one can be removed. A one-shot ranking misses that.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from streamline_bench.core.surgery import SizePlan
from streamline_bench.methods.base import Compression
from streamline_bench.methods.tools.likelihood import greedy_layers, skip_losses
from streamline_bench.methods.tools.selection import (
    LayerSelection,
    ProtectedEnds,
    Selected,
)
from streamline_bench.methods.tools.shared_scan import steps_once


class SLEBParameters(ProtectedEnds):
    """Parameters of the method ``sleb``.

    Attributes:
        protect_first, protect_last: the barriers; the paper's are one layer at each end.
        activations_gb: most memory for the states of a batch, in 10^9 bytes.
    """

    protect_first: int | None = Field(1, ge=0)
    protect_last: int | None = Field(1, ge=0)
    activations_gb: float = Field(8.0, gt=0)


class SLEB(LayerSelection):
    """Greedy removal by the loss of what is left."""

    name = "sleb"
    passes = frozenset({"losses"})
    streamed = True
    parameters: ClassVar[type[BaseModel]] = SLEBParameters
    seeded = False

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        """Remove layers greedily; an interrupted search continues after its last whole step."""
        allowed = options.candidates(plan.num_layers, plan.n_layers)
        tokens = work.tokens(work.recipe.calibration)
        losses = partial(
            skip_losses, work.model, tokens, activations_gb=options.activations_gb, work=work.work,
            progress=work.progress,
        )  # fmt: skip
        decided_by = [list(allowed), options.activations_gb]
        with steps_once(work, tokens, self.name, decided_by) as record:
            steps = greedy_layers(record, allowed, plan.n_layers, losses)
        removed = [step.part for step in steps]
        chosen = {
            "score": "nats per token of the model left",
            "order": removed,
            "loss_after_step": [step.loss for step in steps],
            "protected": options.protected(allowed, plan.num_layers),
        }
        return Selected(removed, chosen, tokens)
