"""Grades in the gate: two runs whose tasks are judged by F1 or ROUGE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.errors import ComparisonError, SamplesError
from streamline_bench.gate.evidence import open_source, read_evidence, write_reference
from streamline_bench.gate.judge import gate
from streamline_bench.gate.result import Check, GateResult, Thresholds
from streamline_bench.report.build import build_report
from streamline_bench.report.run_file import RunFile, RunRow, write_run_file
from streamline_bench.stability.settings import Settings

FAST = Thresholds(draws=1000)


@pytest.fixture(scope="module")
def graded(lm_eval_outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a run folder; ``change`` maps a grade of the pruned row to another."""

    def make(change: Callable[[float], float] = float, model: str = "hf") -> Path:
        folder = tmp_path_factory.mktemp("graded")
        for side in ("dense", "pruned"):
            shutil.copytree(lm_eval_outputs / "graded" / side, folder / side)
            about = next((folder / side).rglob("results_*.json"))
            found = json.loads(about.read_text(encoding="utf-8"))
            found["config"]["model"] = model
            about.write_text(json.dumps(found), encoding="utf-8")
        file = next((folder / "pruned").rglob("samples_graded_summary_*.jsonl"))
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line["rouge1"] = change(line["rouge1"])
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        rows = [RunRow(label=side, eval=side) for side in ("dense", "pruned")]
        metrics = {"graded_squad": "f1"}
        write_run_file(folder, RunFile(dense="dense", rows=rows, metrics=metrics))
        build_report(folder, settings=Settings(draws=200, metrics=metrics), progress=False)
        return folder

    return make


@pytest.fixture(scope="module")
def before(graded: Callable[..., Path]) -> Path:
    return graded(lambda grade: 80 + grade / 10)


def checks(result: GateResult) -> dict[tuple[str, str | None], Check]:
    return {(c.row, c.task): c for c in result.checks if c.quantity == "grade"}


def test_the_same_run_is_ok(before: Path) -> None:
    found = checks(gate(before, before, thresholds=FAST, progress=False))
    assert {key[1] for key in found} == {"graded_squad", "graded_summary", "graded_code", None}
    assert {check.status for check in found.values()} == {"ok"}
    assert found["pruned", "graded_summary"].how == "no answer changed"


def test_lower_grades_close_the_gate(before: Path, graded: Callable[..., Path]) -> None:
    result = gate(graded(lambda grade: 50 + grade / 10), before, thresholds=FAST, progress=False)
    found = checks(result)["pruned", "graded_summary"]
    assert (found.status, result.passed) == ("regressed", False)
    assert found.change == pytest.approx(-0.3)
    assert found.high is not None and found.high < 0
    assert found.p_value is not None and found.p_value < 0.05


def test_a_reference_file_keeps_the_grades(before: Path, tmp_path: Path) -> None:
    write_reference(read_evidence(before, progress=False).figures, tmp_path / "reference.json")
    result = gate(before, tmp_path / "reference.json", thresholds=FAST, progress=False)
    assert checks(result)["pruned", "graded_summary"].how == "no answer changed"
    figures = open_source(tmp_path / "reference.json").figures
    grades = {grade.task: grade for row in figures.rows for grade in row.grades if not row.is_dense}
    assert grades["graded_summary"].metric == "rouge1"
    assert 0.8 <= min(grades["graded_summary"].values or ()) <= 1


def test_two_engines_meet_only_where_it_is_asked_for(
    before: Path, graded: Callable[..., Path], tmp_path: Path
) -> None:
    other, reference = graded(lambda grade: 80 + grade / 10, "vllm"), tmp_path / "reference.json"
    write_reference(read_evidence(before, progress=False).figures, reference)
    shutil.copy(other / "leaderboard.json", tmp_path / "leaderboard.json")  # without its answers
    for run, against in ((other, before), (other, reference), (tmp_path, reference)):
        with pytest.raises(ComparisonError, match=r"by vLLM in .* by transformers .*--across-eng"):
            gate(run, against, thresholds=FAST, progress=False)
    assert gate(other, other, thresholds=FAST, progress=False).passed
    result = gate(other, reference, thresholds=FAST, across_engines=True, progress=False)
    assert result.passed and {check.quantity for check in result.checks} >= {"accuracy", "grade"}
    assert result.run.endswith("(vLLM)") and result.against.endswith("(transformers)")
    older = json.loads(reference.read_text())  # it does not say what answered
    for row in older["rows"]:
        del row["computed_by"]
    reference.write_text(json.dumps(older))
    assert gate(other, reference, thresholds=FAST, progress=False).passed


def test_without_answers_the_estimates_are_compared(before: Path, tmp_path: Path) -> None:
    shutil.copy(before / "leaderboard.json", tmp_path / "leaderboard.json")
    result = gate(before, tmp_path / "leaderboard.json", thresholds=FAST, progress=False)
    found = checks(result)["pruned", "graded_summary"]
    assert (found.how, found.change) == ("standard errors", 0.0)


def test_a_grade_that_is_gone_is_missing(before: Path, lm_eval_outputs: Path) -> None:
    reference = open_source(before).figures
    fewer = [row.model_copy(update={"grades": row.grades[:1]}) for row in reference.rows]
    from streamline_bench.gate.evidence import Evidence
    from streamline_bench.gate.judge import judge

    now = Evidence(reference.model_copy(update={"rows": tuple(fewer)}))
    result = judge(now, Evidence(reference), FAST)
    gone = [check for check in result.checks if check.status == "missing"]
    assert gone and {check.quantity for check in gone} == {"grade"}
    assert not result.passed


def test_answers_of_another_run_are_refused(before: Path, graded: Callable[..., Path]) -> None:
    other = graded(lambda grade: grade / 2)
    shutil.copy(before / "leaderboard.json", other / "leaderboard.json")
    with pytest.raises(SamplesError, match=r"graded_summary.*rouge1.*report again"):
        read_evidence(other, progress=False)
