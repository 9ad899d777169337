"""The demo ends in a report, continues where it stopped, and refuses to mix two demos."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.demo import run_demo
from streamline_bench.errors import OutputError, RecipeError
from streamline_bench.runs import CompareResult
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan

pytestmark = pytest.mark.usefixtures("warm")


def _demo(output: Path, **options: Any) -> CompareResult:
    return run_demo(
        output, **{"rows": ("dense", "streamline_none"), "limit": 4, "progress": False, **options}
    )


@pytest.mark.slow
def test_two_rows_from_compression_to_report(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "runs" / "notebook"
    _demo(output, until="compress")
    checkpoint = output / "streamline_none" / "checkpoint"
    written = (checkpoint / "streamline.json").stat().st_mtime_ns
    assert not (output / "dense" / "eval").exists()
    result = _demo(output)
    assert result.exit_code == 0
    report = result.report
    assert (checkpoint / "streamline.json").stat().st_mtime_ns == written
    assert report is not None and report.is_file()
    leaderboard = json.loads((output / "leaderboard.json").read_text(encoding="utf-8"))
    assert {row["label"] for row in leaderboard["rows"]} == {"dense", "streamline_none"}
    for name in ("leaderboard.html", "leaderboard.md", "leaderboard.csv"):
        assert (output / name).stat().st_size > 0
    page = repository / "reports" / "docs" / "pages" / "howto" / "notebook.md"
    check_notebook(page, result, monkeypatch)


def check_notebook(page: Path, made: CompareResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the cells of the page that tells of notebooks, in a folder with a finished run.

    Its comparison is planned as it is written, and answered with the run that is there.
    """
    planned = []

    def answer(request: Request, output: Path, **_: Any) -> CompareResult:
        planned.append((output, resolve_plan(request)))
        return made

    monkeypatch.setattr("streamline_bench.runs.run.compare_request", answer)
    monkeypatch.chdir(made.run.parent.parent)
    cells = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    shown = [run_cell(cell, names) for cell in cells]
    ((output, plan),) = planned
    assert output == made.run.relative_to(Path.cwd())
    assert [row.label for row in plan.rows] == [
        "dense",
        "streamline_none",
        "shortgpt",
        "last_layers",
    ]
    ranking, accuracy, stable = shown
    assert "<table>" in ranking._repr_html_() and "streamline_none" in ranking._repr_html_()
    assert accuracy.row.tolist() == ["dense", "streamline_none"] and (accuracy.value > 0).all()
    assert stable.index.tolist() == ["streamline_none"]
    assert stable["mean over tasks"].between(0, 1).all() and stable.shape[1] > 5


def run_cell(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell as Jupyter does, and return the value of its last line."""
    *lines, last = ast.parse(cell).body
    assert isinstance(last, ast.Expr)
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="run folder"):
        _demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="known: compress, evaluate, report"):
        _demo(tmp_path / "run", until="reprot")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["steps: [build]\n", "model: [\n"])
def test_overwriting_leaves_a_project_of_someone_else_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "train.py").write_text("mine", encoding="utf-8")
    (tmp_path / "jobs").mkdir()
    with pytest.raises(OutputError, match=r"plan\.yaml is damaged"):
        _demo(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {
        "plan.yaml", "train.py", "jobs"
    }  # fmt: skip


@pytest.mark.slow
def test_overwriting_starts_afresh(tmp_path: Path) -> None:
    output = tmp_path / "run"
    _demo(output, until="compress")
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    result = _demo(output, until="compress", overwrite=True)
    assert result.jobs == {"compress-streamline_none": "done"}
    assert (output / "notes.txt").read_text(encoding="utf-8") == "mine"
