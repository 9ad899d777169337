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
from streamline_bench.report.board.flips import worst_flips
from streamline_bench.report.board.leaderboard import RowSource, build_leaderboard
from streamline_bench.report.data.schema import Flip, Leaderboard
from streamline_bench.report.text.formats import MISSING
from streamline_bench.report.views.card_text import card_text
from streamline_bench.report.views.csv_view import to_csv
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.summary import headline
from streamline_bench.stability.align import align
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

LABELS = ("dense", "none", "layer")


@pytest.fixture(scope="module")
def run(make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def build(run: Path, **options: Any) -> dict[str, Any]:
    runs = {label: run / label / "eval" for label in LABELS}
    settings = Settings(draws=300)
    return build_leaderboard(runs, "dense", settings=settings, progress=False, **options)


@pytest.fixture(scope="module")
def board(run: Path) -> dict[str, Any]:
    return build(run)


def test_rows_keep_their_order_and_only_the_dense_has_no_comparison(board: dict) -> None:
    assert [row["label"] for row in board["rows"]] == list(LABELS)
    assert [row["macro"] is None for row in board["rows"]] == [True, False, False]
    assert [task["comparison"] is None for task in board["rows"][0]["tasks"]] == [True] * 3


def test_schema_accepts_its_own_output_and_nothing_else(board: dict) -> None:
    assert Leaderboard.model_validate(board).model_dump(mode="json") == board
    with pytest.raises(ValueError, match="schema_version"):
        Leaderboard.model_validate({**board, "schema_version": 4})
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
    text = headline(board)
    best = max(board["rows"][1:], key=lambda row: row["accuracy_macro"]["value"])
    assert best["label"] == "layer"
    assert text.startswith("Of 2 compressed models, layer keeps most")
    alone = {**board, "rows": board["rows"][:1]}
    assert headline(alone).startswith("dense answers")


@pytest.mark.parametrize(("corrected", "ranks"), [(0.099, False), (0.1, True), (0.0, False)])
def test_headline_names_no_winner_where_dense_guesses(
    board: dict, corrected: float, ranks: bool
) -> None:
    copied = json.loads(json.dumps(board))
    for row in copied["rows"][1:]:
        row["macro"]["dense_corrected"]["value"] = corrected
    text = headline(copied)
    assert ("layer keeps most" in text) is ranks
    if not ranks:
        assert text.startswith("dense is close to guessing on these tasks: ")
        assert f"{100 * corrected:.1f} % of the way" in text


def test_csv_has_unrounded_numbers(board: dict) -> None:
    records = list(csv.DictReader(to_csv(board).splitlines()))
    assert [record["label"] for record in records] == list(LABELS)
    assert float(records[2]["accuracy_macro"]) == board["rows"][2]["accuracy_macro"]["value"]
    stability = board["rows"][2]["macro"]["stability"]["value"]
    assert float(records[2]["stability_macro"]) == stability
    assert records[0]["stability_macro"] == ""
    assert records[0].keys() == records[2].keys()


def test_markdown_tables_are_rectangular(board: dict) -> None:
    text = to_markdown({**board, "commands": ["lm_eval\n```\n# not a heading"]})
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
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
    sources = {"layer": RowSource(recipe=recipe)}
    board = build(run, sources=sources)
    row = board["rows"][2]
    ours = row["tasks"][0]["accuracy"]
    stability = row["macro"]["stability"]
    assert [one["ours"] for one in row["published"]] == [ours, None, None, stability]
    text = to_markdown(board)
    shown = f"{100 * ours['value']:.1f} ± {100 * ours['standard_error']:.1f}"
    assert f"| Colours | 61.07 % | {shown} (colours) | 24.0 |" in text
    assert f"| Perplexity of books | 12.862 perplexity | {MISSING} |" in text
    assert f"| size | 5.4 billion parameters | {MISSING} |" in text
    assert f"| stability | 73.2 % | {100 * stability['value']:.1f} (all tasks) |" in text
    page = to_html(board)
    assert "12.862<small>perplexity</small>" in page and "5.4<small>billion parameters" in page
    assert f"{shown}<small>colours</small>" in page
    assert '<th scope="col" class="num">Published</th>' in page, "no unit for all in the heading"


def test_the_dense_row_must_exist(run: Path) -> None:
    with pytest.raises(SamplesError, match="'base' is not among the runs: a"):
        build_leaderboard({"a": run / "dense" / "eval"}, "base", progress=False)


def test_runs_with_other_tasks_are_refused(run: Path, lm_eval_outputs: Path) -> None:
    runs = {"dense": run / "dense" / "eval", "other": lm_eval_outputs / "dense"}
    with pytest.raises(ComparisonError, match="share no task"):
        build_leaderboard(runs, "dense", progress=False, settings=Settings(draws=100))


def test_tasks_without_verdicts_show_their_metrics(lm_eval_outputs: Path) -> None:
    runs = {label: lm_eval_outputs / label for label in ("dense", "pruned")}
    board = build_leaderboard(runs, "dense", settings=Settings(draws=100), progress=False)
    assert board["not_compared"] == {"toy_roll": "no right or wrong answers by 'correct'"}
    for row in board["rows"]:
        assert set(row["other_metrics"]["toy_roll"]) == {"word_perplexity"}
        assert row["other_metrics"]["toy_roll"]["word_perplexity"] > 1


def test_calibration_tokens_are_shown_in_every_view(run: Path) -> None:
    sources = {label: RowSource(checkpoint=run / label / "checkpoint") for label in LABELS[1:]}
    board = build(run, sources=sources)
    row = board["rows"][2]
    assert row["provenance"]["calibration"]["tokens"] == 65536
    digest = row["provenance"]["calibration"]["sha256"]
    lines = [line for line in to_markdown(board).splitlines() if "| abab" in line]
    assert len(lines) == 2
    assert all("| 65536 |" in line for line in lines)
    assert f"<dd>65,536 of calibration, <code>{digest}</code></dd>" in to_html(board)
    assert "- Calibration tokens: 65536\n" in card_text(board, row)


def test_a_document_is_listed_once_whatever_filters_the_task_has(run: Path) -> None:
    """As gsm8k's strict and flexible answers; the first filter counts, as in the summaries."""

    def twice(samples: Samples) -> Samples:
        frame = samples.frame
        first = frame.assign(filter="strict")
        # Sorted by name, this one would come first.
        second = frame.assign(filter="flexible")
        return dataclasses.replace(samples, frame=pd.concat([first, second], ignore_index=True))

    def flips(change: Callable[[Samples], Samples], filters: dict[str, str]) -> list[Flip]:
        runs = [change(load_samples(run / label / "eval", progress=False)) for label in LABELS[:2]]
        return worst_flips(align(*runs), "correct", filters)

    tasks = ("colours", "places", "stories")
    once = flips(lambda samples: samples, dict.fromkeys(tasks, "none"))
    assert len(once) == 8
    assert flips(twice, dict.fromkeys(tasks, "strict")) == once
