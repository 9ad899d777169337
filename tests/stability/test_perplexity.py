"""Perplexities against the harness' own, and their ratio against a bootstrap."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.compare_answers import compare
from streamline_bench.stability.comparison import PerplexityComparison
from streamline_bench.stability.perplexity import compare_perplexities
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings


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
    result = compare(*runs, settings=Settings(draws=200))
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
