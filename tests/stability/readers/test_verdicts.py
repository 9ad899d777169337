"""A metric is a verdict of a task or it is not: a grade that happens to be 0 or 1 is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.run_file import RunFile, RunRow
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.readers.lm_eval_rows import with_verdicts
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Row
from streamline_bench.stability.settings import Settings

FAST = Settings(draws=200)


def row(filter_name: str = "none", **metrics: float) -> Row:
    named = [name for name in ("acc", "exact_match", "em") if metrics.get(name) in (0, 1)]
    return Row(
        task="t", output_type="multiple_choice", doc_hash="d", prompt_hash="p", target_hash="t",
        request_hash="r", prompt="q", target="1", gold=1,
        filter=filter_name,
        metrics=metrics,
        correct=bool(metrics[named[0]]) if named else None,
        verdict_metric=named[0] if named else None,
        correct_norm=bool(metrics["acc_norm"]) if metrics.get("acc_norm") in (0, 1) else None,
    )  # fmt: skip


def judged(*rows: Row) -> list[Row]:
    with_verdicts(rows)
    return list(rows)


def test_one_grade_makes_the_metric_graded() -> None:
    found = judged(row(acc=1.0, acc_norm=1.0), row(acc=0.37, acc_norm=0.0))
    assert [part.correct for part in found] == [None, None]
    assert [part.verdict_metric for part in found] == [None, None]
    assert found[0].gold is None, "it was read with the help of acc"
    assert [part.correct_norm for part in found] == [True, False]


def test_a_graded_norm_leaves_the_other_verdict() -> None:
    found = judged(row(acc=1.0, acc_norm=1.0), row(acc=0.0, acc_norm=0.5))
    assert [part.correct for part in found] == [True, False]
    assert [part.correct_norm for part in found] == [None, None]
    assert [part.gold for part in found] == [1, 1]


def test_the_first_metric_decides_even_as_a_grade() -> None:
    found = judged(row(acc=1.0, exact_match=0.0), row(acc=0.5, exact_match=1.0))
    assert [part.verdict_metric for part in found] == [None, None]


def test_the_configuration_says_which_metric_is_first() -> None:
    rows = [row(acc=1.0, own=0.0, loss=1.0), row(acc=0.0, own=1.0, loss=0.0)]
    with_verdicts(rows, {"loss": False, "missing": True, "own": True, "acc": True})
    assert [part.verdict_metric for part in rows] == ["own"] * 2
    assert [part.correct for part in rows] == [False, True]


def test_filters_are_judged_apart() -> None:
    found = judged(row("a", em=1.0), row("a", em=0.5), row("b", em=1.0), row("b", em=0.0))
    assert [part.correct for part in found] == [None, None, True, False]


def test_verdicts_stay() -> None:
    assert judged(row(acc=1.0), row(acc=0.0, f1=0.3)) == [row(acc=1.0), row(acc=0.0, f1=0.3)]


def graded_run(source: Path, target: Path, grade: Callable[[int], float]) -> Path:
    """A run whose generation task is scored by a mean over references."""
    shutil.copytree(source, target)
    file = next(max(target.rglob("results_*.json")).parent.glob("samples_toy_gen_*.jsonl"))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["metrics"] = ["em"]
        line["em"] = grade(int(line["doc_id"]))
        line.pop("exact_match", None)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return target


GRADES: dict[str, Callable[[int], float]] = {
    "some answers": lambda document: (0.0, 0.5, 1.0)[document % 3],
    "one answer": lambda document: 0.3 if document == 0 else 1.0,
}


@pytest.mark.parametrize("name", GRADES)
@pytest.mark.parametrize("sides", [("dense", "pruned"), ("dense",), ("pruned",)])
def test_a_graded_task_does_not_stop_the_others(
    lm_eval_outputs: Path, tmp_path: Path, name: str, sides: tuple[str, ...]
) -> None:
    runs = {}
    for side in ("dense", "pruned"):
        grade = GRADES[name] if side in sides else lambda document: float(document % 2)
        runs[side] = graded_run(lm_eval_outputs / side, tmp_path / side, grade)
    samples = [load_samples(path, run=side, progress=False) for side, path in runs.items()]
    result = compare_answers(*samples, settings=FAST)
    assert "toy_gen" not in result.not_compared
    assert {(found.task, found.metric, found.decides) for found in result.grades} == {
        ("toy_gen", "em", True)
    }
    assert "toy_mc" in {task.task for task in result.tasks}
    assert "toy_gen" in {found.task for found in result.generations}
    rows = [RunRow(label=side, eval=path.relative_to(tmp_path).as_posix())
            for side, path in runs.items()]  # fmt: skip
    run = RunFile(dense="dense", rows=rows)
    board = build_leaderboard(run, tmp_path, settings=FAST, progress=False)
    flips = [flip.task for line in board.rows for flip in line.worst_flips]
    assert "toy_gen" not in flips


def test_runs_judged_by_different_metrics_are_not_compared(
    lm_eval_outputs: Path, tmp_path: Path
) -> None:
    dense = load_samples(lm_eval_outputs / "dense", run="dense", progress=False)
    other = graded_run(lm_eval_outputs / "pruned", tmp_path / "p", lambda document: 1.0)
    result = compare_answers(
        dense, load_samples(other, run="pruned", progress=False), settings=FAST
    )
    reason = result.not_compared["toy_gen"]
    assert reason == "judged by exact_match in one run, by em in the other"
