"""Where generated texts part."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from streamline_bench.stability.compare_answers import compare
from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.generation import compare_generations, first_difference
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.settings import Settings


def texts(*values: str | None) -> pd.DataFrame:
    return pd.DataFrame({"task": "t", "filter": "none", "text": list(values)})


def test_first_difference() -> None:
    assert first_difference("a b c".split(), "a b d".split()) == 2
    assert first_difference("a b".split(), "a b c".split()) == 2
    assert first_difference([], ["a"]) == 0
    assert first_difference("same", "same") == 4


def test_texts_by_hand() -> None:
    found = compare_generations(
        texts("the cat sat", "yes", "one two three four", ""),
        texts("the cat ran off", "yes", "one 2", "x"),
        0.95,
        Estimate(value=-0.25),
    )
    assert found is not None
    assert found.identical.value == 0.25
    assert (found.identical.low, found.identical.high) == pytest.approx(
        proportion_confint(1, 4, method="wilson")
    )
    assert found.first_word == 1.0, "median of 2, 1 and 0"
    assert found.first_character == 4.0, "median of 'the cat ', 'one ' and nothing"
    assert found.shared == pytest.approx((2 / 4 + 1 + 1 / 4 + 0) / 4)
    assert (found.dense_words, found.pruned_words) == (8 / 4, 8 / 4)
    assert found.exact_match == Estimate(value=-0.25)


def test_equal_texts_differ_nowhere() -> None:
    found = compare_generations(texts("a", "b"), texts("a", "b"), 0.95, None)
    assert found is not None
    assert found.first_word is None and found.first_character is None
    assert found.shared == 1.0 and found.identical.value == 1.0


def test_white_space_is_no_word() -> None:
    found = compare_generations(texts("a b", " "), texts("a  b", ""), 0.95, None)
    assert found is not None
    assert found.identical.value == 0.0 and found.shared == 1.0


def test_answers_that_are_no_texts() -> None:
    assert compare_generations(texts("a", None), texts("a", "b"), 0.95, None) is None


def test_compare_has_every_filter(lm_eval_outputs: Path) -> None:
    runs = [
        load_samples(lm_eval_outputs / name, run=name, progress=False)
        for name in ("dense", "pruned")
    ]
    result = compare(*runs, settings=Settings(draws=200))
    assert [(item.task, item.filter) for item in result.generations] == [
        ("toy_gen", "first"),
        ("toy_gen", "strict"),
    ]
    verdicts = {task.filter: task for task in result.tasks if task.task == "toy_gen"}
    for item in result.generations:
        assert item.exact_match == verdicts[item.filter].difference
        assert item.identical.value == verdicts[item.filter].same_choice
