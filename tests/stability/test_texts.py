"""Where generated texts differ; perplexities against the harness' own and a bootstrap."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.generation_comparison import (
    compare_generations,
    first_difference,
    repetition,
)
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.task_comparison import compare_perplexities
from streamline_bench.stability.texts import PerplexityComparison

FAST = Settings(draws=500)


def texts(*values: str | None) -> pd.DataFrame:
    unknown = dict.fromkeys(("answer", "cluster", "tokens", "thinking", "unfinished"))
    return pd.DataFrame({"task": "t", "filter": "none", "text": list(values), **unknown})


def test_first_difference() -> None:
    assert first_difference("a b c".split(), "a b d".split()) == 2
    assert first_difference("a b".split(), "a b c".split()) == 2
    assert first_difference([], ["a"]) == 0
    assert first_difference("same", "same") == 4


def test_texts_by_hand() -> None:
    found = compare_generations(
        texts("the cat sat", "yes", "one two three four", ""),
        texts("the cat ran off", "yes", "one 2", "x"),
        FAST,
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


def test_repetition_by_hand() -> None:
    assert repetition("a b c".split()) == 0.0
    assert repetition("a b c d".split()) == 0.0
    assert repetition("a a a a a a".split()) == pytest.approx(2 / 3)  # three runs, all the same
    assert repetition("a b c d a b c d".split()) == pytest.approx(1 / 5)


def test_degeneration_and_lengths() -> None:
    good = ["one two three four five"] * 40
    bad = ["a a a a a a"] * 10 + [""] * 5 + good[15:]
    found = compare_generations(texts(*good), texts(*bad), FAST, None)
    assert found is not None and found.empty is not None and found.repetition is not None
    assert (found.empty.dense, found.empty.pruned) == (0.0, 5 / 40)
    assert found.empty.difference.value == pytest.approx(5 / 40)
    assert found.empty.difference.low is not None and found.empty.difference.low > 0
    assert found.repetition.pruned == pytest.approx(10 / 40 * 2 / 3)
    moved = np.array([2 / 3] * 10 + [0.0] * 30)
    drawn = np.random.default_rng(0).integers(40, size=(20_000, 40))
    ends = np.quantile(moved[drawn].mean(axis=1), [0.025, 0.975])
    assert found.repetition.difference.ends == pytest.approx(ends, abs=0.02)
    assert found.length_ratio is not None
    assert found.length_ratio.value == pytest.approx((10 * 6 + 25 * 5) / (40 * 5))


def test_equal_texts_differ_nowhere() -> None:
    found = compare_generations(texts("a", "b"), texts("a", "b"), FAST, None)
    assert found is not None
    assert found.first_word is None and found.first_character is None
    assert found.shared == 1.0 and found.identical.value == 1.0


def test_white_space_is_no_word() -> None:
    found = compare_generations(texts("a b", " "), texts("a  b", ""), FAST, None)
    assert found is not None
    assert found.identical.value == 0.0 and found.shared == 1.0


def test_answers_that_are_no_texts() -> None:
    assert compare_generations(texts("a", None), texts("a", "b"), FAST, None) is None


def test_compare_has_every_filter(lm_eval_outputs: Path) -> None:
    runs = [
        load_samples(lm_eval_outputs / name, run=name, progress=False)
        for name in ("dense", "pruned")
    ]
    result = compare_answers(*runs, settings=Settings(draws=200))
    assert [(item.task, item.filter) for item in result.generations] == [
        ("toy_gen", "first"),
        ("toy_gen", "strict"),
    ]
    verdicts = {task.filter: task for task in result.tasks if task.task == "toy_gen"}
    files = [next((lm_eval_outputs / name).glob("*/samples_toy_gen_*")) for name in
             ("dense", "pruned")]  # fmt: skip
    answers = [
        {
            line["doc_id"]: line["resps"]
            for line in map(json.loads, file.read_text("utf-8").splitlines())
        }
        for file in files
    ]
    written = sum(answers[0][each] == answers[1][each] for each in answers[0]) / len(answers[0])
    for item in result.generations:
        assert item.exact_match == verdicts[item.filter].difference
        # Texts are compared as they were written, choices as the filter leaves them.
        assert item.identical.value == written <= (verdicts[item.filter].same_choice or 0)


@pytest.fixture(scope="module")
def runs(lm_eval_outputs: Path) -> tuple[Samples, Samples]:
    return (
        load_samples(lm_eval_outputs / "dense", run="dense", progress=False),
        load_samples(lm_eval_outputs / "pruned", run="pruned", progress=False),
    )


def of_task(runs: tuple[Samples, Samples], task: str) -> list[PerplexityComparison]:
    frames = [samples.frame[samples.frame["task"] == task] for samples in runs]
    return compare_perplexities(frames[0], frames[1], 0.95)


@pytest.mark.parametrize(
    ("task", "metric", "unit"),
    [("toy_roll", "word_perplexity", "word"), ("toy_ll", "perplexity", "answer")],
)
def test_values_are_the_harness_own(
    runs: tuple[Samples, Samples], task: str, metric: str, unit: str
) -> None:
    (found,) = of_task(runs, task)
    assert found.unit == unit and found.n == 5
    for side, samples in zip(("dense", "pruned"), runs, strict=True):
        theirs = samples.info.results[task][f"{metric},none"]
        assert getattr(found, side) == pytest.approx(theirs)
    assert found.ratio is not None and found.dense and found.pruned
    assert found.ratio.value == pytest.approx(found.pruned / found.dense)
    assert found.ratio.low < found.ratio.value < found.ratio.high
    assert found.nats_per_unit.value == pytest.approx(math.log(found.ratio.value))


def test_compare_has_them_beside_the_verdicts(runs: tuple[Samples, Samples]) -> None:
    result = compare_answers(*runs, settings=Settings(draws=200))
    assert [(item.task, item.unit) for item in result.perplexities] == [
        ("toy_ll", "answer"),
        ("toy_roll", "word"),
    ]


def test_beyond_float64_is_none(runs: tuple[Samples, Samples]) -> None:
    frame = runs[1].frame[runs[1].frame["task"] == "toy_ll"]
    far = frame.assign(metrics=[{"perplexity": -5000.0}] * len(frame))
    (found,) = compare_perplexities(frame, far, 0.95)
    assert found.pruned is None and found.ratio is None
    assert found.nats_per_unit.value > 4000


def test_nan_and_missing_numbers_name_the_document(runs: tuple[Samples, Samples]) -> None:
    frame = runs[1].frame[runs[1].frame["task"] == "toy_roll"]
    metrics = [dict(values) for values in frame["metrics"]]
    metrics[3]["word_perplexity.0"] = math.nan
    bad = frame.assign(metrics=metrics)
    with pytest.raises(NumericsError, match="Run 'pruned': Task 'toy_roll', document 3"):
        compare_perplexities(frame, bad, 0.95)
    del metrics[3]["word_perplexity.0"]
    with pytest.raises(SamplesError, match="no 'word_perplexity' on document 3 of task"):
        compare_perplexities(frame, bad.assign(metrics=metrics), 0.95)
    assert replace(runs[1], frame=frame).tasks == ("toy_roll",)


def counted(answers: list[tuple[int, int, int, bool]]) -> pd.DataFrame:
    """Answers of these tokens, of which some thoughts, unfinished or not, right or wrong."""
    tokens, thinking, unfinished, right = zip(*answers, strict=True)
    found = texts(*(["w"] * len(answers))).assign(
        tokens=tokens, thinking=thinking, unfinished=unfinished
    )
    return found.assign(correct=pd.array(right, dtype="boolean"))


def test_tokens_per_solved_question_against_a_bootstrap_by_hand() -> None:
    source = np.random.default_rng(1)
    sides = []
    for mean, share in ((20, 0.7), (35, 0.5)):
        tokens = source.poisson(mean, 60) + 1
        sides.append([(int(n), int(n) // 2, int(n > mean + 8), bool(source.random() < share))
                      for n in tokens])  # fmt: skip
    found = compare_generations(*map(counted, sides), Settings(draws=4000), None)
    assert found is not None and found.tokens and found.thinking and found.unfinished
    (t, h, u, r), (t2, h2, u2, r2) = (np.array(side).T for side in sides)
    assert (found.tokens.dense, found.tokens.pruned) == pytest.approx((t.mean(), t2.mean()))
    assert (found.thinking.dense, found.thinking.pruned) == pytest.approx((h.mean(), h2.mean()))
    assert found.unfinished.difference.value == pytest.approx(u2.mean() - u.mean())
    solved = found.tokens_per_solved
    assert solved is not None and solved.ratio is not None
    assert solved.dense == pytest.approx(t.sum() / r.sum())
    assert solved.pruned == pytest.approx(t2.sum() / r2.sum())
    drawn = source.integers(60, size=(20_000, 60))
    ratios = t2[drawn].sum(1) / r2[drawn].sum(1) / (t[drawn].sum(1) / r[drawn].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert solved.ratio.ends == pytest.approx((low, high), rel=0.05)


def test_nothing_solved_and_nothing_counted() -> None:
    none = counted([(3, 0, 1, False)] * 5)
    found = compare_generations(counted([(2, 0, 0, True)] * 5), none, FAST, None)
    assert found is not None and found.tokens_per_solved is not None
    assert found.tokens_per_solved.pruned is None and found.tokens_per_solved.ratio is None
    assert found.thinking is None
    unknown = compare_generations(texts("a"), texts("b"), FAST, None)
    assert unknown is not None and unknown.tokens is None and unknown.unfinished is None
