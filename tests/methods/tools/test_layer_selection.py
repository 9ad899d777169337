"""Selection from scores: the lowest, ends that stay, scores that are no numbers."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest

from streamline_bench.compression import load_recipe
from streamline_bench.core.similarity import Similarity
from streamline_bench.errors import NumericsError, RecipeError, SparsityError
from streamline_bench.methods.base import check_parameters, parts_of
from streamline_bench.methods.tools.selection import (
    ProtectedEnds,
    block_at,
    cuts_of,
    merge_adjacent,
    non_overlapping,
    select_lowest,
)

TAYLOR_LLAMA_2_7B = [0, 28, 27, 25, 29, 26, 24, 23, 21, 22, 30]
"""Least important layers first, published with Shortened LLaMA."""


@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_scores_go_lowest_first(seed: int) -> None:
    """By repeatedly taking the minimum of what is left."""
    draw = random.Random(seed)
    scores = {layer: draw.choice([-1.0, 0.0, 0.5, 2.0, 1e9]) for layer in range(12)}
    left, expected = dict(scores), []
    for _ in range(5):
        least = min(left.values())
        expected.append(next(layer for layer in sorted(left) if left[layer] == least))
        del left[expected[-1]]
    shuffled = list(scores.items())
    draw.shuffle(shuffled)
    assert select_lowest(dict(shuffled), 5) == expected


def test_protected_ends_turn_the_published_taylor_order_into_the_published_taylor_plus() -> None:
    """The scores only spell the order out: what is tested is what the ends take from it."""
    rest = [layer for layer in range(32) if layer not in TAYLOR_LLAMA_2_7B]
    scores = {layer: float(rank) for rank, layer in enumerate([*TAYLOR_LLAMA_2_7B, *rest])}
    allowed = ProtectedEnds(protect_first=4, protect_last=2).candidates(32, 9)
    removed = select_lowest({layer: scores[layer] for layer in allowed}, 9)
    assert removed == [28, 27, 25, 29, 26, 24, 23, 21, 22]


def test_of_equal_scores_the_shallower_layer_goes() -> None:
    assert select_lowest({2: 1.0, 1: 1.0, 0: 2.0}, 2) == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_names_its_layer(value: float) -> None:
    with pytest.raises(NumericsError, match="layer 3"):
        select_lowest({0: 1.0, 3: value}, 1)


@pytest.mark.parametrize(
    ("depth", "n", "expected"),
    [
        (80, 20, (4, 2)), (40, 10, (4, 2)), (32, 8, (4, 2)), (32, 16, (4, 2)), (28, 7, (4, 2)),
        (24, 6, (3, 2)), (16, 4, (2, 1)), (12, 6, (2, 1)), (5, 1, (1, 1)), (5, 3, (1, 1)),
        (5, 4, (1, 0)), (2, 1, (1, 0)),
    ],
)  # fmt: skip
def test_ends_in_proportion(depth: int, n: int, expected: tuple[int, int]) -> None:
    """The published 4 and 2 of 32 layers or more; they give way to what is to go."""
    ends = ProtectedEnds(protect_first=None, protect_last=None)
    allowed = ends.candidates(depth, n)
    assert ends.protected(allowed, depth) == {"first": expected[0], "last": expected[1]}
    assert len(allowed) >= n


def test_no_choice_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        ProtectedEnds(protect_first=4, protect_last=2).candidates(12, 5)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "first 4 and the last 2 of 12 layers" in caplog.text
    ProtectedEnds(protect_first=4, protect_last=2).candidates(12, 6)
    assert re.search(r"\b6 unprotected layers.*protect fewer", caplog.text)


def test_protected_ends_leave_too_little() -> None:
    assert list(ProtectedEnds(protect_first=1, protect_last=2).candidates(6, 3)) == [1, 2, 3]
    with pytest.raises(SparsityError, match=r"only 0\b.*protect"):
        ProtectedEnds(protect_first=4, protect_last=2).candidates(6, 1)
    with pytest.raises(SparsityError, match=r"only 0\b.*protect"):
        ProtectedEnds(protect_first=9).candidates(6, 1)


def _similarity(layers: int = 10, seed: int = 0) -> Similarity:
    raw = np.random.default_rng(seed).random((layers + 1, layers + 1))
    matrix = (raw + raw.T) / 2
    return Similarity(matrix, matrix, 100, 10)


def _brute_force(similarity: Similarity, n: int, count: int) -> list[int]:
    candidates = [
        (similarity.angular[start, start + n], start)
        for start in range(1, similarity.num_layers - n + 1)
    ]
    used: set[int] = set()
    starts = []
    for _, start in sorted(candidates):
        layers = set(range(start, start + n))
        if not layers & used and len(starts) < count:
            starts.append(start)
            used |= layers
    return sorted(starts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "count"), [(1, 3), (2, 2), (3, 1)])
def test_greedy_by_ascending_distance_without_layer_0(seed: int, n: int, count: int) -> None:
    similarity = _similarity(seed=seed)
    blocks = non_overlapping(similarity, n, count, "angular")
    assert [block.start for block in blocks] == _brute_force(similarity, n, count)
    for block in blocks:
        assert block.score == similarity.angular[block.start, block.stop]


def test_one_block_is_the_best_block() -> None:
    similarity = _similarity()
    for metric in ("cosine", "angular"):
        best = similarity.best_block(3, metric, allow_first_layer=False)
        assert non_overlapping(similarity, 3, 1, metric) == [best]


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SparsityError, match=r"\b4\b.*fewer blocks"):
        non_overlapping(_similarity(), 3, 4, "angular")
    with pytest.raises(SparsityError, match=r"layer 9\b"):
        block_at(_similarity(), 9, 3, "cosine")


def test_neighbours_merge() -> None:
    similarity = _similarity()
    blocks = [block_at(similarity, start, 2, "angular") for start in (1, 3, 6)]
    merged = merge_adjacent(blocks, similarity)
    assert [(b.start, b.stop) for b in merged] == [(1, 5), (6, 8)]
    assert merged[0].score == similarity.angular[1, 5]


@pytest.mark.parametrize("seed", range(5))
def test_cuts_are_the_runs_of_neighbours(seed: int) -> None:
    """By string: removed layers are ones, and runs of ones are found by a pattern."""
    draw = random.Random(seed)
    removed = [layer for layer in range(20) if draw.random() < 0.5]
    text = "".join("1" if layer in removed else "0" for layer in range(20))
    expected = [range(*match.span()) for match in re.finditer("1+", text)]
    draw.shuffle(removed)
    assert cuts_of(removed) == expected


@pytest.mark.parametrize(
    ("selection", "match"),
    [
        ("slicegpt", "slicegpt.*choose layers"),
        ("shortgtp", "shortgpt"),
        ({"method": "sleb", "parameters": {"protect_frist": 1}}, "protect_frist"),
        ({"parameters": {}}, "method"),
    ],
)
def test_a_selection_that_chooses_no_layers_is_refused(selection: object, match: str) -> None:
    changes = {"parameters.selection": selection}
    with pytest.raises(RecipeError, match=match):
        check_parameters(load_recipe("ridge_map", changes))


def test_a_start_and_a_selection_contradict_each_other() -> None:
    changes = {"parameters.selection": "sleb", "parameters.start": 2}
    with pytest.raises(RecipeError, match="start or selection"):
        check_parameters(load_recipe("linear_patch", changes))


@pytest.mark.parametrize(
    ("recipe", "changes", "expected"),
    [
        ("shortgpt", {}, ("shortgpt", "none", "none")),
        ("streamline_none", {}, ("cosine block", "none", "none")),
        ("streamline", {"recovery.kind": "lora"}, ("cosine block", "layer, relative_mse", "lora")),
        ("streamline_two_layers", {}, ("cosine block", "2 layers, lm", "none")),
        ("streamline_iterative", {}, ("cosine block in 2 steps", "layer, relative_mse", "none")),
        ("linear_patch", {}, ("cosine block", "linear_patch", "none")),
        (
            "ridge_map",
            {"parameters.selection": {"method": "sleb", "parameters": {"protect_last": 2}}},
            ("sleb (protect last 2)", "ridge_map", "none"),
        ),
        ("replaceme_cosine", {}, ("ReplaceMe's block", "replaceme (objective cosine)", "none")),
        ("replaceme_lstsq", {"parameters.selection": "sleb"}, ("sleb", "replaceme", "none")),
        (
            "replaceme_lstsq",
            {"parameters.selection": "streamline"},
            ("cosine block", "replaceme", "none"),
        ),
        ("prune_comp", {}, ("shortgpt, one by one", "magnitude_compensation", "none")),
        ("prune_comp", {"parameters.compensate": False}, ("shortgpt, one by one", "none", "none")),
        ("slicegpt", {}, None),
    ],
)
def test_a_recipe_in_its_parts(
    recipe: str, changes: dict[str, object], expected: tuple[str, str, str] | None
) -> None:
    parts = parts_of(load_recipe(recipe, changes))
    assert (parts and (parts.selection, parts.patch, parts.healing)) == expected
