"""Blocks taken greedily beside each other, against a loop over all of them."""

from __future__ import annotations

import numpy as np
import pytest

from streamline_bench.core.scan.similarity import Similarity
from streamline_bench.errors import SparsityError
from streamline_bench.methods.tools.block_selection import block_at, merge_adjacent, non_overlapping


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
    with pytest.raises(SparsityError, match="and 4 were asked for"):
        non_overlapping(_similarity(), 3, 4, "angular")
    with pytest.raises(SparsityError, match="cannot start at layer 9"):
        block_at(_similarity(), 9, 3, "cosine")


def test_neighbours_merge() -> None:
    similarity = _similarity()
    blocks = [block_at(similarity, start, 2, "angular") for start in (1, 3, 6)]
    merged = merge_adjacent(blocks, similarity)
    assert [(b.start, b.stop) for b in merged] == [(1, 5), (6, 8)]
    assert merged[0].score == similarity.angular[1, 5]
