"""Parts of a comparison: estimates, shifts of choices, perplexities, generations, noise.

What is not defined (calibration without a known right choice) is None, never a stand-in number.
"""

from __future__ import annotations

from typing import Literal

from streamline_bench.core.frozen import Frozen

__all__ = [
    "Calibration",
    "ChoiceShift",
    "Clusters",
    "Estimate",
    "Flips",
    "GenerationComparison",
    "NoiseFloor",
    "NoiseTask",
    "PerplexityComparison",
    "TokenDivergence",
]


class Estimate(Frozen):
    """A number with what is known of its error; ``method`` names the interval's."""

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    method: str | None = None


class Flips(Frozen):
    """How many answers changed, by direction.

    ``wrong_to_other_wrong`` is None where the engine does not say what was chosen.
    """

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other_wrong: int | None


class Clusters(Frozen):
    """Documents that belong together (one passage, one subject) and are resampled together.

    Attributes:
        kind: what a cluster is, in the plural ("passages").
        count: clusters; documents that stand alone count as one each.
        largest: documents of the largest.
    """

    kind: str
    count: int
    largest: int


class ChoiceShift(Frozen):
    """How the distribution over the choices moved: softmax of their log-likelihoods.

    Attributes:
        n: documents with at least two choices.
        kl: mean KL(dense || pruned) per document, in nats.
        js: mean Jensen-Shannon divergence, in nats (at most ln 2).
        margin_n: documents of these with exactly one right choice.
        dense_margin, pruned_margin: mean of right choice minus best other choice, in nats.
        margin_shift: pruned margin - dense margin, mean per document.
    """

    n: int
    kl: Estimate
    js: Estimate
    margin_n: int
    dense_margin: float | None
    pruned_margin: float | None
    margin_shift: Estimate | None


class Calibration(Frozen):
    """Do the shares of the choices (softmax) mean what they say?

    Attributes:
        n: documents with exactly one right choice.
        bins: of equal numbers of documents: 15, or as many as leave 20 documents in each.
        dense_error, pruned_error: expected calibration error: mean over bins, weighted by their
            documents, of |accuracy - mean share of the chosen|.
        dense_brier, pruned_brier: mean over documents of the sum over choices of
            (share - [right])², in [0, 2].
        brier_shift: pruned - dense, mean per document.
    """

    n: int
    bins: int
    dense_error: float
    pruned_error: float
    dense_brier: float
    pruned_brier: float
    brier_shift: Estimate


class PerplexityComparison(Frozen):
    """Perplexity of texts (or of answers), dense against pruned, on the same documents.

    Attributes:
        unit: what a perplexity is per: "word", "byte" or "answer" (summed log-likelihood of the
            expected answer, lm-eval's ``perplexity``).
        dense, pruned: exp(-sum of log-likelihoods / units); None where float64 does not hold it.
        ratio: pruned / dense, with a paired interval over documents; None likewise.
        nats_per_unit: its logarithm: what the pruned model needs more per unit, in nats.
    """

    task: str
    filter: str
    unit: Literal["word", "byte", "answer"]
    n: int
    units: float
    dense: float | None
    pruned: float | None
    ratio: Estimate | None
    nats_per_unit: Estimate


class GenerationComparison(Frozen):
    """Generated texts, dense against pruned.

    A word is what whitespace separates. Indices count what is shared before the first difference; a
    text that is a beginning of the other differs where the shorter one ends.

    Attributes:
        identical: share of equal texts.
        first_word, first_character: median index of the first difference over the ``n`` -
            identical differing texts; None where all are identical.
        shared: mean share of the longer text's words before the first difference (identical: 1).
        dense_words, pruned_words: mean length.
        exact_match: pruned - dense, where the task has that verdict.
    """

    task: str
    filter: str
    n: int
    identical: Estimate
    first_word: float | None
    first_character: float | None
    shared: float
    dense_words: float
    pruned_words: float
    exact_match: Estimate | None


class TokenDivergence(Frozen):
    """Token distributions of two models on one text.

    Attributes:
        documents, windows, tokens: compared; a token is one position whose successor is known.
        window: longest sequence that the models read at once.
        kl: mean KL(dense || pruned) per token, in nats.
        same_top: share of tokens at which both models put the same token first.
        dense_perplexity, pruned_perplexity: of the text, per token; None beyond float64.
        nats_per_token: what the pruned model needs more per token: the logarithm of the ratio of
            the perplexities.
    """

    documents: int
    windows: int
    tokens: int
    window: int
    kl: Estimate
    same_top: Estimate
    dense_perplexity: float | None
    pruned_perplexity: float | None
    nats_per_token: Estimate


class NoiseTask(Frozen):
    """Dense against dense again on one (task, filter), mean over the repetitions."""

    task: str
    filter: str
    n: int
    flips: Estimate
    agreement: Estimate
    same_choice: float | None
    choice_kl: float | None


class NoiseFloor(Frozen):
    """What changes when nothing was removed (batch size, dtype or engine changed only).

    Attributes:
        repeats: labels of the repetitions.
        flips, agreement: over all documents of all tasks.
        macro_flips: mean over tasks.
        choice_kl: mean over tasks that have choices.
    """

    dense_run: str
    repeats: tuple[str, ...]
    tasks: tuple[NoiseTask, ...]
    n: int
    flips: Estimate
    agreement: Estimate
    macro_flips: float
    choice_kl: float | None
