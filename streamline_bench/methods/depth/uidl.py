"""UIDL, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887): removes the
block across which the last token's hidden state turns least.

The angular distance is ``arccos(cos(h_l, h_{l+n})) / pi`` at the last token, averaged over the
sequences (equation 6). The last layer is kept. The paper's ``simple`` variant reads no data:
it removes the deepest n layers except the last.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.similarity import LastState
from streamline_bench.core.surgery import SizePlan
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.tools.selection import LayerSelection, Selected
from streamline_bench.methods.tools.shared_scan import scan_once


class UIDLParameters(Frozen):
    """Parameters of the method ``uidl``.

    Attributes:
        variant: ``angular`` searches for the block, ``simple`` takes the deepest except the last.
        last_state: the state after the last layer, ``raw`` or after the final norm; it matters
            with ``allow_last_layer`` only.
        allow_first_layer: let the block contain layer 0. The paper's rule does not forbid it and
            on large models it never happens; on small ones it ruins the model.
        allow_last_layer: let the block contain the last layer.
    """

    variant: Literal["angular", "simple"] = "angular"
    last_state: LastState = "raw"
    allow_first_layer: bool = False
    allow_last_layer: bool = False

    def most(self, num_layers: int) -> int:
        """Return how many layers may be removed."""
        last_goes = self.allow_last_layer and self.variant == "angular"
        return num_layers - (not self.allow_first_layer) - (not last_goes)


class UIDL(LayerSelection):
    """Contiguous block removal by angular distance."""

    name = "uidl"
    streamed = True
    parameters: ClassVar[type[BaseModel]] = UIDLParameters
    seeded = False

    def select(self, work: Compression, options: Any, plan: SizePlan) -> Selected:
        if options.variant == "simple":
            start = plan.num_layers - 1 - plan.n_layers
            if start == 0 and not options.allow_first_layer:
                raise SparsityError(
                    f"The deepest {plan.n_layers} of {plan.num_layers} layers before the last "
                    "include layer 0; remove fewer, or set parameters.allow_first_layer."
                )
            removed = list(range(start, start + plan.n_layers))
            chosen: dict[str, Any] = {"start": start, "variant": "simple"}
            return Selected(removed, chosen)
        tokens = work.tokens(work.recipe.calibration)
        similarity = scan_once(work, tokens, options.last_state)
        block = similarity.best_block(
            plan.n_layers,
            "angular",
            allow_first_layer=options.allow_first_layer,
            allow_last_layer=options.allow_last_layer,
        )
        scores = similarity.scores(plan.n_layers, "angular")
        chosen = {
            **asdict(block), "variant": "angular", "last_state": options.last_state,
            "scores": scores.tolist(), "best_start_without_guard": int(scores.argmin()),
        }  # fmt: skip
        removed = list(range(block.start, block.stop))
        return Selected(removed, chosen, tokens)
