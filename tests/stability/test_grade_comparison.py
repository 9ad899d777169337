"""Metrics of every kind, in real outputs of lm-eval: what judges a task, and what is compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamline_bench.errors import ComparisonError, NumericsError, SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison, GradeComparison
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

FAST = Settings(draws=2000)


@pytest.fixture(scope="module")
def runs(lm_eval_outputs: Path) -> tuple[Samples, Samples]:
    dense, pruned = (
        load_samples(lm_eval_outputs / "graded" / name, run=name, progress=False)
        for name in ("dense", "pruned")
    )
    return dense, pruned


@pytest.fixture(scope="module")
def result(runs: tuple[Samples, Samples]) -> Comparison:
    return compare_answers(*runs, settings=FAST)


def logged(folder: Path, task: str) -> list[dict[str, Any]]:
    file = next(folder.rglob(f"samples_{task}_*.jsonl"))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def grade(result: Comparison, task: str, metric: str) -> GradeComparison:
    return next(each for each in result.grades if (each.task, each.metric) == (task, metric))


def test_what_judges_each_task(result: Comparison) -> None:
    assert {(task.task, task.filter, task.verdict) for task in result.tasks} == {
        ("graded_choice", "none", "acc"),  # brier_score is first, and lower is better
        ("graded_ifeval", "none", "prompt_level_strict_acc"),  # a list is first
        ("graded_repeats", "first", "exact_match"),
        ("graded_repeats", "maj@2", "exact_match"),
        ("graded_squad", "none", "exact"),
    }
    assert {(each.task, each.metric) for each in result.grades if each.decides} == {
        ("graded_code", "pass@1"),
        ("graded_summary", "rouge1"),  # length is first, and lower is better
    }
    assert result.not_compared.keys() == {"graded_roll"}
    assert {found.unit for found in result.perplexities} == {"word", "byte"}


def test_what_only_the_harness_knows_is_named(result: Comparison) -> None:
    named = {(task, name) for task, found in result.aggregate_only.items() for name in found}
    assert named == {
        ("graded_choice", "brier_score"),
        ("graded_ifeval", "inst_level_strict_acc"),
        ("graded_summary", "chrf"),
    }
    assert "a list" in result.aggregate_only["graded_ifeval"]["inst_level_strict_acc"]


@pytest.mark.parametrize(
    ("task", "metric", "scale"),
    [("graded_squad", "f1", 1), ("graded_summary", "rougeL", 100), ("graded_code", "pass@1", 1)],
)
def test_grades_against_the_samples(
    lm_eval_outputs: Path, result: Comparison, task: str, metric: str, scale: float
) -> None:
    before, now = (
        np.array([line[metric] for line in logged(lm_eval_outputs / "graded" / side, task)]) / scale
        for side in ("dense", "pruned")
    )
    found = grade(result, task, metric)
    assert found.kind == "grade" and found.scale == scale
    assert found.dense.value == pytest.approx(before.mean())
    assert found.dense.standard_error == pytest.approx(before.std(ddof=1) / np.sqrt(len(before)))
    assert found.pruned.value == pytest.approx(now.mean())
    assert found.difference is not None
    assert found.difference.value == pytest.approx((now - before).mean())
    assert (found.wins, found.ties, found.losses) == (
        (now > before).sum(), (now == before).sum(), (now < before).sum(),
    )  # fmt: skip
    source = np.random.default_rng(3)
    drawn = source.integers(len(now), size=(20_000, len(now)))
    ends = np.quantile((now - before)[drawn].mean(axis=1), [0.025, 0.975])
    assert found.difference.ends == pytest.approx(ends, abs=0.02)


def test_lengths_are_a_ratio(lm_eval_outputs: Path, result: Comparison) -> None:
    before, now = (
        np.array([line["length"] for line in logged(lm_eval_outputs / "graded" / side,
                                                    "graded_summary")])
        for side in ("dense", "pruned")
    )  # fmt: skip
    found = grade(result, "graded_summary", "length")
    assert (found.kind, found.higher_is_better, found.difference) == ("ratio", False, None)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(now.sum() / before.sum())
    source = np.random.default_rng(3)
    drawn = source.integers(len(now), size=(20_000, len(now)))
    ends = np.quantile(now[drawn].sum(axis=1) / before[drawn].sum(axis=1), [0.025, 0.975])
    assert found.ratio.ends == pytest.approx(ends, abs=0.02)
    assert (found.wins, found.losses) == ((now < before).sum(), (now > before).sum())


def test_only_deciding_grades_are_adjusted_and_decided(result: Comparison) -> None:
    for each in result.grades:
        assert (each.p_holm is not None) == each.decides == (each.decision is not None)
    deciding = [each for each in result.grades if each.decides]
    smallest = min(deciding, key=lambda each: each.p_value or 0.0)
    assert smallest.p_holm == pytest.approx(min(1.0, len(deciding) * (smallest.p_value or 0.0)))


def test_grades_leave_verdicts_as_they_are(runs: tuple[Samples, Samples]) -> None:
    alone = compare_answers(*runs, tasks=["graded_choice"], settings=FAST)
    result = compare_answers(*runs, settings=FAST)
    own = next(task for task in result.tasks if task.task == "graded_choice")
    same = alone.tasks[0].model_copy(update={"p_holm": own.p_holm, "adjusted": own.adjusted})
    assert same == own


def test_groups_with_subgroups(runs: tuple[Samples, Samples]) -> None:
    result = compare_answers(*runs, tasks=["graded_group"], settings=FAST)
    tasks = {each.task for each in (*result.tasks, *result.grades)}
    assert tasks == {"graded_squad", "graded_summary"}


def test_another_metric_can_be_asked_for(runs: tuple[Samples, Samples]) -> None:
    asked = {"graded_squad": "f1", "graded_group::graded_texts": "rougeL", "graded_code": "pass@2"}
    result = compare_answers(*runs, settings=Settings(draws=2000, metrics=asked))
    deciding = {(each.task, each.metric) for each in result.grades if each.decides}
    assert deciding == {("graded_squad", "f1"), ("graded_summary", "rougeL")}
    judged = {task.task: task.verdict for task in result.tasks}
    assert judged["graded_code"] == "pass@2"  # of two answers, one is right or none
    assert "graded_squad" not in judged
    assert result.metrics == asked


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({"graded_squad": "f2"}, "exact, f1"),
        ({"graded_summary": "chrf"}, "no number per document"),
        ({"graded_ifeval": "inst_level_strict_acc"}, "a list per document"),
        ({"graded_squat": "f1"}, "graded_squad"),
    ],
)
def test_a_metric_that_the_samples_do_not_hold(
    runs: tuple[Samples, Samples], metrics: dict[str, str], named: str
) -> None:
    with pytest.raises(SamplesError, match=named):
        compare_answers(*runs, settings=Settings(draws=200, metrics=metrics))


def test_acc_norm_and_another_metric_contradict_each_other(runs: tuple[Samples, Samples]) -> None:
    settings = Settings(verdict="correct_norm", metrics={"graded_squad": "f1"})
    with pytest.raises(SamplesError, match="acc_norm judges"):
        compare_answers(*runs, settings=settings)


def edited(
    source: Path, target: Path, task: str, change: Callable[[dict[str, Any]], None]
) -> Samples:
    """The run with changed lines of a task."""
    shutil.copytree(source, target)
    file = next(target.rglob(f"samples_{task}_*.jsonl"))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        change(line)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return load_samples(target, run=target.name, progress=False)


def nan_in_document_3(metric: str) -> Callable[[dict[str, Any]], None]:
    return lambda line: line.update({metric: float("nan")}) if line["doc_id"] == 3 else None


def test_nan_in_what_decides_is_refused(
    lm_eval_outputs: Path, tmp_path: Path, runs: tuple[Samples, Samples]
) -> None:
    source = lm_eval_outputs / "graded" / "pruned"
    bad = edited(source, tmp_path / "bad", "graded_summary", nan_in_document_3("rouge1"))
    with pytest.raises(NumericsError, match=r"bad.*document 3 has rouge1 nan"):
        compare_answers(runs[0], bad, settings=FAST)
    other = Settings(draws=200, metrics={"graded_summary": "rougeL"})
    result = compare_answers(runs[0], bad, settings=other)
    assert "nan on document 3" in result.aggregate_only["graded_summary"]["rouge1"]


def test_a_missing_grade_is_refused(
    lm_eval_outputs: Path, tmp_path: Path, runs: tuple[Samples, Samples]
) -> None:
    def change(line: dict[str, Any]) -> None:
        if line["doc_id"] == 5:
            line["rouge1"] = None

    bad = edited(lm_eval_outputs / "graded" / "pruned", tmp_path / "bad", "graded_summary", change)
    with pytest.raises(SamplesError, match=r"'rouge1' on document 5 .*but on others"):
        compare_answers(runs[0], bad, settings=FAST)


def test_a_filter_in_one_run_only(
    lm_eval_outputs: Path, tmp_path: Path, runs: tuple[Samples, Samples]
) -> None:
    def change(line: dict[str, Any]) -> None:
        if line["filter"] == "maj@2":
            line["filter"] = "maj@4"

    bad = edited(lm_eval_outputs / "graded" / "pruned", tmp_path / "bad", "graded_repeats", change)
    with pytest.raises(ComparisonError, match=r"maj@2.*maj@4"):
        compare_answers(runs[0], bad, settings=FAST)


def test_samples_of_different_repeats(runs: tuple[Samples, Samples]) -> None:
    dense, pruned = runs
    assert dense.info.repeats["graded_repeats"] == 2
    more = pruned.info.model_copy(update={"repeats": {**pruned.info.repeats, "graded_code": 4}})
    with pytest.raises(ComparisonError, match=r"graded_code.*repeats 2 .* 4"):
        compare_answers(dense, Samples(pruned.frame, more), settings=FAST)


def test_a_list_of_repeats_is_their_mean(lm_eval_outputs: Path, tmp_path: Path) -> None:
    def change(line: dict[str, Any]) -> None:
        line["metrics"] = ["pass@1"]
        line["pass@1"] = [1, 0] if line["doc_id"] % 2 else [1, 1]

    source = lm_eval_outputs / "graded" / "dense"
    found = edited(source, tmp_path / "listed", "graded_code", change)
    rows = found.frame[found.frame["task"] == "graded_code"]
    assert [record["pass@1"] for record in rows["metrics"][:2]] == [1.0, 0.5]


def test_a_saved_table_gives_the_same(runs: tuple[Samples, Samples], tmp_path: Path) -> None:
    again = []
    for samples in runs:
        samples.save(tmp_path / f"{samples.info.run}.parquet")
        again.append(Samples.load(tmp_path / f"{samples.info.run}.parquet"))
    assert compare_answers(*again, settings=FAST) == compare_answers(*runs, settings=FAST)


def test_grades_have_a_place_in_the_board(lm_eval_outputs: Path, tmp_path: Path) -> None:
    from streamline_bench.report.build import build_leaderboard, write_report
    from streamline_bench.report.frame import results
    from streamline_bench.report.leaderboard import read_leaderboard
    from streamline_bench.report.run_file import RunFile, RunRow
    from streamline_bench.report.views.terminal import terminal_table

    rows = [RunRow(label=side, eval=side) for side in ("dense", "pruned")]
    run = RunFile(dense="dense", rows=rows, metrics={"graded_summary": "rougeL"})
    board = build_leaderboard(run, lm_eval_outputs / "graded", settings=FAST, progress=False)
    dense, pruned = board.rows
    scores = {(score.task, score.metric): score for score in pruned.grades}
    assert scores["graded_summary", "rougeL"].decides
    assert board.method.metrics == {"graded_summary": "rougeL"}
    assert [score.comparison for score in dense.grades] == [None] * len(dense.grades)
    assert pruned.other_metrics["graded_summary"]["chrf"] > 0
    write_report(board, tmp_path)
    assert read_leaderboard(tmp_path / "leaderboard.json") == board
    for name in ("leaderboard.md", "leaderboard.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "rougeL" in text and "cannot tell" in text
    table = results(board)
    line = table[(table["metric"] == "difference: rougeL") & (table["row"] == "pruned")].iloc[0]
    found = scores["graded_summary", "rougeL"].comparison
    assert found is not None and found.difference is not None
    assert line["value"] == found.difference.value and line["decision"] == found.decision
    csv = (tmp_path / "leaderboard.csv").read_text(encoding="utf-8")
    assert "grade_difference:graded_summary/rougeL" in csv.splitlines()[0]

    only = board.model_copy(
        update={
            "rows": [
                row.model_copy(
                    update={"accuracy_macro": None, "accuracy_micro": None, "macro": None,
                            "micro": None, "tasks": [], "groups": []}
                )
                for row in board.rows
            ]
        }
    )  # fmt: skip
    assert "Grades: change from dense" in terminal_table(only)
    write_report(only, tmp_path / "only")
    assert "Tasks are graded" in (tmp_path / "only" / "leaderboard.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [("metrics", {"graded_squad": "f1"}, "--metric"), ("pairs", {"a": "b"}, "--pair")],
)
def test_runs_that_are_judged_otherwise_are_not_one_board(
    lm_eval_outputs: Path, tmp_path: Path, key: str, value: dict[str, str], option: str
) -> None:
    from streamline_bench.report.merge import merged_leaderboard
    from streamline_bench.report.run_file import RunFile, RunRow, write_run_file

    for name, given in (("one", {}), ("two", {key: value})):
        shutil.copytree(lm_eval_outputs / "graded" / "dense", tmp_path / name / "dense")
        rows = [RunRow(label="dense", eval="dense")]
        write_run_file(tmp_path / name, RunFile(dense="dense", rows=rows, **given))
    with pytest.raises(ComparisonError, match=f"{next(iter(value))}.*{option}"):
        merged_leaderboard([tmp_path / "one", tmp_path / "two"], progress=False)
