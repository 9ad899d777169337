"""Pairing two runs, and the first difference by name when they must not be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from streamline_bench.errors import ComparisonError
from streamline_bench.stability.align import align
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples


@pytest.fixture(scope="module")
def runs(lm_eval_outputs: Path) -> tuple[Samples, Samples]:
    return (
        load_samples(lm_eval_outputs / "dense", run="dense", progress=False),
        load_samples(lm_eval_outputs / "pruned", run="pruned", progress=False),
    )


def changed(samples: Samples, **fields: object) -> Samples:
    return replace(samples, info=samples.info.model_copy(update=fields))


def with_value(samples: Samples, task: str, document: int, column: str, value: object) -> Samples:
    frame = samples.frame.copy()
    frame.loc[(frame["task"] == task) & (frame["doc_id"] == document), column] = value
    return replace(samples, frame=frame)


def test_rows_are_paired_whatever_their_order(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    mixed = replace(pruned, frame=pruned.frame.sample(frac=1, random_state=3))
    pairs = align(dense, mixed)
    assert len(pairs.dense) == len(dense.frame)
    for column in ("task", "filter", "doc_id", "doc_hash", "request_hash"):
        pd.testing.assert_series_equal(pairs.dense[column], pairs.pruned[column])
    assert set(pairs.dense["run"]) == {"dense"} and set(pairs.pruned["run"]) == {"pruned"}


def test_tasks_and_groups_can_be_named(runs: tuple[Samples, Samples]) -> None:
    assert set(align(*runs, tasks=["toy_group"]).dense["task"]) == {"toy_mc", "toy_gen"}
    assert set(align(*runs, tasks=["toy_mc"]).dense["task"]) == {"toy_mc"}
    with pytest.raises(ComparisonError, match="Run 'dense' has no task 'piqa'; it has: toy_fill"):
        align(*runs, tasks=["piqa"])


def test_two_engines_meet_only_where_it_is_allowed(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = (
        changed(samples, computed_by=dict.fromkeys(samples.tasks, name))
        for samples, name in zip(runs, ("transformers", "vLLM"), strict=True)
    )
    with pytest.raises(ComparisonError, match=r"transformers.*'dense'.*vLLM.*--across-engines"):
        align(dense, pruned)
    assert len(align(dense, pruned, across_engines=True).dense) == len(dense.frame)
    assert len(align(dense, runs[1]).dense) == len(dense.frame)
    mixed = changed(pruned, computed_by={**dense.info.computed_by, "toy_mc": "vLLM"})
    assert set(align(dense, mixed, tasks=["toy_gen"]).dense["task"]) == {"toy_gen"}
    with pytest.raises(ComparisonError, match="'toy_mc'"):
        align(dense, mixed)


def test_groups_may_contain_each_other(runs: tuple[Samples, Samples]) -> None:
    groups = {"first": ["second", "toy_mc"], "second": ["first", "toy_gen"], "self": ["self"]}
    dense, pruned = (changed(samples, groups=groups) for samples in runs)
    assert set(align(dense, pruned, tasks=["first"]).dense["task"]) == {"toy_mc", "toy_gen"}
    with pytest.raises(ComparisonError):
        align(dense, pruned, tasks=["self"])


def test_different_task_sets(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    fewer = replace(pruned, frame=pruned.frame[pruned.frame["task"] != "toy_ll"])
    with pytest.raises(ComparisonError, match="Only run 'dense' has task 'toy_ll'"):
        align(dense, fewer)
    assert "toy_ll" not in set(align(dense, fewer, common_only=True).dense["task"])
    foreign = replace(pruned, frame=pruned.frame.assign(task="other"))
    with pytest.raises(ComparisonError, match="share no task"):
        align(dense, foreign, common_only=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_versions": {"toy_fill": "9.0"}}, "Task 'toy_fill' has version 1.0 .* and 9.0"),
        ({"chat_template": "<x>"}, "differ in chat template: None in run 'dense' and '<x>'"),
        ({"system_instruction": "Be brief."}, "differ in system instruction"),
        ({"fewshot_as_multiturn": True}, "differ in fewshot as multiturn"),
        ({"engine": "opencompass"}, "differ in engine: .* of lm-eval, .* of opencompass"),
    ],
)
def test_settings(runs: tuple[Samples, Samples], fields: dict, message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        align(runs[0], changed(runs[1], **fields))


def test_number_of_shots(runs: tuple[Samples, Samples]) -> None:
    shots = {**runs[1].info.n_shot, "toy_mc": 5}
    with pytest.raises(ComparisonError, match="few-shot examples 0 in run 'dense' and 5"):
        align(runs[0], changed(runs[1], n_shot=shots))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("doc_hash", "the document differs"),
        ("prompt_hash", "the prompt differs"),
        ("target_hash", "the expected answer differs"),
        ("request_hash", "what was sent to the model"),
    ],
)
def test_hashes_name_the_first_document(
    runs: tuple[Samples, Samples], column: str, words: str
) -> None:
    other = with_value(runs[1], "toy_mc", 17, column, "f" * 64)
    with pytest.raises(ComparisonError, match=f"Task 'toy_mc', document 17: {words}.*ffff"):
        align(runs[0], other)


def test_where_prompts_differ_and_in_which_files(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    row = pruned.frame[(pruned.frame["task"] == "toy_mc") & (pruned.frame["doc_id"] == 17)].iloc[0]
    place = len(row["prompt"]) // 2
    prompt = row["prompt"][:place] + "#" + row["prompt"][place + 1 :]
    other = with_value(with_value(pruned, "toy_mc", 17, "prompt", prompt), "toy_mc", 17,
                       "prompt_hash", "f" * 64)  # fmt: skip
    with pytest.raises(ComparisonError) as raised:
        align(dense, other)
    begin = max(0, place - 20)
    for text in (f"from character {place} ", row["prompt"][begin:place], prompt[begin : place + 1]):
        assert text in str(raised.value)
    for samples in runs:
        assert str(samples.info.files["toy_mc"]) in str(raised.value)
    nowhere = changed(other, files={})
    with pytest.raises(ComparisonError) as raised:
        align(dense, nowhere)
    assert str(dense.info.files["toy_mc"]) not in str(raised.value)


def test_documents_differ(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    in_mc = pruned.frame["task"] == "toy_mc"
    shorter = replace(pruned, frame=pruned.frame[~in_mc | (pruned.frame["doc_id"] < 30)])
    with pytest.raises(ComparisonError, match=r"has 40 documents .* and 30 in run 'pruned'"):
        align(dense, shorter)
    moved = with_value(pruned, "toy_mc", 39, "doc_id", 77)
    with pytest.raises(ComparisonError, match=r"Document 39 of task 'toy_mc' .* 'dense' only"):
        align(dense, moved)


def test_filters_differ(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    renamed = with_value(pruned, "toy_ll", 0, "filter", "other")
    with pytest.raises(ComparisonError, match=r"'toy_ll' has the filters \['none'\]"):
        align(dense, renamed)


def test_duplicates(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    twice = replace(pruned, frame=pd.concat([pruned.frame, pruned.frame.iloc[[0]]]))
    with pytest.raises(ComparisonError, match=r"answers document 0 .* more than once"):
        align(dense, twice)
