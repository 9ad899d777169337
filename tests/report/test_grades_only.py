"""A board of grades alone, with seeds: folded, ranked, shown, exported and gated."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from streamline_bench.gate.judge import gate
from streamline_bench.gate.result import Thresholds
from streamline_bench.report.build import build_leaderboard, write_report
from streamline_bench.report.frame import html_table, ranking, results
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import NoiseRun, RunFile, RunRow, write_run_file
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.exports import to_table
from streamline_bench.report.views.headline import headline
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.model_card import model_card
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.terminal import terminal_table
from streamline_bench.stability.samples import RunInfo, Samples
from streamline_bench.stability.settings import Settings

N = 60
METRICS = {"summary": ("rouge1", 100.0), "squad": ("f1", 1.0)}
DROPS = {"dense": 0.0, "again": 0.0, "good-0": 0.04, "good-1": 0.05, "good-2": 0.03,
         "bad-0": 0.2, "bad-1": 0.22, "bad-2": 0.21, "last": 0.1}  # fmt: skip


def answers(label: str, number: int) -> Samples:
    base, own = np.random.default_rng(1), np.random.default_rng(number)
    rows = []
    for task, (metric, scale) in METRICS.items():
        kept = 0.3 + base.beta(3, 3, N) / 2
        moved = own.normal(0, 0.05, N) if label != "dense" else 0.0
        for document, grade in enumerate(np.clip(kept - DROPS[label] + moved, 0, 1)):
            rows.append({
                "task": task, "task_version": "1", "output_type": "generate_until",
                "filter": "none", "doc_id": document, "doc_hash": f"{task}{document}",
                "prompt_hash": "p", "target_hash": "t", "request_hash": f"{task}{document}",
                "prompt": "q", "target": "t", "text": f"{document} is {grade:.1f}",
                "metrics": {metric: scale * float(grade)},
            })  # fmt: skip
    info = RunInfo(
        run=label, engine="by hand", source=label, task_versions=dict.fromkeys(METRICS, "1"),
        metrics={task: [metric] for task, (metric, _) in METRICS.items()},
        higher_is_better={task: {metric: True} for task, (metric, _) in METRICS.items()},
    )  # fmt: skip
    return Samples.from_rows(rows, info)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grades")
    rows = []
    for number, label in enumerate(DROPS):
        answers(label, number).save(folder / f"{label}.parquet")
        group, _, seed = label.partition("-")
        spanned = {"group": group, "axes": {"seed": int(seed)}} if seed else {}
        if label != "again":
            rows.append(RunRow(label=label, eval=f"{label}.parquet", **spanned))
    noise = [NoiseRun(label="batch size 1", eval="again.parquet")]
    given = RunFile(dense="dense", rows=rows, noise=noise)
    write_run_file(folder, given)
    write_report(
        build_leaderboard(given, folder, settings=Settings(draws=200), progress=False), folder
    )
    return folder


@pytest.fixture(scope="module")
def board(run: Path) -> Leaderboard:
    return Leaderboard.model_validate_json((run / "leaderboard.json").read_bytes())


def test_seeds_are_folded_with_the_mean_of_their_grades(board: Leaderboard) -> None:
    good, bad = board.folded
    assert good.label == "good" and good.members == ["good-0", "good-1", "good-2"]
    assert good.accuracy is None and good.difference is None and good.variance.seeds == 3
    changes = [
        [row["metrics"][metric] / scale for _, row in samples.frame.iterrows()
         if metric in row["metrics"]]
        for label in ("dense", *good.members)
        for samples in [answers(label, list(DROPS).index(label))]
        for metric, scale in METRICS.values()
    ]  # fmt: skip
    means = np.mean(changes, axis=1)
    wanted = means[2:].mean() - means[:2].mean()
    assert good.grade_change is not None and good.grade_change.value == pytest.approx(wanted)
    assert bad.grade_change is not None and bad.grade_change.high < good.grade_change.low
    assert (bad.decision, bad.p_value < 0.01) == ("worse", True)
    assert {label: rank.place for label, rank in board.grade_ranks.items()} == {
        "good": 1, "last": 2, "bad": 3
    }  # fmt: skip


def test_every_view_ranks_by_grades(board: Leaderboard) -> None:
    said = headline(board)
    assert "Of 3 compressed models, good does best" in said and "told apart" not in said
    shown = to_html(board).partition('id="leaderboard"')[2].partition("</table>")[0]
    for view in (shown, to_markdown(board), to_table(board), html_table(board)):
        assert "rades" in view and "1 [1, 1]" in view.replace('<span class="ci">', " ").replace(
            "\\", ""
        )
    assert "Perplexity" not in to_html(board) and "erplexity" not in to_markdown(board)
    lines = terminal_table(board).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["dense", "good", "last", "bad"]
    found = ranking(board).set_index("row")
    assert found.loc["good", "grade_change"] == board.folded[0].grade_change.value
    frame = results(board)
    folded = frame[(frame.row == "bad") & (frame.metric == "grade_change")]
    assert folded.decision.tolist() == ["worse"] and folded.runs.tolist() == [3]
    row = next(row for row in board.rows if row.label == "last")
    assert "rouge1" in model_card(board, row) and "Grades change by" in model_card(board, row)


def test_the_noise_of_texts_and_grades_is_in_every_view(board: Leaderboard) -> None:
    text = next(found for found in board.rows[1].generations if found.task == "squad")
    assert board.noise is not None and text.noise_changed is not None
    (floor,) = (found for found in board.noise.texts if found.task == "squad")
    assert text.noise_changed == floor.changed.value > 0
    record = list(csv.DictReader(io.StringIO(to_csv(board))))[1]
    assert float(record["noise_changed:squad/none"]) == floor.changed.value
    assert float(record["changed_above_noise:squad/none"]) == text.changed_above_noise.value
    assert "moved_above_noise:squad/f1" in record and record["grade_change"]
    for view in (to_markdown(board), to_html(board)):
        assert "oise of texts" in view or "oise floor of texts" in view
        assert f"{100 * floor.changed.value:.2f}" in view
    assert "changed above noise" in to_markdown(board)
    assert {"changed_above_noise", "moved_above_noise: f1"} <= set(results(board).metric)


def test_a_gate_compares_every_run(run: Path) -> None:
    result = gate(run, run, thresholds=Thresholds(draws=100), progress=False)
    assert result.passed and {check.quantity for check in result.checks} == {"grade"}
    assert {check.row for check in result.checks} == set(DROPS) - {"again"}


def test_a_grade_that_is_all_or_nothing_in_some_rows_is_a_grade_in_all() -> None:
    """Else the accuracy of these rows would be over a task that the others do not have."""
    samples = {}
    for label, grade in (("dense", 1.0), ("same", 1.0), ("worse", 0.5)):
        made = answers("dense", 0)
        metrics = [
            {"f1": grade} if task == "squad" else {"rouge1": 100 * grade}
            for task in made.frame["task"]
        ]
        judged = np.where(made.frame["task"] == "squad", grade == 1.0, None)
        frame = made.frame.assign(
            metrics=metrics,
            correct=pd.array([each or None for each in judged], dtype="boolean"),
            verdict_metric=["f1" if each else None for each in judged],
        )
        samples[label] = Samples(frame, made.info).relabelled(label)
    run = RunFile(dense="dense", rows=[RunRow(label=label, eval=label) for label in samples])
    settings = Settings(draws=100)
    board = build_leaderboard(run, Path(), samples=samples, settings=settings, progress=False)
    assert all(row.tasks == [] and row.accuracy_macro is None for row in board.rows)
    assert {label: rank.place for label, rank in board.grade_ranks.items()} == {
        "same": 1, "worse": 2
    }  # fmt: skip
    changes = {row.label: row.grade_change and row.grade_change.value for row in board.rows}
    assert changes == {"dense": None, "same": 0.0, "worse": -0.5}


def test_what_has_no_highest_value_ranks_nothing() -> None:
    made = answers("dense", 0)
    frame = made.frame.assign(metrics=[{"f1": 150.0 + n, "rouge1": 200.0} for n in range(2 * N)])
    samples = {label: Samples(frame, made.info).relabelled(label) for label in ("dense", "other")}
    run = RunFile(dense="dense", rows=[RunRow(label=label, eval=label) for label in samples])
    settings = Settings(draws=100)
    board = build_leaderboard(run, Path(), samples=samples, settings=settings, progress=False)
    assert {score.kind for score in board.rows[1].grades if score.decides} == {"ratio"}
    assert board.grade_ranks == {} and "task by task" in headline(board)
    assert "Grades: change" not in terminal_table(board)
