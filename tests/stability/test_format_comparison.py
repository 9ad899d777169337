"""Choices and free answers to the same questions, against counting and a bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from streamline_bench.errors import SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

N = 120
PAIR = {"free": "choice"}


def verdicts(samples: Samples, task: str) -> np.ndarray:
    return samples.frame.loc[samples.frame["task"] == task, "correct"].to_numpy(dtype=bool)


@pytest.fixture
def runs(questions: Callable[..., Samples]) -> tuple[Samples, Samples]:
    """The free form loses more than the choices."""
    source = np.random.default_rng(5)
    sides = []
    for name, choice, free in (("dense", 0.8, 0.7), ("pruned", 0.75, 0.35)):
        tasks = {}
        for task, share in (("choice", choice), ("free", free)):
            scores = np.full((N, 2), -2.0)
            scores[:, 0] += np.where(source.random(N) < share, 1.0, -1.0)
            tasks[task] = scores, np.zeros(N, dtype=int), None
        sides.append(questions(name, tasks))
    return sides[0], sides[1]


def test_against_counting_and_a_bootstrap(runs: tuple[Samples, Samples]) -> None:
    result = compare_answers(*runs, settings=Settings(draws=4000, pairs=PAIR))
    (found,) = result.formats
    assert (found.n, result.pairs) == (N, PAIR)
    counts = {key: [0, 0, 0, 0] for key in ("dense", "pruned", "kept")}
    rows = [verdicts(side, task) for side in runs for task in ("choice", "free")]
    for choice, free, choice_now, free_now in zip(*rows, strict=True):
        counts["dense"][2 * (not choice) + (not free)] += 1
        counts["pruned"][2 * (not choice_now) + (not free_now)] += 1
        if choice and free:
            counts["kept"][2 * (not choice_now) + (not free_now)] += 1
    for key, expected in counts.items():
        part = getattr(found, key)
        assert [part.both, part.choice_only, part.free_only, part.neither] == expected
    choice, free, choice_now, free_now = (row.astype(float) for row in rows)
    change = (free_now - free) - (choice_now - choice)
    assert found.gap.value == pytest.approx(change.mean())
    source = np.random.default_rng(0)
    drawn = change[source.integers(N, size=(20_000, N))].mean(axis=1)
    assert found.gap.ends == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    assert found.p_value < 0.05 and found.kept_p is not None and found.kept_p < 0.05


def test_a_task_may_declare_the_pair_itself(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    info = dense.info.model_copy(update={"same_questions": {**PAIR, "free": "choice"}})
    declared = compare_answers(Samples(dense.frame, info), pruned, settings=Settings(draws=200))
    asked = compare_answers(dense, pruned, settings=Settings(draws=200, pairs=PAIR))
    assert declared.formats == asked.formats
    other = dense.info.model_copy(update={"same_questions": {"free": "elsewhere"}})
    alone = compare_answers(Samples(dense.frame, other), pruned, settings=Settings(draws=200))
    assert alone.formats == ()


@pytest.mark.parametrize("pair", [{"free": "choise"}, {"fre": "choice"}])
def test_an_unknown_task_is_named(runs: tuple[Samples, Samples], pair: dict[str, str]) -> None:
    with pytest.raises(SamplesError, match=r"'(choise|fre)'.*(choice|free)"):
        compare_answers(*runs, settings=Settings(draws=200, pairs=pair))


def test_other_documents_are_refused(runs: tuple[Samples, Samples]) -> None:
    def shorter(samples: Samples) -> Samples:
        frame: Any = samples.frame
        gone = (frame["task"] == "free") & (frame["doc_id"] >= 100)
        return Samples(frame[~gone].reset_index(drop=True), samples.info)

    with pytest.raises(SamplesError, match=r"'free' \(100.*'choice' \(120"):
        compare_answers(*map(shorter, runs), settings=Settings(draws=200, pairs=PAIR))
