"""Runs without right and wrong answers: ranked, shown, exported and gated by what there is."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.cli.main import main
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.run_file import (
    NoiseRun,
    RunFile,
    RunRow,
    read_run_file,
    write_run_file,
)
from streamline_bench.report.text import times
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.headline import headline
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.model_card import model_card
from streamline_bench.report.views.overview import perplexity_ratio, ranked
from streamline_bench.report.views.page import to_html
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.settings import Settings

valid = Leaderboard.model_validate

TASK = "toy_roll"


def only_rolling(source: Path, target: Path) -> Path:
    """What lm_eval would have written if it had been asked for one text only."""
    shutil.copytree(source, target)
    file = max(target.rglob("results_*.json"))
    results = json.loads(file.read_text(encoding="utf-8"))
    for name in ("results", "configs", "versions", "n-shot", "n-samples", "task_hashes"):
        results[name] = {task: value for task, value in results[name].items() if task == TASK}
    results["group_subtasks"] = {}
    file.write_text(json.dumps(results), encoding="utf-8")
    for samples in file.parent.glob("samples_*.jsonl"):
        if not samples.name.startswith(f"samples_{TASK}_"):
            samples.unlink()
    return target


@pytest.fixture(scope="module")
def run(lm_eval_outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two evaluations, and a row that failed."""
    folder = tmp_path_factory.mktemp("rolling")
    for label in ("dense", "pruned"):
        only_rolling(lm_eval_outputs / label, folder / label)
    rows = [RunRow(label=label, eval=label) for label in ("dense", "pruned")]
    rows.append(RunRow(label="lost", failed="out of memory"))
    write_run_file(folder, RunFile(dense="dense", rows=rows))
    return folder


@pytest.fixture(scope="module")
def board(run: Path) -> dict[str, Any]:
    given = read_run_file(run)
    given = given.model_copy(
        update={"rows": given.rows[:2], "noise": [NoiseRun(label="again", eval="dense")]}
    )
    board = build_leaderboard(given, run, settings=Settings(draws=100), progress=False)
    return board.model_dump(mode="json")


def test_the_board_says_what_there_is(board: dict[str, Any], run: Path) -> None:
    dense, pruned = board["rows"]
    assert dense["accuracy_macro"] is None and dense["macro"] is None
    assert pruned["accuracy_macro"] is None and pruned["tasks"] == []
    (found,) = pruned["perplexities"]
    results = json.loads(max((run / "pruned").rglob("results_*.json")).read_text(encoding="utf-8"))
    assert found["pruned"] == pytest.approx(results["results"][TASK]["word_perplexity,none"])
    assert board["noise"] is None, "nothing can flip"
    assert Leaderboard.model_validate(board).model_dump(mode="json") == board


def test_views_show_the_ratio(board: dict[str, Any]) -> None:
    ratio = board["rows"][1]["perplexities"][0]["ratio"]
    page, text = to_html(valid(board)), to_markdown(valid(board))
    shown = times(ratio["value"])
    assert shown in page and shown in text
    assert f"perplexity is {ratio['value']:.3g} times dense's" in headline(valid(board))
    for view in (page, text, model_card(valid(board), valid(board).rows[1])):
        assert "No task has right or wrong answers" in view
        assert TASK in view.replace("<wbr>", "").replace("\\", "")
    for absent in ("Accuracy by task", "Stability by task", "McNemar"):
        assert absent not in text
    assert 'id="statistics"' in page and 'id="flips"' not in page and "Agreement" not in page
    record = list(csv.DictReader(io.StringIO(to_csv(valid(board)))))[1]
    assert float(record[f"perplexity_ratio:{TASK}/word"]) == ratio["value"]
    assert record["accuracy_macro"] == "" and record["p_value"] == ""


def test_commands_work_on_such_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: object) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return stopped.value.code, printed.out + printed.err

    code, printed = call("report", run, "--quiet", "--model-cards")
    assert code == 0, printed
    page = (run / "leaderboard.html").read_text(encoding="utf-8")
    assert "1 more failed" in page and "out of memory" in page
    assert TASK in (run / "model-cards" / "pruned" / "README.md").read_text().replace("\\", "")
    code, printed = call("gate", run, "--against", run, "--quiet")
    assert code == 2 and "perplexities" in printed
    code, printed = call("stability", run / "dense", run / "pruned", "--quiet")
    assert code == 0 and f"{TASK}, perplexity per word" in printed


