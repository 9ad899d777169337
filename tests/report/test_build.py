"""The leaderboard's numbers, against the comparison and against plain counting."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from streamline_bench.errors import ComparisonError, SamplesError
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.flips import worst_flips
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import NoiseRun, RunFile, RunRow, read_run_file
from streamline_bench.report.scores import Flip
from streamline_bench.report.text import MISSING
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.headline import headline
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.model_card import model_card
from streamline_bench.report.views.page import to_html
from streamline_bench.stability.align import align
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

valid = Leaderboard.model_validate

LABELS = ("dense", "none", "layer")


@pytest.fixture(scope="module")
def run(make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def build(run: Path, **options: Any) -> dict[str, Any]:
    """The board of a run with other fields in its rows (by label) or in the whole."""
    given = read_run_file(run)
    rows = [
        row.model_copy(update=options.pop(row.label, {"checkpoint": None})) for row in given.rows
    ]
    given = given.model_copy(update={"rows": rows, "commands": [], **options})
    settings = Settings(draws=300)
    board = build_leaderboard(given, run, settings=settings, progress=False)
    return board.model_dump(mode="json")


@pytest.fixture(scope="module")
def board(run: Path) -> dict[str, Any]:
    return build(run)


def test_what_is_not_read_is_named(run: Path) -> None:
    def answers(label: str) -> Samples:
        path = next(row.eval for row in read_run_file(run).rows if row.label == label)
        return load_samples(run / str(path), run=label, progress=False)

    dense, none = answers("dense"), answers("none")
    info = none.info.model_copy(update={"left_out": {"results_old.json": "limit is <b>4</b>"}})
    given = {"dense": dense, "none": dataclasses.replace(none, info=info)}
    board = build_leaderboard(
        read_run_file(run), run, samples=given, settings=Settings(draws=100), progress=False
    )
    assert board.not_read == {"none: results_old.json": "limit is <b>4</b>"}
    markdown = to_markdown(board).partition("How the numbers were made")[2]
    assert "Not read:" in markdown and "old.json" in markdown and "<b>" not in markdown
    page = to_html(board).partition("How every number was made")[2]
    assert "Not read: none: results_old.json (limit is &lt;b&gt;4&lt;/b&gt;)" in page
    assert "Not read" not in to_html(board.model_copy(update={"not_read": {}}))


def test_rows_keep_their_order_and_only_the_dense_has_no_comparison(board: dict) -> None:
    assert [row["label"] for row in board["rows"]] == list(LABELS)
    assert [row["macro"] is None for row in board["rows"]] == [True, False, False]
    assert [task["comparison"] is None for task in board["rows"][0]["tasks"]] == [True] * 3


def test_schema_accepts_its_own_output_and_nothing_else(board: dict) -> None:
    assert Leaderboard.model_validate(board).model_dump(mode="json") == board
    with pytest.raises(ValueError, match="schema_version"):
        Leaderboard.model_validate({**board, "schema_version": 6})
    with pytest.raises(ValueError, match="extra"):
        Leaderboard.model_validate({**board, "extra": 1})


def test_accuracies_are_counted(board: dict, run: Path) -> None:
    for row in board["rows"]:
        frame = load_samples(run / row["label"] / "eval", progress=False).frame
        shares = frame.groupby("task")["correct"].mean()
        for task in row["tasks"]:
            assert task["accuracy"]["value"] == pytest.approx(shares[task["task"]])
        assert row["accuracy_macro"]["value"] == pytest.approx(shares.mean())
        assert row["accuracy_micro"]["value"] == pytest.approx(frame["correct"].mean())


def test_flips_are_counted(board: dict, run: Path) -> None:
    def verdicts(label: str) -> dict[tuple[str, int], bool]:
        frame = load_samples(run / label / "eval", progress=False).frame
        keys = zip(frame["task"], frame["doc_id"], strict=True)
        return dict(zip(keys, frame["correct"], strict=True))

    before = verdicts("dense")
    for row in board["rows"][1:]:
        after = verdicts(row["label"])
        lost = sum(before[key] and not after[key] for key in before)
        gained = sum(after[key] and not before[key] for key in before)
        flips = row["micro"]["flips"]
        assert (flips["right_to_wrong"], flips["wrong_to_right"]) == (lost, gained)


def test_worst_flips_are_the_surest_that_were_lost(board: dict, run: Path) -> None:
    flips = board["rows"][1]["worst_flips"]
    drops = [flip["drop"] for flip in flips if flip["drop"] is not None]
    assert drops == sorted(drops, reverse=True) and drops[0] > 0.5
    assert sum(flip["drop"] is None for flip in flips) == 2, "generation keeps its place"
    for flip in flips:
        if flip["choices"]:
            assert flip["dense_choice"] == flip["gold"] != flip["pruned_choice"]
            assert sum(flip["dense_shares"]) == pytest.approx(1, abs=1e-3)
            assert flip["dense_shares"][flip["gold"]] == max(flip["dense_shares"])
        else:
            assert flip["dense_text"] == flip["target"] != flip["pruned_text"]
    frames = [load_samples(run / label / "eval", progress=False).frame for label in LABELS[:2]]
    best = 0.0
    for (_, first), (_, second) in zip(
        frames[0].sort_values(["task", "doc_id"]).iterrows(),
        frames[1].sort_values(["task", "doc_id"]).iterrows(),
        strict=True,
    ):
        if first["choices"] is not None and first["correct"] and not second["correct"]:
            shares = [
                math.exp(row["loglikelihoods"][row["gold"]])
                / sum(math.exp(value) for value in row["loglikelihoods"])
                for row in (first, second)
            ]
            best = max(best, shares[0] - shares[1])
    assert drops[0] == pytest.approx(best, abs=1e-3)


def test_headline_names_the_best_row(board: dict) -> None:
    text = headline(valid(board))
    best = max(board["rows"][1:], key=lambda row: row["accuracy_macro"]["value"])
    assert best["label"] == "layer"
    assert "2 compressed models" in text
    assert "layer keeps most" not in text, "of other cost, or of unknown size"
    alone = {**board, "rows": board["rows"][:1]}
    assert headline(valid(alone)).startswith("dense answers")


@pytest.mark.parametrize(
    ("corrected", "error", "ranks"),
    [(0.099, 0.0, False), (0.1, 0.0, True), (0.0, 0.01, False), (0.14, 0.02, True),
     (0.14, 0.021, False)],
)  # fmt: skip
def test_headline_names_no_winner_where_dense_may_guess(
    board: dict, corrected: float, error: float, ranks: bool
) -> None:
    copied = json.loads(json.dumps(board))
    for row in copied["rows"][1:]:
        row["macro"]["dense_corrected"].update(value=corrected, standard_error=error)
    copied["guessing"] = []
    text = headline(valid(copied))
    assert ("2 compressed models" in text and "none is named first" in text) is ranks
    if not ranks:
        assert "guessing" in text
        assert f"{100 * corrected:.1f} % of the way" in text


def test_csv_has_unrounded_numbers(board: dict) -> None:
    records = list(csv.DictReader(to_csv(valid(board)).splitlines()))
    assert [record["label"] for record in records] == list(LABELS)
    assert float(records[2]["accuracy_macro"]) == board["rows"][2]["accuracy_macro"]["value"]
    stability = board["rows"][2]["macro"]["stability"]["value"]
    assert float(records[2]["stability_macro"]) == stability
    assert records[0]["stability_macro"] == ""
    assert records[0].keys() == records[2].keys()


def test_markdown_tables_are_rectangular(board: dict) -> None:
    text = to_markdown(valid({**board, "commands": ["lm_eval\n```\n# not a heading"]}))
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert len(widths) == 1
    assert "\n    lm_eval ``` # not a heading\n" in text


def test_published_numbers_keep_digits_and_unit_beside_ours(run: Path) -> None:
    common = {"model": "Llama-2-7B", "source": "a paper"}
    recipe = {"published": [
        {**common, "metric": "Colours", "value": 61.07, "sparsity": 0.24},
        {**common, "metric": "Perplexity of books", "value": 12.862},
        {**common, "metric": "size", "value": 5.4, "unit": "billion parameters"},
        {**common, "metric": "stability", "value": 73.2},
    ]}  # fmt: skip
    board = build(run, layer={"recipe": recipe, "checkpoint": None})
    row = board["rows"][2]
    ours = row["tasks"][0]["accuracy"]
    stability = row["macro"]["stability"]
    assert [one["ours"] for one in row["published"]] == [ours, None, None, stability]
    text = to_markdown(valid(board))
    shown = f"{100 * ours['value']:.1f} ± {100 * ours['standard_error']:.1f}"
    assert f"| Colours | 61.07 % | {shown} (colours) | 24.0 |" in text
    assert f"| Perplexity of books | 12.862 perplexity | {MISSING} |" in text
    assert f"| size | 5.4 billion parameters | {MISSING} |" in text
    assert f"| stability | 73.2 % | {100 * stability['value']:.1f} (all tasks) |" in text
    page = to_html(valid(board))
    assert "12.862<small>perplexity</small>" in page and "5.4<small>billion parameters" in page
    assert f"{shown}<small>colours</small>" in page
    assert '<th scope="col" class="num">Published</th>' in page, "no unit for all in the heading"


def test_the_dense_row_must_exist(run: Path) -> None:
    failed = {"failed": "Out of memory.", "eval": None}
    with pytest.raises(SamplesError, match=r"'dense'.*Out of memory"):
        build(run, dense=failed)


def test_runs_with_other_tasks_are_refused(run: Path, lm_eval_outputs: Path) -> None:
    other = load_samples(lm_eval_outputs / "dense", run="none", progress=False)
    with pytest.raises(ComparisonError, match="share no task"):
        build_leaderboard(read_run_file(run), run, samples={"none": other}, progress=False)


def test_tasks_without_verdicts_show_their_metrics(lm_eval_outputs: Path) -> None:
    rows = [RunRow(label=label, eval=label) for label in ("dense", "pruned")]
    board = build_leaderboard(
        RunFile(dense="dense", rows=rows), lm_eval_outputs, settings=Settings(draws=100),
        progress=False,
    )  # fmt: skip
    board = board.model_dump(mode="json")
    assert board["not_compared"] == {"toy_roll": "no right or wrong answers by 'correct'"}
    for row in board["rows"]:
        assert set(row["other_metrics"]["toy_roll"]) == {"word_perplexity"}
        assert row["other_metrics"]["toy_roll"]["word_perplexity"] > 1


def test_calibration_tokens_are_shown_in_every_view(run: Path) -> None:
    board = build(run, none={}, layer={})
    row = board["rows"][2]
    assert row["provenance"]["calibration"]["tokens"] == 65536
    digest = row["provenance"]["calibration"]["sha256"]
    lines = [line for line in to_markdown(valid(board)).splitlines() if "| abab" in line]
    assert len(lines) == 2
    assert all("| calibration 65,536 |" in line for line in lines)
    assert f"<dd>65,536 of calibration, <code>{digest}</code></dd>" in to_html(valid(board))
    assert "- Calibration tokens: 65536\n" in model_card(valid(board), valid(board).rows[2])


def test_a_document_is_listed_once_whatever_filters_the_task_has(run: Path) -> None:
    """As gsm8k's strict and flexible answers; the first filter counts, as in the summaries."""

    def twice(samples: Samples) -> Samples:
        frame = samples.frame
        first = frame.assign(filter="strict")
        # Sorted by name, this one would come first.
        second = frame.assign(filter="flexible")
        return dataclasses.replace(samples, frame=pd.concat([first, second], ignore_index=True))

    def flips(change: Callable[[Samples], Samples]) -> list[Flip]:
        runs = [change(load_samples(run / label / "eval", progress=False)) for label in LABELS[:2]]
        return worst_flips(align(*runs), "correct")

    once = flips(lambda samples: samples)
    assert len(once) == 8
    assert flips(twice) == once


