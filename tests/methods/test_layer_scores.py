"""Selection from scores: published orders, ends that stay, scores that are no numbers."""

from __future__ import annotations

import math

import pytest

from streamline_bench.errors import NumericsError, SparsityError
from streamline_bench.methods.layer_scores import ProtectedEnds, select_lowest

SHORTGPT = {
    "Llama-2-7B": (32, [27, 26, 25, 28, 24, 29, 23, 21, 22]),
    "Llama-2-13B": (40, [33, 31, 32, 30, 29, 34, 28, 35, 27, 26]),
    "Baichuan2-7B": (32, [26, 27, 25, 28, 24, 29, 23, 22, 30]),
    "Baichuan2-13B": (40, [32, 31, 33, 30, 34, 29, 28, 35, 27, 26]),
}
"""Removal orders published in the ShortGPT paper."""

TAYLOR_LLAMA_2_7B = [0, 28, 27, 25, 29, 26, 24, 23, 21, 22, 30]
"""Least important layers first, published with Shortened LLaMA."""


def _scores(depth: int, order: list[int]) -> dict[int, float]:
    rest = [layer for layer in range(depth) if layer not in order]
    return {layer: 0.1 * rank for rank, layer in enumerate([*order, *rest])}


@pytest.mark.parametrize("model", SHORTGPT)
def test_lowest_scores_go_first(model: str) -> None:
    depth, order = SHORTGPT[model]
    scores = dict(sorted(_scores(depth, order).items()))
    assert select_lowest(scores, len(order)) == order


def test_taylor_plus_of_llama_2_7b() -> None:
    scores = _scores(32, TAYLOR_LLAMA_2_7B)
    allowed = ProtectedEnds(protect_first=4, protect_last=2).candidates(32, 9)
    removed = select_lowest({layer: scores[layer] for layer in allowed}, 9)
    assert removed == [28, 27, 25, 29, 26, 24, 23, 21, 22]


def test_of_equal_scores_the_shallower_layer_goes() -> None:
    assert select_lowest({2: 1.0, 1: 1.0, 0: 2.0}, 2) == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_names_its_layer(value: float) -> None:
    with pytest.raises(NumericsError, match="layer 3"):
        select_lowest({0: 1.0, 3: value}, 1)


def test_protected_ends_leave_too_little() -> None:
    assert list(ProtectedEnds(protect_first=1, protect_last=2).candidates(6, 3)) == [1, 2, 3]
    with pytest.raises(SparsityError, match="only 0 may be"):
        ProtectedEnds(protect_first=4, protect_last=2).candidates(6, 1)
    with pytest.raises(SparsityError, match="only 0 may be"):
        ProtectedEnds(protect_first=9).candidates(6, 1)
