"""The whole comparison, on real outputs of the harness, against plain loops."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison, TaskComparison
from streamline_bench.stability.noise import noise_floor
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

FAST = Settings(draws=500)


@pytest.fixture(scope="module")
def runs(lm_eval_outputs: Path) -> tuple[Samples, Samples]:
    return (
        load_samples(lm_eval_outputs / "dense", run="dense", progress=False),
        load_samples(lm_eval_outputs / "pruned", run="pruned", progress=False),
    )


@pytest.fixture(scope="module")
def result(runs: tuple[Samples, Samples]) -> Comparison:
    return compare_answers(*runs, settings=FAST)


def task(result: Comparison, name: str, filter_name: str = "none") -> TaskComparison:
    return next(t for t in result.tasks if (t.task, t.filter) == (name, filter_name))


def raw_lines(folder: Path, name: str) -> list[dict]:
    file = next(max(folder.rglob("results_*.json")).parent.glob(f"samples_{name}_*.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_stability_from_the_raw_files(result: Comparison, lm_eval_outputs: Path) -> None:
    """Equations 5 and 6 in a loop over lm-eval's own lines, without our table."""
    total = agreeing = plain = 0.0
    lines = zip(
        raw_lines(lm_eval_outputs / "dense", "toy_mc"),
        raw_lines(lm_eval_outputs / "pruned", "toy_mc"),
        strict=True,
    )
    for dense, pruned in lines:
        nll = [
            -float(answer[0]) / len(choice.encode())
            for answer, choice in zip(dense["filtered_resps"], dense["doc"]["choices"], strict=True)
        ]
        weight = math.exp(statistics.stdev(nll))
        total += weight
        agreeing += weight * (dense["acc"] == pruned["acc"])
        plain += dense["acc"] == pruned["acc"]
    found = task(result, "toy_mc")
    assert found.stability is not None
    assert found.stability.value == pytest.approx(agreeing / total, rel=1e-12)
    assert found.agreement.value == pytest.approx(plain / 40)
    assert found.stability.value != pytest.approx(found.agreement.value, abs=1e-6)
    assert found.stability.low <= found.stability.value <= found.stability.high


def test_flips_from_the_raw_files(result: Comparison, lm_eval_outputs: Path) -> None:
    lost = gained = moved = same = 0
    lines = zip(
        raw_lines(lm_eval_outputs / "dense", "toy_mc"),
        raw_lines(lm_eval_outputs / "pruned", "toy_mc"),
        strict=True,
    )
    for dense, pruned in lines:
        chosen = [
            max(range(4), key=lambda j, line=line: float(line["filtered_resps"][j][0]))
            for line in (dense, pruned)
        ]
        same += chosen[0] == chosen[1]
        lost += dense["acc"] > pruned["acc"]
        gained += dense["acc"] < pruned["acc"]
        moved += dense["acc"] == pruned["acc"] == 0 and chosen[0] != chosen[1]
    found = task(result, "toy_mc")
    flips = found.flips
    assert (flips.right_to_wrong, flips.wrong_to_right) == (lost, gained)
    assert flips.wrong_to_other_wrong == moved
    assert found.same_choice == pytest.approx(same / 40)
    assert lost and gained and moved, "the fixture should have flips of every kind"


def test_accuracy_and_error_are_the_harness_own(
    result: Comparison, runs: tuple[Samples, Samples]
) -> None:
    for found in result.tasks:
        for side, samples in (("dense", runs[0]), ("pruned", runs[1])):
            theirs = samples.info.results[found.task]
            estimate = getattr(found, side)
            assert estimate.value == theirs[f"{found.verdict},{found.filter}"]
            assert estimate.standard_error == pytest.approx(
                theirs[f"{found.verdict}_stderr,{found.filter}"]
            )


def test_tasks_without_choices_have_no_stability(result: Comparison) -> None:
    generated = task(result, "toy_gen", "strict")
    assert generated.stability is None and generated.effective_n is None
    assert generated.same_choice is not None
    assert task(result, "toy_ll").same_choice is None
    assert result.not_compared == {"toy_roll": "no right or wrong answers by 'correct'"}


def test_macro_and_micro(result: Comparison) -> None:
    used = [t for t in result.tasks if t.filter != "first"]
    assert result.macro.tasks == len(used) == 4
    assert result.macro.pruned.value == pytest.approx(np.mean([t.pruned.value for t in used]))
    stable = [t.stability.value for t in used if t.stability is not None]
    assert result.macro.stability is not None
    assert result.macro.stability.value == pytest.approx(np.mean(stable))
    n = sum(t.n for t in used)
    assert result.micro.n == n
    right = sum(t.pruned.value * t.n for t in used)
    assert result.micro.pruned.value == pytest.approx(right / n)
    assert result.macro.difference.low <= result.macro.difference.value
    assert result.micro.flips == result.macro.flips


