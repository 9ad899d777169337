"""A board with a row of one answer, and one that knows something: what guessing gets is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.frame import ranking
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import RunFile, RunRow
from streamline_bench.report.views.headline import headline
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.stability.samples import RunInfo, Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.statistics.score import PairedDifference, holm

SIZES = {"yes_no": 99, "facts": 80}
ASKED = np.random.default_rng(0)
GOLD = {"yes_no": np.arange(99) < 81, "facts": ASKED.integers(4, size=80)}  # 81 times "yes"


def choices(task: str, document: int) -> list[str]:
    return ["no", "yes"] if task == "yes_no" else [f"fact {document}.{n}" for n in range(4)]


def chosen(label: str, task: str) -> np.ndarray:
    """``always`` says yes and guesses the facts; ``reader`` knows half of what dense knows."""
    own = np.random.default_rng(sum(map(ord, label)))
    size = SIZES[task]
    if task == "yes_no":
        habits = {"always": 1.0, "dense": 0.6, "reader": 0.1, "random": 0.02}
        return own.random(size) < habits[label]
    known = {"always": 0.0, "dense": 0.9, "reader": 0.45, "random": 0.1}[label]
    return np.where(own.random(size) < known, GOLD[task], own.integers(4, size=size))


def answers(label: str) -> Samples:
    rows = []
    for task in SIZES:
        for document, choice in enumerate(map(int, chosen(label, task))):
            listed, gold = choices(task, document), int(GOLD[task][document])
            scores = [-1.0 if n == choice else -2.0 - n for n in range(len(listed))]
            rows.append({
                "task": task, "output_type": "multiple_choice", "filter": "none",
                "doc_id": document, "doc_hash": f"{task}{document}", "prompt_hash": "p",
                "target_hash": "t", "request_hash": f"{task}{document}", "prompt": "q",
                "target": str(gold), "choices": listed, "gold": gold, "prediction": choice,
                "prediction_norm": choice, "loglikelihoods": scores,
                "lengths": [len(text) for text in listed],
                "byte_lengths": [len(text) for text in listed], "task_version": "1",
                "correct": choice == gold, "verdict_metric": "acc",
                "metrics": {"acc": float(choice == gold)},
            })  # fmt: skip
    info = RunInfo(run=label, engine="by hand", source=label,
                   task_versions=dict.fromkeys(SIZES, "1"),
                   metrics={task: ["acc"] for task in SIZES},
                   higher_is_better={task: {"acc": True} for task in SIZES})  # fmt: skip
    return Samples.from_rows(rows, info)


LABELS = ("dense", "always", "reader", "random")


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    rows = [
        RunRow(label=label, eval=label, recipe={"method": f"{label}_layers", "sparsity": 0.25})
        for label in LABELS
    ]
    return build_leaderboard(
        RunFile(dense="dense", rows=rows),
        Path(),
        samples={label: answers(label) for label in LABELS},
        settings=Settings(draws=100),
        progress=False,
    )


def right(label: str, task: str) -> list[bool]:
    return [bool(one) for one in chosen(label, task) == GOLD[task]]


def test_every_task_says_what_guessing_gets(board: Leaderboard) -> None:
    levels = {level.task: level for level in board.guessing}
    yes_no, facts = levels["yes_no"], levels["facts"]
    assert (yes_no.chance, yes_no.constant, yes_no.answer) == (0.5, 81 / 99, "yes")
    assert (facts.chance, facts.constant) == (0.25, None), "no answer is offered twice"
    assert (yes_no.beaten, facts.beaten) == (False, True)
    assert yes_no.dense.value == sum(right("dense", "yes_no")) / 99
    assert yes_no.above_constant is not None and yes_no.above_constant.high < 0


def test_a_row_of_one_answer_is_marked_and_scores_the_majority_class(board: Leaderboard) -> None:
    rows = {row.label: {task.task: task for task in row.tasks} for row in board.rows}
    found = rows["always"]["yes_no"]
    assert found.given is not None and (found.given.answer, found.given.share) == ("yes", 1.0)
    assert found.accuracy.value == board.guessing[-1].level == 81 / 99
    assert rows["always"]["facts"].given is not None
    assert rows["always"]["facts"].given.share == 1 / 80
    assert found.comparison is not None and found.comparison.answer_kappa == pytest.approx(0.0)
    text, page = to_markdown(board), to_html(board)
    table = text.split("Accuracy by task")[1].splitlines()
    line = next(line for line in table if line.startswith("| always"))
    assert "“yes” to 100.0 %" in line and "“yes” to 100.0 %" in page
    assert "“" not in next(line for line in table if line.startswith("| dense"))
    assert f"{100 * 81 / 99:.1f}" in text and "Majority class" in page


def test_a_lead_that_rests_on_guessing_is_named(board: Leaderboard) -> None:
    macro = {row.label: row.accuracy_macro.value for row in board.rows if row.accuracy_macro}
    assert macro["always"] > macro["reader"], "by the mean over tasks"
    said = headline(board)
    assert "always is 2 of 3 there, reader first" in said or "always is 3 of 3 there" in said
    assert "does not beat it on 1 of 2 tasks (yes_no)" in said
    table = ranking(board).set_index("row")
    assert table.loc["reader", "accuracy_known_tasks"] == pytest.approx(
        np.mean(right("reader", "facts"))
    )
    assert table.loc["always", "accuracy_known_tasks"] == pytest.approx(
        np.mean(right("always", "facts"))
    )
    kept = table.loc["reader", "retention_above_chance"]
    ways = {
        label: np.mean([
            (np.mean(right(label, task)) - chance) / (1 - chance)
            for task, chance in (("yes_no", 0.5), ("facts", 0.25))
        ])
        for label in ("reader", "dense")
    }  # fmt: skip
    assert kept == pytest.approx(ways["reader"] / ways["dense"])


def test_rows_are_tested_against_random_layers(board: Leaderboard) -> None:
    tests = {test.first: test for test in board.against_random}
    assert set(tests) == {"always", "reader"} and {t.second for t in tests.values()} == {"random"}
    wanted = {}
    for label in tests:
        samples = []
        for task in sorted(SIZES):
            counts = [0, 0, 0, 0]
            for one, two in zip(right("random", task), right(label, task), strict=True):
                counts[2 * (not one) + (not two)] += 1
            samples.append(PairedSample(Outcomes(*counts)))
        wanted[label] = PairedDifference(tuple(samples)).p_value()
    adjusted = dict(zip(wanted, holm(list(wanted.values()), 0.05), strict=True))
    for label, test in tests.items():
        assert test.p_value == pytest.approx(wanted[label])
        assert test.p_holm == pytest.approx(adjusted[label].p)
    table = ranking(board).set_index("row")
    assert table.loc["always", "beats_random"].startswith("yes")
    assert "of 2 are told to be better than random layers" in headline(board)


def test_a_board_of_an_older_release_says_nothing_of_guessing(board: Leaderboard) -> None:
    payload = board.model_dump(mode="json") | {"guessing": [], "against_random": []}
    for row in payload["rows"]:
        for task in row["tasks"]:
            task["given"] = None
    old = Leaderboard.model_validate(payload)
    assert "uessing gets" not in headline(old) and "Majority class" not in to_html(old)
    assert "majority class" not in to_markdown(old)
