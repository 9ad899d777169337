"""Rows behind a prefix give the logits of the same rows with a mask, and the stock scores."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.harness.scoring import packing, prefix_attention
from streamline_bench.harness.scoring.forward import Forward, tensors_of
from streamline_bench.harness.scoring.packing import PackedRow, Query, build_rows, part_of
from streamline_bench.harness.scoring.prefix_attention import PrefixTree

SHARED = list(range(3, 23))


def visible(row: PackedRow) -> Any:
    """``[size, size]``: whether the row's node attends to the column's, as its tree says."""
    tree, size = PrefixTree.of(row), len(row)
    seen = np.zeros((size, size), dtype=bool)
    seen[: tree.prefix, : tree.prefix] = np.tri(tree.prefix, dtype=bool)
    seen[tree.prefix :, : tree.prefix] = True
    flat: list[int] = []
    for nodes, ends in tree.groups:
        for at, until in zip(nodes.tolist(), ends.tolist(), strict=True):
            flat += at
            for i, node in enumerate(at):
                for j in range(i + 1):
                    seen[node, at[j]] |= i < until[j] and node != 0 and at[j] != 0
    assert [flat[at] for at in tree.back.tolist()] == list(range(tree.prefix, size))
    return seen


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=9), min_size=2, max_size=14),
    st.integers(1, 3),
)
def test_every_query_reads_exactly_its_own_tokens(inputs: list[list[int]], apart: int) -> None:
    queries = [Query(i, [7, 7, *tokens], tokens[-1:]) for i, tokens in enumerate(inputs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PREFIX_FROM", 2)
        patch.setattr(packing, "SUBTREE_FROM", apart)
        patch.setattr(packing, "SUBTREE_TO", 12)
        rows = build_rows(
            queries, share_up_to=99, row_tokens=999, pair_cost=100.0, prefix_scored=999
        )
        halves = [
            part_of(row, which)
            for row in rows
            for which in (slice(1), slice(1, None))
            if row.prefix
        ]
    for each in (rows, [*halves, *(row for row in rows if not row.prefix)]):
        answered = [query.index for row in each for query, _ in row.scored]
        assert sorted(answered) == list(range(len(queries)))
    for row in [*rows, *halves]:
        if row.prefix:
            seen = visible(row)
            for query, nodes in row.scored:
                ancestors = np.flatnonzero(seen[nodes[-1]])
                assert [row.tokens[node] for node in ancestors] == list(query.inputs)
                assert [row.positions[node] for node in ancestors] == [*range(len(ancestors))]


def tree_row() -> PackedRow:
    """Twenty shared tokens, and subtrees of 1 to 14 tokens, some of which fork."""
    row, draw = PackedRow(prefix=20), random.Random(1)
    for number in range(9):
        question = [*SHARED, *(draw.randrange(96) for _ in range(1 + number))]
        row.add(Query(2 * number, question, question[-1:]), 20 if number else 0)
        longer = [*question, *(draw.randrange(96) for _ in range(number % 6))]
        row.add(Query(2 * number + 1, longer, longer[-1:]), len(question) - number // 2)
    return row


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_logits_are_those_of_a_mask(
    make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(prefix_attention, "_SCORES_AT_ONCE", at_once)
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama")).eval()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    forward = Forward(lambda: model, torch.device("cpu"), torch.no_grad)
    row = tree_row()
    found = forward.wanted_logits(tensors_of([row]))
    masked = forward.wanted_logits(tensors_of([dataclasses.replace(row, prefix=0)]))
    torch.testing.assert_close(found, masked, rtol=1e-3, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def few_shot() -> list[Instance]:
    draw = random.Random(2)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(96)}" for _ in range(count))

    examples = words(40)
    pairs = []
    for _ in range(24):
        question = f"{examples} {words(draw.randint(3, 9))}"
        pairs += [(question, f" {words(draw.randint(1, 3))}") for _ in range(3)]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@pytest.mark.parametrize(
    ("family", "changes", "refused"),
    [
        ("llama", {}, None),
        ("gpt2", {"n_inner": 48}, None),
        ("gemma2", {"sliding_window": 512, "head_dim": 8}, "eager"),  # which soft-caps its scores
    ],
)
def test_examples_in_front_of_all_questions(
    family: str,
    changes: dict[str, Any],
    refused: str | None,
    make_tiny_model: Callable[..., Path],
    word_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(packing, "PREFIX_FROM", 32)
    folder = make_tiny_model(family, num_hidden_layers=2, **changes)
    options: dict[str, Any] = {
        "pretrained": str(folder), "device": "cpu", "dtype": "float32", "batch_size": 16,
        "tokenizer": word_tokenizer,
    }  # fmt: skip
    ours, sizes = StreamlineLM(**options), []
    scorer = ours._token_scorer()
    assert scorer is not None
    real = scorer._forward.wanted_logits

    def limited(batch: Any) -> torch.Tensor:
        if batch.tree is not None:
            sizes.append(batch.ids.shape[1])
            if len(sizes) == 2:  # the first one was a check
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        return real(batch)

    monkeypatch.setattr(scorer._forward, "wanted_logits", limited)
    with caplog.at_level(logging.INFO, logger="streamline_bench"):
        answers = ours.loglikelihood(few_shot(), disable_tqdm=True)
    expected = HFLM(**options).loglikelihood(few_shot(), disable_tqdm=True)
    assert [a for a, _ in answers] == pytest.approx([a for a, _ in expected], abs=1e-4)
    if refused is None:
        parts = sizes[2:]  # behind the check, and the row that did not fit
        assert len(parts) > 1 and max(parts) <= sizes[1] // 2 + 41 + 12
    else:
        assert len(sizes) == 1
        assert "Rows behind a long prefix have a mask" in caplog.text and refused in caplog.text


def questions(prefix: int, count: int, choices: int = 2) -> list[Query]:
    """Questions of 20 tokens behind a prefix, with choices of 3 that share them."""
    found = []
    for number in range(count):
        asked = [*range(prefix), *range(5000 + 100 * number, 5020 + 100 * number)]
        for choice in range(choices):
            found.append(Query(len(found), [*asked, choice, 1, 2], [1, 2, 3]))
    return found


FREE: dict[str, Any] = {"share_up_to": 10**6, "row_tokens": 10**6, "prefix_scored": 10**6}


def test_a_row_grows_beyond_the_lowest_cost_of_one_with_a_mask() -> None:
    options: dict[str, Any] = {**FREE, "pair_cost": 1 / 8192}
    (row,) = build_rows(questions(1700, 400), **options)
    assert (row.prefix, len(row)) == (1700, 1700 + 400 * (20 + 2 * 3))
    masked = build_rows(questions(1700, 400), **{**options, "prefix_scored": 0})
    assert len(masked) > 1 and not any(each.prefix for each in masked)
    # As few as a row with a mask takes, and short prefixes, are laid out as before.
    for few in (questions(1700, 20), questions(200, 400)):
        with_prefixes = build_rows(few, **options)
        assert not any(each.prefix for each in with_prefixes)
        assert [each.tokens for each in with_prefixes] == [
            each.tokens for each in build_rows(few, **{**options, "prefix_scored": 0})
        ]


@pytest.mark.parametrize(("tokens", "scored"), [(3000, 10**6), (10**6, 500)])
def test_a_row_keeps_its_budgets_and_is_a_batch_by_itself(tokens: int, scored: int) -> None:
    asked = questions(300, 400)
    random.Random(0).shuffle(asked)
    limits = {"row_tokens": tokens, "prefix_scored": scored}
    rows = build_rows(asked, **{**FREE, **limits}, pair_cost=1 / 128)
    behind = [row for row in rows if row.prefix]
    assert len(behind) > 2 and all(len(row) <= tokens for row in behind)
    assert all(row.positions_scored <= scored for row in behind)
    batches = list(packing.make_batches(rows, batch_tokens=tokens, batch_positions=scored))
    assert {id(row) for row in behind} == {id(each[0]) for each in batches[: len(behind)]}
    assert all(len(batch) == 1 for batch in batches[: len(behind)])
    answered = sorted(query.index for batch in batches for row in batch for query, _ in row.scored)
    assert answered == sorted(query.index for query in asked)


def test_subjects_behind_common_words_have_rows_of_their_own() -> None:
    """Two subjects share 300 tokens, and each 1,700 more among its own questions."""
    common, asked = list(range(300)), []
    for subject in range(2):
        shared = [*common, *range(10**6 * (subject + 1), 10**6 * (subject + 1) + 1700)]
        for number in range(200):
            own = range(5000 + 100 * number, 5030 + 100 * number)
            asked.append(Query(len(asked), [*shared, *own], [1]))
    rows = build_rows(asked, **FREE, pair_cost=1 / 128)
    assert [(row.prefix, len(row)) for row in rows] == [(2000, 2000 + 200 * 30)] * 2
