"""Tasks of kinds that nothing in this package names, from YAML to report, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_jobs import InProcess

from streamline_bench.core.machine.environment import resource
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.frame import results
from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.run_file import read_run_file
from streamline_bench.report.solved import with_solved
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.terminal import terminal_table
from streamline_bench.runs.planning.request import make_request
from streamline_bench.runs.run import compare_request
from streamline_bench.throughput.speed import Speed

LIMIT = 16
FREE = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
num_fewshot: 0
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 14, do_sample: false}
"""
F1 = (
    FREE
    + """
process_results: !function held_out.f1
metric_list:
  - {metric: token_f1, aggregation: mean, higher_is_better: true}
"""
)
OWN = (
    FREE
    + """
process_results: !function held_out.begins
metric_list:
  - {metric: words, aggregation: mean, higher_is_better: false}
  - {metric: begins_right, aggregation: mean, higher_is_better: true}
"""
)
FILTERS = (
    FREE
    + """
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: colour, filter: [{function: regex, regex_pattern: "a ([a-z]+)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, same_questions_as: held_out_choice}
"""
)
CHOICE = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""
CODE = """
def f1(doc, results):
    said, right = results[0].split(), doc["answer"].split()
    shared = sum(min(said.count(word), right.count(word)) for word in set(said))
    return {"token_f1": 2 * shared / (len(said) + len(right)) if shared else 0.0}


def begins(doc, results):
    said = results[0].split()
    right = said[:2] == doc["answer"].split()[:2]
    return {"words": len(said), "begins_right": right}
"""


