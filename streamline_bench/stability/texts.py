"""What a comparison finds in texts: those that models are given, and those that they write.

What is not defined for a text is None, never a stand-in number.
"""

from __future__ import annotations

from typing import Literal

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.stability.estimate import Estimate


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


class TextChange(Frozen):
    """A property of generated texts: means of both models, and pruned - dense, paired."""

    dense: float
    pruned: float
    difference: Estimate


class LengthChange(Frozen):
    """Tokens of answers: of both models, and pruned / dense, paired; None where that is undefined.

    Attributes:
        dense, pruned: mean per document, or per solved question (None where none is solved).
    """

    dense: float | None
    pruned: float | None
    ratio: Estimate | None


class GenerationComparison(Frozen):
    """Generated texts, dense against pruned, as the models wrote them: before any filter.

    Of several repetitions the first counts. A word is what whitespace separates. Indices count what
    is shared before the first difference; a text that is a beginning of the other differs where the
    shorter one ends.

    Attributes:
        identical: share of equal texts.
        first_word, first_character: median index of the first difference over the ``n`` -
            identical differing texts; None where all are identical.
        shared: mean share of the longer text's words before the first difference (identical: 1).
        dense_words, pruned_words: mean length.
        length_ratio: pruned_words / dense_words, with an interval over documents.
        empty: share of texts without a word.
        repetition: share of a text's runs of four words that stand in it before, mean over texts
            (seq-rep-4 of S. Welleck et al., arXiv:1908.04319); 0 for fewer than five words.
        exact_match: pruned - dense, where the task has verdicts.
        tokens: generated until the answer ended, thoughts included; None, as all that follows,
            where the model did not note them.
        thinking: those of them until the thoughts ended; None where no answer has thoughts.
        unfinished: share of answers that reached the limit of tokens without an end.
        tokens_per_solved: tokens of all answers / right answers, where the task has verdicts.
        noise_changed: share of texts that change between dense and dense again.
        changed_above_noise: share of texts that are not identical, minus ``noise_changed``.
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
    length_ratio: Estimate | None = None
    empty: TextChange | None = None
    repetition: TextChange | None = None
    tokens: LengthChange | None = None
    thinking: LengthChange | None = None
    unfinished: TextChange | None = None
    tokens_per_solved: LengthChange | None = None
    noise_changed: float | None = None
    changed_above_noise: Estimate | None = None


class TokenDivergence(Frozen):
    """Token distributions of two models on one text.

    Attributes:
        documents, windows, tokens: compared; a token is one position whose successor is known.
        window: longest sequence that the models read at once.
        begins_with: what each window begins with: the tokenizer's BOS token, or ``text`` where it
            puts none there; empty in records of older versions.
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
    begins_with: str = ""
    kl: Estimate
    same_top: Estimate
    dense_perplexity: float | None
    pruned_perplexity: float | None
    nats_per_token: Estimate


class MeasuredDivergence(TokenDivergence):
    """The same with what it was summed over, so that two models can be compared document by
    document.

    Attributes:
        by_document: tokens, and KL summed over them in nats, of each document that has any, in
            their order; empty in records of older versions.
    """

    by_document: tuple[tuple[int, float], ...] = ()