def test_every_run_is_read_and_aligned_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense with itself, then each row with dense: comparison, flips and noise share the pairs."""
    aligned: list[str] = []
    read: list[str] = []

    def counted(dense: Samples, pruned: Samples, **options: Any) -> Any:
        aligned.append(pruned.info.run)
        return align(dense, pruned, **options)

    def loaded(path: Path, **options: Any) -> Samples:
        read.append(str(options["run"]))
        return load_samples(path, **options)

    for module in ("report.build", "stability.compare_answers"):
        monkeypatch.setattr(f"streamline_bench.{module}.align", counted)
    monkeypatch.setattr("streamline_bench.report.reading.load_samples", loaded)
    build(run, noise=[NoiseRun(label="again", eval="none/eval")])
    assert sorted(aligned) == sorted([*LABELS, "again"])
    assert sorted(read) == sorted([*LABELS, "again"])


def test_values_other_than_the_recipes_own_are_named(run: Path) -> None:
    recipe = {"overridden": {"calibration.samples": [5, 32]}}
    board = valid(build(run, layer={"recipe": recipe, "checkpoint": None}))
    assert board.rows[2].overridden == {"calibration.samples": (5, 32)}
    line = next(line for line in to_markdown(board).splitlines() if "calibration.samples" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "layer", "calibration.samples", "32", "5"
    ]  # fmt: skip
    assert "<code>calibration.samples</code> 32 (recipe: 5)" in to_html(board)