def write_tasks(folder: Path) -> None:
    source = resource("tasks") / "lm_eval" / "bundled" / "data" / "recall.jsonl"
    lines = [json.loads(line) for line in source.read_text("utf-8").splitlines()[:40]]
    answers = list(dict.fromkeys(line["answer"] for line in lines))
    for number, line in enumerate(lines):
        others = [answer for answer in answers if answer != line["answer"]]
        line["choices"] = [*others[number % 20 :][:2], line["answer"]]
        line["gold"] = 2
    text = "".join(json.dumps(line) + "\n" for line in lines)
    folder.mkdir()
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    (folder / "held_out.py").write_text(CODE, encoding="utf-8")
    kinds = {"f1": F1, "own": OWN, "filters": FILTERS, "choice": CHOICE}
    for name, task in kinds.items():
        full = task.replace("NAME", f"held_out_{name}").replace("FOLDER", str(folder))
        (folder / f"held_out_{name}.yaml").write_text(full, encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_tasks(folder / "tasks")
    names = [f"held_out_{name}" for name in ("f1", "own", "filters", "choice")]
    request = make_request(
        {"model": "bundled", "recipes": ["dense", "last_layers", "first_layers"], "tasks": names,
         "include_path": str(folder / "tasks"), "limit": LIMIT, "set": {"n_layers": 3},
         "metrics": {"held_out_own": "begins_right"}, "device": "cpu", "noise_floor": True,
         "batch_size": "16"}
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamline_bench.runs.run.LocalExecutor", InProcess)
        patch.setenv("STREAMLINE_BENCH_CACHE", str(folder / "cache"))
        result = compare_request(request, folder / "run", progress=False)
    assert (result.exit_code, dict(result.failures)) == (0, {})
    return folder / "run"


@pytest.fixture(scope="module")
def board(run: Path) -> Leaderboard:
    return read_leaderboard(run / "leaderboard.json")


def logged(run: Path, row: str, task: str) -> list[dict[str, object]]:
    file = next((run / row).rglob(f"samples_{task}_*.jsonl"))
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_every_kind_has_its_place(run: Path, board: Leaderboard) -> None:
    pruned = next(row for row in board.rows if row.label == "last_layers")
    judged = {(task.task, task.filter): task.verdict for task in pruned.tasks}
    assert judged == {
        ("held_out_own", "none"): "begins_right",
        ("held_out_filters", "whole"): "exact_match",
        ("held_out_filters", "colour"): "exact_match",
        ("held_out_choice", "none"): "acc",
    }
    graded = {(score.task, score.metric): score for score in pruned.grades}
    assert graded["held_out_f1", "token_f1"].decides
    own = graded["held_out_own", "words"]
    assert (own.decides, own.kind, own.higher_is_better) == (False, "ratio", False)
    values = [
        np.array([line["token_f1"] for line in logged(run, row, "held_out_f1")], dtype=float)
        for row in ("dense", "last_layers")
    ]
    found = graded["held_out_f1", "token_f1"].comparison
    assert found is not None and found.difference is not None and found.n == LIMIT
    assert found.difference.value == pytest.approx((values[1] - values[0]).mean())
    assert found.noise_moved is not None and found.moved_above_noise is not None
    assert set(board.grade_ranks) == {"last_layers", "first_layers"} == set(board.ranks)
    best = max(
        ("last_layers", "first_layers"),
        key=lambda row: np.mean([line["token_f1"] for line in logged(run, row, "held_out_f1")]),
    )
    assert board.grade_ranks[best].place == 1


@pytest.mark.slow
def test_tokens_and_both_forms_of_a_question(run: Path, board: Leaderboard) -> None:
    pruned = next(row for row in board.rows if row.label == "last_layers")
    texts = {(each.task, each.filter): each for each in pruned.generations}
    for found in texts.values():
        assert found.tokens and found.unfinished and found.thinking is None
        assert 0 < (found.tokens.pruned or 0) <= 14
    (pair,) = pruned.formats
    assert (pair.free, pair.choice, pair.n) == ("held_out_filters", "held_out_choice", LIMIT)
    sides = {}
    for row in ("dense", "last_layers"):
        free = [bool(line["exact_match"]) for line in logged(run, row, "held_out_filters")
                if line["filter"] == "whole"]  # fmt: skip
        choice = [bool(line["acc"]) for line in logged(run, row, "held_out_choice")]
        sides[row] = list(zip(choice, free, strict=True))
    assert pair.dense.both == sides["dense"].count((True, True))
    assert pair.pruned.choice_only == sides["last_layers"].count((True, False))
    text = (run / "leaderboard.md").read_text("utf-8")
    page = (run / "leaderboard.html").read_text("utf-8")
    for part in (
        "held\\_out\\_choice",
        "unfinished",
        "token\\_f1",
        "Ranks by the mean",
        "Noise floor of",
    ):
        assert part in text
    for part in ("choices and freely", "Unfinished", "Noise of grades", "Ranks by the mean"):
        assert part in page


@pytest.mark.slow
def test_seconds_per_solved_question_stand_in_every_view(board: Leaderboard) -> None:
    rows = [
        row.model_copy(
            update={
                "throughput": Speed(
                    status="ok", engine="hf", device="cpu", dtype="float32", batch_size=8,
                    output_tokens_per_second=rate, ratio=rate / 100,
                )
            }
        )
        for row, rate in zip(board.rows, (100, 130, 130), strict=True)
    ]  # fmt: skip
    rows = [with_solved(row, rows, board.dense) for row in rows]
    measured = board.model_copy(update={"rows": rows})
    pruned = next(row for row in rows if row.label == "last_layers")
    assert {(cost.task, cost.filter) for cost in pruned.solved} == {
        ("held_out_own", "none"), ("held_out_filters", "whole"), ("held_out_filters", "colour"),
    }  # fmt: skip
    for cost in pruned.solved:
        assert cost.dense == (cost.tokens.dense and cost.tokens.dense / 100)
    assert "Seconds per solved question" in to_markdown(measured)
    assert "Seconds per solved question" in to_html(measured)
    assert "seconds_per_solved:held_out_own/none" in to_csv(measured).splitlines()[0]
    assert {"ratio: tokens", "free_minus_choice", "grade_rank"} <= set(results(measured)["metric"])


@pytest.mark.slow
def test_a_board_of_grades_alone_has_every_view(run: Path) -> None:
    file = read_run_file(run)
    only = file.model_copy(
        update={"tasks": ["held_out_f1"], "metrics": {},
                "tasks_left_out": ["held_out_own", "held_out_filters", "held_out_choice"]}
    )  # fmt: skip
    board = build_leaderboard(only, run, progress=False)
    assert board.ranks == {} and set(board.shown_ranks) == {"last_layers", "first_layers"}
    assert board.noise is not None and board.noise.flips is None and board.noise.grades
    for render in (to_markdown, to_html, to_csv, terminal_table):
        assert "last" in render(board)
    assert "Noise floor of grades" in to_markdown(board)
