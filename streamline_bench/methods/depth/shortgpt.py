"""ShortGPT (arXiv 2403.03853): removes the layers that change the hidden states least. Each
layer is ranked by itself; the removed ones need not be neighbours.

Block influence is ``BI_l = 1 - E[cos(h_l, h_{l+1})]`` over all tokens. The paper excludes no
layer. For the last layer the choice of its output matters: before or after the final norm.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from streamline_bench.core.scan.similarity import LastState
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.tools.layer_removal import drop_lowest, size_plan
from streamline_bench.methods.tools.layer_selection import ProtectedEnds, scan_once


class ShortGPTParameters(ProtectedEnds):
    """Parameters of the method ``shortgpt``.

    Attributes:
        last_state: the state after the last layer, ``raw`` or after the final norm (as
            implementations that read ``output_hidden_states`` take it).
    """

    last_state: LastState = "raw"


class ShortGPT(Method):
    """One-shot ranking by block influence."""

    name = "shortgpt"
    parameters: ClassVar[type[BaseModel]] = ShortGPTParameters

    def compress(self, work: Compression) -> Compressed:
        """Scan once and drop the layers of lowest influence."""
        options = ShortGPTParameters.model_validate(work.recipe.parameters)
        plan = size_plan(work)
        candidates = options.candidates(plan.num_layers, plan.n_layers)
        tokens = work.tokens(work.recipe.calibration)
        similarity = scan_once(work, tokens, options.last_state)
        influence = similarity.block_influence.tolist()
        scores, what = dict(enumerate(influence)), "block influence"
        state = options.last_state
        return drop_lowest(work, plan, scores, candidates, what, tokens, last_state=state)