def perplexity(nats: float, half: float | None, task: str = "text", unit: str = "word") -> Any:
    ends = (None, None) if half is None else (nats - half, nats + half)
    return {
        "task": task, "filter": "none", "unit": unit, "n": 4, "units": 40.0,
        "dense": 12.0, "pruned": None, "ratio": None,
        "nats_per_unit": {"value": nats, "standard_error": None, "low": ends[0], "high": ends[1],
                          "method": None},
    }  # fmt: skip


def line(label: str, *perplexities: Any, **fields: Any) -> Row:
    return Row.model_validate(
        {"label": label, "is_dense": label == "dense", "accuracy_macro": None,
         "accuracy_micro": None, "macro": None, "micro": None, "tasks": [],
         "provenance": {"results_file": None, "model": None, "engine": None},
         "perplexities": list(perplexities), **fields}
    )  # fmt: skip


def test_ranking_by_perplexity() -> None:
    rows = [line("lost", failed="why"), line("none"), line("far", perplexity(2000.0, 1.0)),
            line("b", perplexity(0.5, 0.1)), line("dense"),
            line("a", perplexity(0.2, None))]  # fmt: skip
    assert [row.label for row in ranked(rows)] == ["dense", "a", "b", "far", "none", "lost"]
    assert perplexity_ratio(rows[1]) is None and perplexity_ratio(rows[2]) is None
    assert perplexity_ratio(rows[4]) == Estimate(value=1.0)
    assert perplexity_ratio(rows[5]) == Estimate(value=math.exp(0.2))


def test_several_texts_are_a_geometric_mean() -> None:
    row = line("a", perplexity(0.1, 0.03, "x"), perplexity(9.0, 1.0, "x", "byte"),
               perplexity(0.5, 0.04, "y"))  # fmt: skip
    found = perplexity_ratio(row)
    assert found.value == pytest.approx(math.sqrt(math.exp(0.1) * math.exp(0.5)))
    half = math.sqrt(0.03**2 + 0.04**2) / 2
    assert found.low == pytest.approx(math.exp(0.3 - half))
    assert found.high == pytest.approx(math.exp(0.3 + half))


def changed(board: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    rows = [dict(row) if row["is_dense"] else {**row, **fields} for row in board["rows"]]
    return Leaderboard.model_validate({**board, "rows": rows}).model_dump(mode="json")


DIVERGENCE = {
    "documents": 1, "windows": 1, "tokens": 9, "window": 2048,
    "kl": {"value": 4000.0}, "same_top": {"value": 0.0},
    "dense_perplexity": None, "pruned_perplexity": None, "nats_per_token": {"value": 4000.0},
}  # fmt: skip


@pytest.mark.parametrize("which", ["perplexities alone", "beside verdicts"])
def test_numbers_beyond_float64_are_dashes(
    board: dict[str, Any], make_run: Callable[[Path], Path], tmp_path: Path, which: str
) -> None:
    if which == "beside verdicts":
        folder = make_run(tmp_path)
        given = read_run_file(folder)
        given = given.model_copy(update={"rows": given.rows[:2]})
        made = build_leaderboard(given, folder, settings=Settings(draws=100), progress=False)
        board = made.model_dump(mode="json")
    found = changed(board, perplexities=[perplexity(2000.0, None)], divergence=DIVERGENCE)
    page, text, table = to_html(valid(found)), to_markdown(valid(found)), to_csv(valid(found))
    for view in (page, text, table):
        assert "None" not in view and "nan" not in view and "inf" not in view.split()
    assert "+2000.000" in page and "+2000.000" in text
    record = list(csv.DictReader(io.StringIO(table)))[1]
    assert record["perplexity_ratio:text/word"] == "" and record["text_perplexity"] == ""
    assert float(record["nats_per_unit:text/word"]) == 2000.0
    assert 'id="statistics"' in page and "Next tokens" in page
