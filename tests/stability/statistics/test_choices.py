"""Choice distributions against scipy and loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.statistics.choices import calibration, choice_shift, measure_choices

DENSE = np.array([[-3.0, -1.0, -2.0], [-8.0, -9.0, -9.5], [-1.0, -1.0, -1.0], [-900.0, -1.0, -5.0]])
PRUNED = np.array(
    [[-1.0, -2.0, -2.0], [-8.0, -9.0, -9.5], [-4.0, -1.0, -2.0], [-1.0, -900.0, -5.0]]
)
GOLD = [1, 0, 2, 1]


@pytest.fixture
def runs(questions: Callable[..., Samples]) -> tuple[Samples, Samples]:
    return (
        questions("dense", {"t": (DENSE, GOLD, None)}),
        questions("pruned", {"t": (PRUNED, GOLD, None)}),
    )


def test_divergences_are_scipys(runs: tuple[Samples, Samples]) -> None:
    found = measure_choices(runs[0].frame, runs[1].frame)
    assert found is not None
    p, q = softmax(DENSE, axis=1), softmax(PRUNED, axis=1)
    assert found.js == pytest.approx(jensenshannon(p, q, axis=1) ** 2, abs=1e-12)
    exact = [entropy(a, b) for a, b in zip(p[:3], q[:3], strict=True)]
    assert found.kl[:3] == pytest.approx(exact, abs=1e-12)
    assert found.kl[1] == 0.0 and found.js[1] == 0.0
    assert found.kl[3] == pytest.approx(p[3, 1] * 899), "far apart is large, not infinite"
    assert found.js[3] <= math.log(2)
    assert found.chance == pytest.approx(1 / 3)


def test_margins_and_brier_scores_are_those_of_a_loop(runs: tuple[Samples, Samples]) -> None:
    found = measure_choices(runs[0].frame, runs[1].frame)
    assert found is not None
    for side, scores in (("dense", DENSE), ("pruned", PRUNED)):
        for index, (line, gold) in enumerate(zip(scores, GOLD, strict=True)):
            share = softmax(line)
            others = [value for choice, value in enumerate(line) if choice != gold]
            brier = sum((share[c] - (c == gold)) ** 2 for c in range(3))
            assert getattr(found, f"{side}_margin")[index] == pytest.approx(
                line[gold] - max(others)
            )
            assert getattr(found, f"{side}_brier")[index] == pytest.approx(brier, abs=1e-12)
            assert getattr(found, f"{side}_top")[index] == pytest.approx(share.max())
            assert getattr(found, f"{side}_right")[index] == (share.argmax() == gold)
    shift = choice_shift(found, 0.95)
    assert shift is not None and shift.margin_shift is not None
    assert shift.n == shift.margin_n == 4
    assert shift.margin_shift.value == pytest.approx(
        (found.pruned_margin - found.dense_margin).mean()
    )
    assert shift.kl.low is not None and shift.kl.low >= 0.0


def test_different_numbers_of_choices_and_unknown_gold(questions: Callable[..., Samples]) -> None:
    """ARC has questions of three and of five choices; multiple right answers have no one gold."""
    scores = [[-1.0, -2.0], [-3.0, -1.0, -2.0], [-4.0]]
    dense = questions("dense", {"t": (scores, [0, 2, 0], None)})
    frame = dense.frame.copy()
    frame.loc[1, "gold"] = None
    found = measure_choices(frame, frame)
    assert found is not None
    assert found.chance[:2] == pytest.approx([1 / 2, 1 / 3]) and np.isnan(found.chance[2])
    assert np.isnan(found.dense_margin).tolist() == [False, True, True]
    shift = choice_shift(found, 0.95)
    assert shift is not None and (shift.n, shift.margin_n) == (2, 1)
    known = calibration(found, 0.95)
    assert known is not None and known.n == 1 and known.brier_shift.low is None


def test_text_has_none_and_scores_may_be_missing(runs: tuple[Samples, Samples]) -> None:
    frame = runs[0].frame
    assert measure_choices(frame.assign(choices=None), frame) is None
    unscored = measure_choices(frame.assign(loglikelihoods=None), frame)
    assert unscored is not None
    assert unscored.chance == pytest.approx(1 / 3)
    assert choice_shift(unscored, 0.95) is None and calibration(unscored, 0.95) is None
    partly = frame.copy()
    partly.at[2, "loglikelihoods"] = None
    with pytest.raises(SamplesError, match="document 2 has no 'loglikelihoods'"):
        measure_choices(partly, frame)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite_names_run_task_and_document(
    runs: tuple[Samples, Samples], value: float, side: int
) -> None:
    frames = [samples.frame.copy() for samples in runs]
    frames[side].at[2, "loglikelihoods"] = [-1.0, value, -2.0]
    name = ("dense", "pruned")[side]
    with pytest.raises(
        NumericsError, match=f"Run '{name}': Task 't', document 2, choice 1 has log-likelihood"
    ):
        measure_choices(*frames)
    assert replace(runs[side], frame=frames[side]).tasks == ("t",)
