"""PPL in OpenCompass's sense, against its formula written out."""

from __future__ import annotations

import pytest

from streamline_bench.errors import StreamlineBenchError
from streamline_bench.opencompass.engine import (
    ScoredText,
    continuation_start,
    spans_between,
)

PAD = 9


def written_out(ids: list[int], losses: list[float], masked: int | None) -> float:
    """``HuggingFaceBaseModel.get_ppl`` of OpenCompass 0.5.4 for one text, step by step.

    ``losses[j]`` is the loss of predicting ``ids[j + 1]``.
    """
    shifted = [0.0 if ids[j + 1] == PAD else loss for j, loss in enumerate(losses)]
    length = sum(token != PAD for token in ids)
    if masked is not None:
        keep = [0] * len(shifted)
        for j in range(masked - 1, len(shifted)):
            keep[j] = 1
        shifted = [loss * kept for loss, kept in zip(shifted, keep, strict=True)]
        length -= masked
    return sum(shifted) / length


@pytest.mark.parametrize("masked", [None, 1, 2, 4])
@pytest.mark.parametrize("ids", [[1, 5, 6, 7, 8], [1, 5, PAD, 7, 8, 3], [PAD, 1, 5, 6, 7, 3]])
def test_ppl_is_the_formula(ids: list[int], masked: int | None) -> None:
    losses = [0.5 + j for j in range(len(ids) - 1)]
    text = ScoredText.whole(ids, masked=masked or 0, padding=PAD)
    logprob = -sum(losses[at - 1] for start, end in text.spans for at in range(start, end))
    assert -logprob / text.divisor == pytest.approx(written_out(ids, losses, masked))


def test_divisor_includes_the_first_token() -> None:
    text = ScoredText.whole([1, 2, 3], padding=None)
    assert text.spans == ((1, 3),)
    assert text.divisor == 3


def test_one_token_has_a_ppl_of_zero() -> None:
    text = ScoredText.whole([1])
    assert (text.spans, text.divisor) == ((), 1)


@pytest.mark.parametrize(("ids", "masked"), [([], 0), ([1, 2], 2), ([PAD, PAD], 0)])
def test_nothing_to_divide_by_is_an_error(ids: list[int], masked: int) -> None:
    with pytest.raises(StreamlineBenchError, match="has no perplexity"):
        ScoredText.whole(ids, masked=masked, padding=PAD)


def test_spans_leave_padding_out() -> None:
    assert spans_between([1, PAD, 2, 3, PAD], 1, 5, padding=PAD) == ((2, 4),)
    assert spans_between([1, 2, 3], 2, 2) == ()


def test_continuation_must_end_the_text() -> None:
    assert continuation_start("a b a b", " b") == 5
    with pytest.raises(StreamlineBenchError, match="is not the end of the prompt"):
        continuation_start("a b c", "b")
    with pytest.raises(StreamlineBenchError, match="is not the end of the prompt"):
        continuation_start("a b c", "")
