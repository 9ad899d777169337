"""Summaries over tasks against loops and bootstraps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison
from streamline_bench.stability.estimate import Estimate, square_and_add
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.choices import calibration_error

FAST = Settings(draws=4000)
TASKS = {"a": (300, None), "b": (150, 5), "c": (220, None)}


@pytest.fixture(scope="module")
def runs(pair: Callable[..., tuple[Samples, Samples]]) -> tuple[Samples, Samples]:
    return pair(TASKS, noise=2.0, seed=3)


@pytest.fixture(scope="module")
def result(runs: tuple[Samples, Samples]) -> Comparison:
    return compare_answers(*runs, settings=FAST)


def macro_draws(runs: tuple[Samples, Samples], draws: int = 4000) -> dict[str, np.ndarray]:
    """Rows (or passages) resampled within each task."""
    source = np.random.default_rng(9)
    means: dict[str, list[np.ndarray]] = {"dense": [], "pruned": [], "same": []}
    for task, (n, size) in TASKS.items():
        first, second = (
            s.frame.loc[s.frame["task"] == task, "correct"].to_numpy(dtype=float) for s in runs
        )
        block = size or 1
        rows = source.integers(n // block, size=(draws, n // block))
        for name, values in (("dense", first), ("pruned", second), ("same", first == second)):
            means[name].append(np.reshape(values, (-1, block)).mean(axis=1)[rows].mean(axis=1))
    return {name: np.mean(values, axis=0) for name, values in means.items()}


def test_macro_intervals_are_those_of_a_bootstrap_within_tasks(
    runs: tuple[Samples, Samples], result: Comparison
) -> None:
    drawn = macro_draws(runs)
    macro = result.macro
    for estimate, brute in (
        (macro.difference, drawn["pruned"] - drawn["dense"]),
        (macro.agreement, drawn["same"]),
        (macro.retention, drawn["pruned"] / drawn["dense"]),
    ):
        assert estimate is not None
        assert (estimate.low, estimate.high) == pytest.approx(
            tuple(np.quantile(brute, [0.025, 0.975])), abs=0.012
        )
    assert macro.retention is not None
    assert macro.retention.value == pytest.approx(macro.pruned.value / macro.dense.value)


def test_macro_is_the_mean_over_tasks(result: Comparison) -> None:
    tasks, macro = result.tasks, result.macro
    for name in ("dense", "pruned", "difference", "dense_corrected", "pruned_corrected"):
        mean = np.mean([getattr(task, name).value for task in tasks])
        assert getattr(macro, name).value == pytest.approx(mean)
    assert macro.choice_kl is not None
    assert macro.choice_kl.value == pytest.approx(np.mean([t.choices.kl.value for t in tasks]))
    assert macro.dense_calibration_error == pytest.approx(
        np.mean([task.calibration.dense_error for task in tasks])
    )
    assert (macro.corrected_tasks, macro.choice_tasks, macro.calibration_tasks) == (3, 3, 3)


def test_micro_is_the_mean_over_documents(result: Comparison) -> None:
    tasks, micro = result.tasks, result.micro
    for name in ("dense", "pruned", "difference", "agreement"):
        total = sum(task.n * getattr(task, name).value for task in tasks)
        assert getattr(micro, name).value == pytest.approx(total / micro.n)
    for name in ("kl", "js"):
        total = sum(task.n * getattr(task.choices, name).value for task in tasks)
        assert getattr(micro, f"choice_{name}").value == pytest.approx(total / micro.n)
    brier = sum(task.n * task.calibration.brier_shift.value for task in tasks) / micro.n
    assert micro.brier_shift is not None and micro.brier_shift.value == pytest.approx(brier)
    assert micro.clusters is not None
    assert (micro.clusters.kind, micro.clusters.count) == ("passages and documents", 300 + 30 + 220)


def test_chance_is_taken_off(result: Comparison) -> None:
    for task in result.tasks:
        assert task.chance == 0.25
        assert task.pruned_corrected is not None and task.pruned.standard_error is not None
        assert task.pruned_corrected.value == pytest.approx((task.pruned.value - 0.25) / 0.75)
        assert task.pruned_corrected.standard_error == pytest.approx(
            task.pruned.standard_error / 0.75
        )


def test_holm_and_decisions(result: Comparison) -> None:
    from statsmodels.stats.multitest import multipletests

    adjusted = multipletests([task.p_value for task in result.tasks], method="holm")[1]
    assert [task.p_holm for task in result.tasks] == pytest.approx(adjusted.tolist())
    for task in result.tasks:
        assert task.margin == 0.02 and task.decision is not None
        significant = task.p_holm < 0.05
        assert (task.decision == "worse") == (significant and task.difference.low <= -0.02
                                              and task.difference.value < 0)  # fmt: skip
    assert result.micro.p_holm is None and result.macro.p_holm is None


def test_macro_has_the_mean_kappa_and_a_test_of_its_own(result: Comparison) -> None:
    macro, difference = result.macro, result.macro.difference
    assert macro.kappa == pytest.approx(np.mean([task.kappa for task in result.tasks]))
    assert macro.p_method == "score over 3 tasks"
    errors = [task.difference.standard_error for task in result.tasks]
    assert difference.standard_error == pytest.approx(math.hypot(*errors) / 3)
    # By the standard error at the estimate; the test's is at no difference.
    expected = 2 * norm.sf(abs(difference.value) / difference.standard_error)
    assert math.log(macro.p_value) == pytest.approx(math.log(expected), rel=0.25)
    assert (macro.p_value < 0.05) == (difference.high < 0)
    assert (macro.noninferiority_p < 0.025) == (difference.low > -0.02)


def test_macro_of_one_task_is_the_task(pair: Callable[..., tuple[Samples, Samples]]) -> None:
    for size in (None, 5):
        found = compare_answers(*pair({"a": (100, size)}, noise=2.0), settings=FAST)
        (task,), macro = found.tasks, found.macro
        for name in ("retention", "p_value", "p_method", "noninferiority_p", "detectable",
                     "kappa", "decision"):  # fmt: skip
            assert getattr(macro, name) == getattr(task, name), name
        for name in ("dense", "pruned", "difference", "dense_corrected"):
            one, other = getattr(macro, name), getattr(task, name)
            for part in ("value", "standard_error", "low", "high"):
                if getattr(one, part) is not None:
                    assert getattr(one, part) == pytest.approx(getattr(other, part)), (name, part)


def test_micro_calibration_is_that_of_all_documents(
    runs: tuple[Samples, Samples], result: Comparison
) -> None:
    for side, samples in zip(("dense", "pruned"), runs, strict=True):
        scores = np.array(samples.frame["loglikelihoods"].tolist())
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        right = scores.argmax(axis=1) == samples.frame["gold"].to_numpy(dtype=int)
        expected = calibration_error(shares.max(axis=1), right.astype(float), 15)
        assert getattr(result.micro, f"{side}_calibration_error") == pytest.approx(expected)


def test_a_group_has_what_all_its_documents_have(
    pair: Callable[..., tuple[Samples, Samples]],
) -> None:
    tasks = {"law": (50, None), "art": (80, None), "sport": (30, None)}
    found = compare_answers(*pair(tasks, groups={"all": list(tasks)}), settings=FAST)
    (group,), micro = found.groups, found.micro
    for name in ("kappa", "corrected_tasks", "choice_tasks", "calibration_tasks",
                 "dense_calibration_error", "pruned_calibration_error"):  # fmt: skip
        assert getattr(group, name) == pytest.approx(getattr(micro, name)), name
    for name in ("dense", "pruned_corrected", "choice_kl", "choice_js", "margin_shift",
                 "brier_shift"):  # fmt: skip
        assert getattr(group, name).value == pytest.approx(getattr(micro, name).value), name
    assert group.choice_kl is not None and "3 clusters" in str(group.choice_kl.method)
    sums = np.array([task.n * (task.dense.value - group.dense.value) for task in found.tasks])
    error = np.sqrt(3 / 2 * np.square(sums).sum()) / 160
    assert group.dense.standard_error == pytest.approx(error)


def test_decisions_follow_the_margin(runs: tuple[Samples, Samples]) -> None:
    def decisions(margin: float) -> set[str | None]:
        found = compare_answers(*runs, settings=Settings(draws=200, margin=margin))
        return {found.micro.decision, found.macro.decision}

    assert decisions(0.9) == {"no worse than margin"}
    assert decisions(0.0) <= {"worse", "cannot tell"}


def test_square_and_add() -> None:
    parts = [Estimate(value=1.0, low=0.7, high=1.1), Estimate(value=3.0, low=2.6, high=3.3)]
    found = square_and_add(parts)
    assert found.value == 2.0
    assert found.low == pytest.approx(2 - math.hypot(0.3, 0.4) / 2)
    assert found.high == pytest.approx(2 + math.hypot(0.1, 0.3) / 2)
    assert square_and_add(parts[:1]).low == pytest.approx(0.7)
    assert square_and_add([*parts, Estimate(value=2.0)]).low is None
