"""What patches add: rows of one selection against the one without a patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamline_bench.report.gains import gains
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.standing import TaskAnswers, standing
from streamline_bench.report.views.exports import write_exports
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.pivot import pivots, table
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.statistics.score import PairedDifference

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


def _row(label: str, parts: Any = None, removed: Any = (), kl: float | None = None) -> Row:
    divergence = {"documents": 1, "windows": 1, "tokens": 9, "window": 9, "kl": {"value": kl},
                  "same_top": {"value": 1}, "dense_perplexity": 1, "pruned_perplexity": 1,
                  "nats_per_token": {"value": 0}}  # fmt: skip
    names = ("selection", "patch", "healing")
    return Row.model_validate(
        {"label": label, "is_dense": label == "dense", "parameters": 100,
         "accuracy_macro": {"value": 0.5}, "accuracy_micro": None, "macro": None, "micro": None,
         "tasks": [], "parts": parts and dict(zip(names, parts, strict=True)),
         "divergence": divergence if kl is not None else None,
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


def test_the_table_is_in_every_view(board: Leaderboard, tmp_path: Any) -> None:
    (pivot,) = pivots(board)
    head, lines = table(pivot)
    assert head == ["selection", "size", "layer, mse", "linear"]
    assert [line[0] for line in lines] == ["cosine block", "sleb"]
    cell = lines[0][3]
    assert cell.startswith("+") and cell.endswith("KL 0.600 to 0.400"), cell
    write_exports(board, tmp_path)
    for made in (to_markdown(board), to_html(board), (tmp_path / "axes.md").read_text()):
        assert cell in made.replace("\\", "")
    assert cell.rpartition(", ")[2] in (tmp_path / "axes.tex").read_text()


def test_without_a_pair_there_is_no_table(board: Leaderboard, tmp_path: Any) -> None:
    none = board.model_copy(update={"gains": []})
    assert "What a patch adds" in to_html(board)
    assert "What a patch adds" not in to_markdown(none) + to_html(none)
    assert not (write_exports(none, tmp_path) / "axes.tex").exists()
