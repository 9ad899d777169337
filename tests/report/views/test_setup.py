"""What a reader looks for: tokens by what they were read for, scaled-down settings, the set-up."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.setup import scaled_down, setup, tokens_seen


@pytest.fixture
def board(sized: dict[str, Any]) -> Leaderboard:
    """A board on which one recipe was trained and one read whole documents."""
    made = copy.deepcopy(sized)
    for row in made["rows"]:
        row["seconds"] = {"evaluate": 60.0}
        row["provenance"]["machine"] = "a machine"
    for row in made["rows"][1:]:
        row["provenance"]["calibration"] = {
            "tokens": 16384, "sequences": 64, "sequence_length": 256,
        }  # fmt: skip
    for row in made["rows"][3:5]:
        row["provenance"]["training"] = {"tokens": 411648, "recovery": {"tokens": 65280}}
    for row in made["rows"][5:]:
        row["provenance"]["recipe"]["calibration"] = {"form": "documents"}
        row["provenance"]["calibration"] |= {"tokens": 750, "sequences": 8}
    return Leaderboard.model_validate(made)


def test_tokens_are_those_of_calibration_training_and_recovery(board: Leaderboard) -> None:
    seen = [tokens_seen(row) for row in board.rows]
    assert seen[0] == {} and seen[1] == {"calibration": 16384}
    assert seen[3] == {"calibration": 16384, "training": 411648, "recovery": 65280}
    markdown = to_markdown(board)
    assert "| calibration 16,384, training 411,648, recovery 65,280 |" in markdown
    assert "493 k tokens" in to_html(board), "together"


def test_the_set_up_says_machine_time_tokens_and_text(board: Leaderboard) -> None:
    found = dict(setup(board))
    assert found["Machine"] == "a machine" and found["Time in all"].startswith("7 min 00 s")
    assert "750 tokens (8 documents, each cut at 256): slice" in found["Calibration"]
    assert "16,384 tokens (64 sequences of 256): none, map" in found["Calibration"]
    assert found["Training"].startswith("411,648 tokens and 65,280 tokens: map;")
    assert found["Text of the token KL"].startswith("700 tokens of 5 documents")
    markdown = to_markdown(board).replace("\\", "")
    for name, value in found.items():
        assert f"- {name}: {value}" in markdown
    assert "it rests on 700 tokens of 5 documents" in markdown


def test_scaled_down_settings_stand_under_the_title(
    board: Leaderboard, sized: dict[str, Any]
) -> None:
    assert scaled_down(board) is None, "64 samples in the place of 50 are more"
    less = copy.deepcopy(sized)
    less["rows"][1]["provenance"]["recipe"]["overridden"] = {"training.min_steps": [800, 200]}
    given = Leaderboard.model_validate(less)
    told = scaled_down(given)
    assert told is not None and "1 of 6 compressed models" in told
    assert told in to_html(given).partition("<nav")[0]
    assert told in to_markdown(given).replace("\\", "").partition("\n## ")[0]


def test_numbers_on_other_models_are_folded(board: Leaderboard) -> None:
    literature = to_markdown(board).partition("## Published numbers")[2]
    assert "<details><summary>6 numbers on other models</summary>\n\n| row |" in literature
    assert literature.count("</details>") == 1


def test_a_verdict_that_all_share_is_no_column(board: Leaderboard, sized: dict[str, Any]) -> None:
    assert "| verdict |" not in to_markdown(board)
    assert "is “worse” for every model" in to_markdown(board)
    mixed = copy.deepcopy(sized)
    mixed["rows"][1]["macro"]["decision"] = "cannot tell"
    assert "| verdict |" in to_markdown(Leaderboard.model_validate(mixed))
