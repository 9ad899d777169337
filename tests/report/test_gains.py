"""What patches add: rows of one selection against the one without a patch."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import numpy as np
import pytest

from streamline_bench.compression.recipes import load_recipe
from streamline_bench.report.frame import results
from streamline_bench.report.gains import gains
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row, SameWeights
from streamline_bench.report.standing import TaskAnswers, standing
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.exports import write_exports
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.pivot import pivots, table
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.statistics.score import PairedDifference
from streamline_bench.stability.texts import MeasuredDivergence

SETTINGS = Settings(draws=50)
N = 300


def _right(skill: float, seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 0.1, N) + np.linspace(0, 1, N) < skill


ROWS = {
    "block": ("cosine block", "none", "none", [4, 5], 0.4),
    "block_linear": ("cosine block", "linear", "none", [4, 5], 0.6),
    "block_layer": ("cosine block", "layer, mse", "none", [4, 5, 6], 0.7),
    "block_elsewhere": ("cosine block", "ridge", "none", [3, 4], 0.7),
    "block_lora": ("cosine block", "linear", "lora", [4, 5], 0.8),
    "sleb": ("sleb", "none", "none", [2, 5], 0.5),
    "sleb_linear": ("sleb", "linear", "none", [2, 5], 0.45),
    "alone": ("shortgpt", "linear", "none", [1, 2], 0.5),
}


TOKENS = np.random.default_rng(7).integers(20, 60, 12)


def _by_document(kl: float) -> Any:
    """Tokens and KL of twelve documents, whose mean per token is about ``kl``."""
    noise = np.random.default_rng(round(1000 * kl)).normal(0, 0.05, len(TOKENS))
    hard = np.linspace(0.5, 1.5, len(TOKENS))
    sums = TOKENS * (kl * hard + noise)
    return tuple(zip(TOKENS.tolist(), sums.tolist(), strict=True))


def _row(label: str, parts: Any = None, removed: Any = (), kl: float | None = None) -> Row:
    divergence = {"documents": 1, "windows": 1, "tokens": 9, "window": 9, "kl": {"value": kl},
                  "same_top": {"value": 1}, "dense_perplexity": 1, "pruned_perplexity": 1,
                  "nats_per_token": {"value": 0}}  # fmt: skip
    measured = kl is not None and MeasuredDivergence(**divergence, by_document=_by_document(kl))
    names = ("selection", "patch", "healing")
    return Row.model_validate(
        {"label": label, "is_dense": label == "dense", "parameters": 100,
         "accuracy_macro": {"value": 0.5}, "accuracy_micro": None, "macro": None, "micro": None,
         "tasks": [], "parts": parts and dict(zip(names, parts, strict=True)),
         "divergence": measured or None,
         "provenance": {"results_file": None, "model": None, "engine": None,
                        "recipe": {"sparsity": 0.25}, "chosen": {"removed_layers": list(removed)}}}
    )  # fmt: skip


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    rows = [_row("dense")]
    answers = {}
    for seed, (label, (*parts, removed, skill)) in enumerate(ROWS.items()):
        rows.append(_row(label, parts, removed, kl=1 - skill))
        documents = tuple(map(str, range(N)))
        answers[label] = {
            "a": TaskAnswers(documents, _right(skill, seed), np.ones(N, bool), None, None)
        }
    stood = standing(rows, answers, SETTINGS)
    found = gains(rows, stood.entries, stood.folded, SETTINGS)
    return Leaderboard.model_validate(
        {
            "title": "t",
            "dense": "dense",
            "method": SETTINGS.used(),
            "rows": rows,
            "gains": found,
            "versions": {"streamline-bench": "0"},
        }
    )


def test_rows_of_one_selection_and_healing_meet_the_one_without_a_patch(board: Leaderboard) -> None:
    """Not where other layers went, as by another text; a patch may take room of its own."""
    assert [(gain.entry, gain.without, gain.size) for gain in board.gains] == [
        ("block_layer", "block", "25 %"),
        ("block_linear", "block", "25 %"),
        ("sleb_linear", "sleb", "25 %"),
    ]


def test_the_row_without_a_patch_may_be_shown_under_another_name() -> None:
    twin = {"label": "block", "recipe": load_recipe("streamline_none").model_dump(mode="json")}
    shown = _row("angular", ("angular distance", "none", "none"), [4, 5], kl=0.6)
    shown = shown.model_copy(update={"same_weights": [SameWeights.model_validate(twin)]})
    layer = _row("block_layer", ("cosine block", "layer, mse", "none"), [4, 5], kl=0.3)
    (gain,) = gains([_row("dense"), shown, layer], [], [], SETTINGS)
    assert (gain.entry, gain.without) == ("block_layer", "angular")
    assert gain.token_kl_without.value == 0.6


def test_a_gain_is_counted_pair_by_pair(board: Leaderboard) -> None:
    for gain in board.gains:
        skills = {label: (_right(ROWS[label][4], seed)) for seed, label in enumerate(ROWS)}
        counts = [0, 0, 0, 0]
        for one, two in zip(skills[gain.without], skills[gain.entry], strict=True):
            counts[2 * (not one) + (not two)] += 1
        wanted = PairedDifference((PairedSample(Outcomes(*counts)),))
        assert gain.test.difference.value == pytest.approx(wanted.value)
        assert gain.test.p_value == pytest.approx(wanted.p_value())
        assert gain.test.difference.low < wanted.value < gain.test.difference.high
        assert gain.token_kl.value == pytest.approx(1 - ROWS[gain.entry][4])
        assert gain.token_kl_without.value == pytest.approx(1 - ROWS[gain.without][4])


def test_the_change_of_kl_is_paired_by_document(board: Leaderboard) -> None:
    """Beside resamples of the documents: narrower than that of two texts drawn apart."""
    gain = next(gain for gain in board.gains if gain.entry == "block_layer")
    (tokens, one), (_, two) = (
        np.array(_by_document(1 - ROWS[name][4])).T for name in (gain.entry, gain.without)
    )
    change = gain.token_kl_change
    assert change.value == pytest.approx((one.sum() - two.sum()) / tokens.sum())
    drawn = np.random.default_rng(0).integers(0, len(tokens), (4000, len(tokens)))
    draws = (one - two)[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    width = high - low
    assert change.low == pytest.approx(low, abs=0.2 * width)
    assert change.high == pytest.approx(high, abs=0.2 * width)
    apart = np.hypot(one[drawn].sum(axis=1).std(), two[drawn].sum(axis=1).std())
    assert change.standard_error * tokens.sum() < 0.9 * apart


def test_texts_read_otherwise_are_not_paired(board: Leaderboard) -> None:
    rows = [
        row.model_copy(update={"divergence": row.divergence.model_copy(update=changes)})
        for row, changes in zip(
            [row for row in board.rows if row.label in ("block", "block_linear", "block_layer")],
            ({}, {"by_document": _by_document(0.4)[:-1]}, {"by_document": ()}),
            strict=True,
        )
    ]
    found = gains(rows, (), (), SETTINGS)
    assert [(gain.entry, gain.token_kl_change) for gain in found] == [
        ("block_layer", None),
        ("block_linear", None),
    ]
    assert all(gain.token_kl for gain in found)


def test_the_table_is_in_every_view(board: Leaderboard, tmp_path: Any) -> None:
    (pivot,) = pivots(board)
    head, lines = table(pivot)
    assert head == ["selection", "size", "layer, mse", "linear"]
    assert [line[0] for line in lines] == ["cosine block", "sleb"]
    cell = lines[0][3]
    number = r"\W0\.\d+"
    kl = rf", KL 0\.600 to 0\.400 \({number} \[{number}, {number}\]\)$"
    assert cell.startswith("+") and re.search(kl, cell), cell
    write_exports(board, tmp_path)
    for made in (to_markdown(board), to_html(board), (tmp_path / "axes.md").read_text()):
        assert cell in made.replace("\\", "")
    assert "KL 0.600 to 0.400" in (tmp_path / "axes.tex").read_text()
    change = next(gain.token_kl_change for gain in board.gains if gain.entry == "block_linear")
    (line,) = (each for each in csv.DictReader(io.StringIO(to_csv(board)))
               if each["label"] == "block_linear")  # fmt: skip
    assert (line["without_patch"], float(line["token_kl_change_low"])) == ("block", change.low)
    tidy = results(board).query("row == 'block_linear' and metric == 'token_kl_change'")
    assert tidy[["scope", "high"]].values.tolist() == [["against block", change.high]]


def test_without_a_pair_there_is_no_table(board: Leaderboard, tmp_path: Any) -> None:
    none = board.model_copy(update={"gains": []})
    assert "What a patch adds" in to_html(board)
    assert "What a patch adds" not in to_markdown(none) + to_html(none)
    assert not (write_exports(none, tmp_path) / "axes.tex").exists()
