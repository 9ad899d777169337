"""``streamline-bench report``: making the report of a run folder again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamline_bench.cli.main import main
from streamline_bench.cli.report import command
from streamline_bench.report.build import write_report
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.runs.run import CompareResult

BOARD = Leaderboard.model_validate({
    "title": "Kept", "dense": "d",
    "method": {"mode": "paper", "ddof": 1, "quantity": "nll_per_byte", "verdict": "correct",
               "confidence": 0.95, "draws": 10, "seed": 0},
    "rows": [{"label": "d", "is_dense": True, "accuracy_macro": {"value": 0.5},
              "accuracy_micro": {"value": 0.5}, "macro": None, "micro": None, "tasks": [],
              "provenance": {"results_file": "r.json", "model": "m", "engine": "lm-eval"}}],
    "versions": {"streamline-bench": "0"},
})  # fmt: skip


def test_a_leaderboard_alone_is_rendered_again(tmp_path: Path) -> None:
    write_report(BOARD, tmp_path)
    (tmp_path / "leaderboard.html").unlink()
    for path in (tmp_path, tmp_path / "leaderboard.json"):
        result = CliRunner().invoke(command, [str(path)], catch_exceptions=False)
        assert result.exit_code == 0 and f"Open {tmp_path / 'leaderboard.html'}" in result.output
        assert "Kept" in (tmp_path / "leaderboard.html").read_text()
        assert "50.0" in result.output, "the table stands before the path"


def test_schema_is_json_and_needs_no_run() -> None:
    result = CliRunner().invoke(command, ["--schema"], catch_exceptions=False)
    assert json.loads(result.output)["title"] == "Leaderboard"
    for options in (["run", "--schema"], ["--schema", "--model-cards"],
                    ["--schema", "--every-eval-ever", "Lab"]):  # fmt: skip
        result = CliRunner().invoke(command, options)
        assert result.exit_code == 2 and "--schema reads no run" in result.output
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 2 and "Give the run folder, or --schema." in result.output


def test_model_cards_are_written_beside(tmp_path: Path) -> None:
    write_report(BOARD, tmp_path)
    result = CliRunner().invoke(command, [str(tmp_path), "--model-cards"], catch_exceptions=False)
    assert result.exit_code == 0 and "Model card" not in result.output, "dense alone has none"


def test_exports_are_written_beside(tmp_path: Path) -> None:
    write_report(BOARD, tmp_path)
    result = CliRunner().invoke(command, [str(tmp_path), "--exports"], catch_exceptions=False)
    assert result.exit_code == 0 and str(tmp_path / "exports") in result.output
    made = {path.name for path in (tmp_path / "exports").iterdir()}
    assert made == {"table.tex", "table.md", "results.csv", "citations.bib", "figures"}


def test_records_are_written_beside(tmp_path: Path) -> None:
    write_report(BOARD, tmp_path)
    given = [str(tmp_path), "--every-eval-ever", "Lab"]
    result = CliRunner().invoke(command, given, catch_exceptions=False)
    assert result.exit_code == 0 and "(0, without single answers" in result.output


def test_a_comparison_carries_its_results(tmp_path: Path) -> None:
    page = write_report(BOARD, tmp_path)
    done = CompareResult(run=tmp_path, report=page)
    assert done.ranking().accuracy.tolist() == [0.5]
    assert done.results().query("metric == 'accuracy'").value.tolist() == [0.5, 0.5]
    assert json.loads(json.dumps(done.summary()))["results"][0]["row"] == "d"
    shown = done._repr_html_()
    assert "<table>" in shown and "50.0" in shown
    hostile = BOARD.model_dump(mode="json")
    hostile["dense"] = hostile["rows"][0]["label"] = "<script>x</script>"
    write_report(Leaderboard.model_validate(hostile), tmp_path)
    assert "<script" not in done._repr_html_()
    without = CompareResult(run=tmp_path / "<b>", report=None)
    assert "results" not in without.summary() and "<b>" not in without._repr_html_()


def test_user_errors_end_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert "has no run.json" in capsys.readouterr().err
    (tmp_path / "leaderboard.json").write_text('{"title": "x"}')
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert "leaderboard.json: 'dense': Field required" in capsys.readouterr().err
