"""How two runs are compared: the options of the command and of the library, in one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["correct", "correct_norm"]
"""Which verdict decides right or wrong: the task's own (acc, exact_match) or acc_norm."""


@dataclass(frozen=True)
class Settings:
    """How runs are compared.

    Attributes:
        mode: paper's stability, or the arithmetic of its script (which has no interval and ignores
            ``ddof``: it is always 0).
        quantity: None takes what the samples of the dense run record (``recorded_quantity``).
        draws: bootstrap draws for the intervals of stability and of clusters.
        margin: how large a drop of accuracy is tolerated, as a share (0.02 is two points).
        metrics: task or group -> the metric of its samples that decides, in place of its own.
        pairs: task with free answers -> the task that asks the same and gives choices, besides what
            the tasks themselves say.
    """

    mode: Mode = "paper"
    ddof: int = 1
    quantity: Quantity | None = None
    verdict: Verdict = "correct"
    confidence: float = 0.95
    draws: int = 10_000
    seed: int = 0
    margin: float = 0.02
    metrics: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)

    @property
    def spread_ddof(self) -> int:
        """The degrees of freedom really used."""
        return 0 if self.mode == "reference_script" else self.ddof

    def used(self) -> dict[str, Any]:
        """Name -> the value really used."""
        used = {"ddof": self.spread_ddof, "quantity": self.spread_quantity}
        return asdict(self) | used | {"metrics": dict(self.metrics), "pairs": dict(self.pairs)}

    @property
    def spread_quantity(self) -> Quantity:
        """The quantity really used; lm-eval's where none was chosen and no samples were seen."""
        return self.quantity or "nll_per_byte"


Mode = Literal["paper", "reference_script"]
"""``paper``: equation 6. ``reference_script``: the arithmetic of the script that the authors
published, which differs from the equation: population standard deviation (ddof 0), a softmax
without shift, and, of m agreements, the sum of the *first m* weights instead of the weights of the
agreeing questions. Its value depends on the order of the questions; it is here only to compare with
numbers that were made that way."""


Quantity = Literal[
    "nll_per_byte", "nll_per_char", "nll", "ppl_per_byte", "ppl_per_char", "mean_token_nll"
]
"""What stands for PPL_ij.

The paper writes perplexity; its script reads OpenCompass' ``PPL``, which is the mean token
*negative log-likelihood*, not exponentiated, over prompt and choice. lm-eval's samples hold the
choice's summed log-likelihood and its text, but not its number of tokens. So:

- ``nll_per_byte`` (default): -loglikelihood / UTF-8 bytes of the choice. Nearest to a mean token
  NLL that the samples allow: length-normalised, not exponentiated, and the same for every tokenizer
  and script (a byte, unlike a character, carries about the same information in English and
  Chinese). It covers the choice only, not the prompt, so spreads are larger than OpenCompass'.
- ``nll_per_char``: per character, lm-eval's own normalisation (acc_norm).
- ``nll``: not normalised; long choices then decide the weights.
- ``ppl_per_byte``, ``ppl_per_char``: the same, exponentiated.
- ``mean_token_nll``: what the engine itself reports (OpenCompass); absent from lm-eval's samples.
"""
