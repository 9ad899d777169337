"""SLEB (arXiv 2402.09025): removes one layer after another. Each step removes the layer without
which the remaining model has the lowest loss.

Of two redundant neighbours only one can be removed. A one-shot ranking misses that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.surgery import SizePlan
from streamline_bench.methods.base import Compression
from streamline_bench.methods.tools.likelihood import skip_losses
from streamline_bench.methods.tools.selection import (
    LayerSelection,
    ProtectedEnds,
    Selected,
    select_lowest,
)


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
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        tokens = work.tokens(work.recipe.calibration)
        progress_file = work.work / "sleb.json"
        steps: list[dict[str, Any]] = []
        if progress_file.exists():
            steps = json.loads(progress_file.read_text(encoding="utf-8"))
        while len(steps) < plan.n_layers:
            layer, loss = greedy_removal(
                work.model,
                tokens,
                candidates,
                [step["layer"] for step in steps],
                activations_gb=options.activations_gb,
                work=work.work,
                progress=work.progress,
            )
            steps.append({"layer": layer, "loss": loss})
            atomic_write_text(progress_file, json.dumps(steps))
        steps = steps[: plan.n_layers]
        removed = [step["layer"] for step in steps]
        chosen = {
            "score": "nats per token of the model left",
            "order": removed,
            "loss_after_step": [step["loss"] for step in steps],
            "protected": options.protected(candidates, plan.num_layers),
        }
        return Selected(removed, chosen, tokens)


def greedy_removal(
    model: Any,
    tokens: CalibrationTokens,
    candidates: range,
    removed: list[int],
    *,
    activations_gb: float = 8.0,
    work: Path | None = None,
    progress: bool = True,
) -> tuple[int, float]:
    """Return the next layer to remove after ``removed``, and the loss (nats) that it leaves.

    Layers below a candidate run once for all candidates. The states of one step are not kept for
    the next: that would spare one pass in as many as there are candidates, and hold the states of
    all calibration tokens.
    """
    losses = skip_losses(
        model,
        tokens,
        [layer for layer in candidates if layer not in removed],
        removed=removed,
        activations_gb=activations_gb,
        work=work,
        progress=progress,
        description=f"layer {len(removed) + 1} to remove",
    )
    best = select_lowest(losses, 1)[0]
    return best, losses[best]