def test_a_run_against_itself(runs: tuple[Samples, Samples]) -> None:
    same = compare_answers(runs[0], runs[0], settings=FAST)
    assert same.micro.agreement.value == 1.0
    assert same.micro.flips.right_to_wrong == same.micro.flips.wrong_to_right == 0
    found = task(same, "toy_mc")
    assert found.stability is not None and found.stability.value == 1.0
    assert found.stability.low is not None and found.stability.low < 1.0, "40 are not infinity"
    assert found.mcnemar_p == 1.0 and found.same_choice == 1.0 and found.kappa == 1.0


def test_seed_decides_and_nothing_else_does(runs: tuple[Samples, Samples]) -> None:
    again = compare_answers(*runs, settings=FAST)
    alone = compare_answers(*runs, tasks=["toy_mc"], settings=FAST)
    of_the_family = {"p_holm": None, "adjusted": None, "decision": None}
    assert task(again, "toy_mc").model_copy(update=of_the_family) == task(
        alone, "toy_mc"
    ).model_copy(update=of_the_family)
    other = compare_answers(*runs, tasks=["toy_mc"], settings=replace(FAST, seed=1))
    assert task(other, "toy_mc").stability != task(alone, "toy_mc").stability


def test_acc_norm_as_the_verdict(runs: tuple[Samples, Samples]) -> None:
    result = compare_answers(*runs, settings=replace(FAST, verdict="correct_norm"))
    (found,) = result.tasks
    assert found.verdict == "acc_norm"
    assert found.pruned.value == runs[1].info.results["toy_mc"]["acc_norm,none"]
    assert set(result.not_compared) == {"toy_fill", "toy_gen", "toy_ll", "toy_roll"}


def test_reference_script_mode(runs: tuple[Samples, Samples]) -> None:
    result = compare_answers(*runs, settings=Settings(mode="reference_script", ddof=1))
    assert result.ddof == 0
    found = task(result, "toy_mc")
    frame = runs[0].frame[runs[0].frame["task"] == "toy_mc"]
    spreads = [
        statistics.pstdev([-ll / n for ll, n in zip(lls, sizes, strict=True)])
        for lls, sizes in zip(frame["loglikelihoods"], frame["byte_lengths"], strict=True)
    ]
    weights = [math.exp(spread) for spread in spreads]
    first = round(found.agreement.value * 40)
    assert found.stability is not None
    assert found.stability.value == pytest.approx(sum(weights[:first]) / sum(weights))
    assert found.stability.low is None
    assert result.micro.stability is None


def test_perplexities_alone_have_no_summaries(runs: tuple[Samples, Samples]) -> None:
    alone = compare_answers(*runs, tasks=["toy_roll"])
    assert alone.tasks == alone.groups == () and alone.macro is None and alone.micro is None
    assert alone.not_compared == {"toy_roll": "no right or wrong answers by 'correct'"}
    beside = compare_answers(*runs, settings=FAST).perplexities
    assert alone.perplexities == tuple(item for item in beside if item.task == "toy_roll")
    assert Comparison.model_validate_json(alone.model_dump_json()) == alone
    with pytest.raises(SamplesError, match=r"No task of 'dense' has .* that could flip"):
        noise_floor(runs[0], [runs[0]], tasks=["toy_roll"])


def test_nothing_to_compare(runs: tuple[Samples, Samples]) -> None:
    silent = [
        replace(samples, frame=samples.frame.assign(metrics=[{}] * len(samples.frame)))
        for samples in runs
    ]
    with pytest.raises(SamplesError, match="No task of 'dense' has right or wrong answers"):
        compare_answers(silent[0], silent[1], tasks=["toy_roll"])


def test_a_missing_verdict_names_the_document(runs: tuple[Samples, Samples]) -> None:
    frame = runs[1].frame.copy()
    frame.loc[(frame["task"] == "toy_mc") & (frame["doc_id"] == 4), "correct"] = None
    with pytest.raises(SamplesError, match="Run 'pruned' has no verdict on document 4"):
        compare_answers(runs[0], replace(runs[1], frame=frame), settings=FAST)


def test_nan_in_a_table_names_the_document(runs: tuple[Samples, Samples]) -> None:
    frame = runs[0].frame.copy()
    index = frame.index[(frame["task"] == "toy_mc") & (frame["doc_id"] == 9)][0]
    frame.at[index, "loglikelihoods"] = [math.nan, -1.0, -2.0, -3.0]
    with pytest.raises(NumericsError, match="Task 'toy_mc', document 9"):
        compare_answers(replace(runs[0], frame=frame), runs[1], settings=FAST)


def test_one_document(runs: tuple[Samples, Samples]) -> None:
    def first(samples: Samples) -> Samples:
        frame = samples.frame
        return replace(samples, frame=frame[(frame["task"] == "toy_mc") & (frame["doc_id"] == 0)])

    result = compare_answers(first(runs[0]), first(runs[1]), settings=FAST)
    assert result.micro.n == 1
    assert result.micro.dense.standard_error is None
    assert result.tasks[0].difference.low < result.tasks[0].difference.high
