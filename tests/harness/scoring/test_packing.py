"""Rows and batches against a brute-force reading of the same trees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_bench.core.architecture import RopeGroups
from streamline_bench.harness.scoring.forward import attention_mask
from streamline_bench.harness.scoring.packing import (
    Layout,
    Layouts,
    PackedRow,
    Query,
    build_rows,
    make_batches,
)
from streamline_bench.harness.scoring.scorer import scoring_tokens

FREE = {"share_up_to": 10_000, "row_tokens": 10_000, "pair_cost": 0.0}
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=12)


def queries_of(inputs: list[list[int]]) -> list[Query]:
    return [Query(i, tokens, tokens[-1 - i % len(tokens) :]) for i, tokens in enumerate(inputs)]


def visible_in(row: PackedRow) -> npt.NDArray[np.bool_]:
    """``[size, size]``: whether the row's node may look at the column's, by the model's mask."""
    return (attention_mask(torch.from_numpy(row.ends())[None], torch.float32)[0, 0] == 0).numpy()


@settings(max_examples=200, deadline=None)
@given(sequences)
def test_every_query_reads_exactly_its_own_tokens_in_order(inputs: list[list[int]]) -> None:
    seen = set()
    for row in build_rows(queries_of(inputs), **FREE):
        visible = visible_in(row)
        for query, nodes in row.scored:
            seen.add(query.index)
            ancestors = np.flatnonzero(visible[nodes[-1]])
            assert [row.tokens[node] for node in ancestors] == list(query.inputs)
            assert [row.positions[node] for node in ancestors] == list(range(len(query.inputs)))
            assert list(ancestors[-len(query.targets) :]) == list(nodes)
    assert seen == set(range(len(inputs)))


@settings(max_examples=100, deadline=None)
@given(sequences)
def test_a_row_holds_as_many_nodes_as_there_are_distinct_prefixes(inputs: list[list[int]]) -> None:
    for row in build_rows(queries_of(inputs), **FREE):
        prefixes = {
            tuple(query.inputs[: size + 1])
            for query, _ in row.scored
            for size in range(len(query.inputs))
        }
        assert len(row) == len(prefixes)


def test_choices_of_a_long_context_share_it_on_a_cpu() -> None:
    choices = [Query(i, [*range(2000), i, i + 1], [1, 2]) for i in range(4)]
    room = scoring_tokens("auto", 2002, torch.device("cpu"), 64)
    (row,) = Layouts(choices, batch_tokens=room).rows(Layout(10_000, 1 / 1024, 100))
    assert len(row) == 2000 + 4 * 2


def test_choices_share_one_context_and_one_token_choices_make_a_chain() -> None:
    context = [5, 6, 7, 8]
    longer = [Query(i, [*context, i], [1, 2]) for i in range(3)]
    (row,) = build_rows(longer, **FREE)
    assert len(row) == 4 + 3
    assert not row.is_chain
    single = [Query(i, context, [i]) for i in range(3)]
    (row,) = build_rows(single, **FREE)
    assert row.tokens == context
    assert row.is_chain


def test_sharing_stops_at_the_length_that_is_allowed() -> None:
    inputs = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 5, 6]]
    rows = build_rows(queries_of(inputs), share_up_to=4, row_tokens=100, pair_cost=0.0)
    assert sorted(len(row) for row in rows) == [4, 4, 6]
    rows = build_rows(queries_of(inputs[:2]), share_up_to=4, row_tokens=100, pair_cost=0.0)
    assert [len(row) for row in rows] == [5]


def test_unrelated_questions_do_not_join_when_attention_costs_more_than_it_saves() -> None:
    questions = [[1, *range(10 * i + 10, 10 * i + 20)] for i in range(6)]
    apart = build_rows(queries_of(questions), share_up_to=100, row_tokens=1000, pair_cost=0.1)
    assert len(apart) == 6
    together = build_rows(queries_of(questions), share_up_to=100, row_tokens=1000, pair_cost=0.0)
    assert len(together) == 1


def test_rows_behind_a_long_prefix_stop_at_their_lowest_cost() -> None:
    """600 questions of 40 tokens behind 1,700, at the width of an 8B model."""
    prefix, new, pair_cost, count = 1700, 40, 1 / 8192, 600
    questions = [[*range(prefix), *range(5000 + i, 5000 + i + new)] for i in range(count)]
    rows = build_rows(
        queries_of(questions), share_up_to=10**6, row_tokens=10**6, pair_cost=pair_cost
    )

    def cost(sizes: list[int]) -> float:
        return sum(size + size**2 * pair_cost for size in sizes)

    even = [
        cost([prefix + new * len(part) for part in np.array_split(np.arange(count), parts)])
        for parts in range(1, 60)
    ]
    assert cost([len(row) for row in rows]) < 1.02 * min(even)
    assert even[0] > 1.7 * min(even)  # one row of 25,700 tokens


@settings(max_examples=100, deadline=None)
@given(sequences, st.floats(0.001, 1.0))
def test_rows_never_cost_more_than_their_queries_apart(
    inputs: list[list[int]], pair_cost: float
) -> None:
    def cost(size: int) -> float:
        return size + size**2 * pair_cost

    limits = {"share_up_to": 100, "row_tokens": 1000}
    rows = build_rows(queries_of(inputs), **limits, pair_cost=pair_cost)
    apart = sum(cost(len(each)) for each in inputs)
    assert sum(cost(len(row)) for row in rows) <= apart * (1 + 1e-9)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_batches_keep_their_budgets_and_lose_nothing(tokens: int) -> None:
    inputs = [[i % 5] * (1 + i % 7) + [i] for i in range(30)]
    rows = build_rows(queries_of(inputs), share_up_to=0, row_tokens=0, pair_cost=0.0)
    batches = list(make_batches(rows, batch_tokens=tokens, batch_positions=20))
    for batch in batches:
        longest = max(len(row) for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens
        assert len(batch) == 1 or sum(len(nodes) for row in batch for _, nodes in row.scored) <= 20
    answered = [query.index for batch in batches for row in batch for query, _ in row.scored]
    assert sorted(answered) == list(range(30))


@settings(max_examples=100, deadline=None)
@given(sequences, st.integers(1, 6), st.booleans())
def test_lengths_of_different_groups_share_neither_row_nor_batch(
    inputs: list[list[int]], limit: int, by_length: bool
) -> None:
    groups = RopeGroups(limit, by_length)
    rows = build_rows(queries_of(inputs), **FREE, group_of=groups)
    seen = []
    for batch in make_batches(rows, batch_tokens=10_000, batch_positions=10_000, group_of=groups):
        lengths = {len(query.inputs) for row in batch for query, _ in row.scored}
        seen += [query.index for row in batch for query, _ in row.scored]
        if max(lengths) > limit:
            assert min(lengths) > limit
            assert not by_length or len(lengths) == 1
    assert sorted(seen) == list(range(len(inputs)))
