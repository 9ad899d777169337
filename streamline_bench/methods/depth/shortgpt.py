"""ShortGPT (arXiv 2403.03853): removes the layers that change the hidden states least. Each
layer is ranked by itself; the removed ones need not be neighbours.

Block influence is ``BI_l = 1 - E[cos(h_l, h_{l+1})]`` over all tokens. The paper excludes no
layer. For the last layer the choice of its output matters: before or after the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel

from streamline_bench.core.similarity import LastState
from streamline_bench.methods.base import Compression
from streamline_bench.methods.tools.selection import ProtectedEnds, RankedLayers
from streamline_bench.methods.tools.shared_scan import scan_once


class ShortGPTParameters(ProtectedEnds):
    """Parameters of the method ``shortgpt``.

    Attributes:
        last_state: the state after the last layer, ``raw`` or after the final norm (as
            implementations that read ``output_hidden_states`` take it).
    """

    last_state: LastState = "raw"


class ShortGPT(RankedLayers):
    """One-shot ranking by block influence."""

    name = "shortgpt"
    streamed = True
    seeded = False
    parameters: ClassVar[type[BaseModel]] = ShortGPTParameters

    def scores(
        self, work: Compression, options: Any, candidates: range, tokens: Any
    ) -> tuple[Mapping[str, Any], Mapping[int, float]]:
        similarity = scan_once(work, tokens, options.last_state)
        facts = {"score": "block influence", "last_state": options.last_state}
        return facts, dict(enumerate(similarity.block_influence.tolist()))
