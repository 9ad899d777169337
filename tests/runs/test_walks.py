"""Rows that share layers, scored together and one by one: the leaderboard is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.run import compare_request

pytestmark = pytest.mark.usefixtures("warm")

KINDS = {"trunk_group", "trunk_rolling", "trunk_generation"}
"""Multiple choice and loglikelihood; rolling loglikelihood; generation."""


def _facts(run: Path) -> list[dict[str, Any]]:
    rows = [run / "jobs" / f"score-{label}" for label in ("dense", "last_layers")]
    texts = [(row / "done.json").read_text(encoding="utf-8") for row in rows]
    return [json.loads(text)["facts"] for text in texts]


@pytest.mark.slow
def test_trunk_and_no_trunk_give_the_same_leaderboard(
    make: Callable[..., Request], trunk_tasks: Path, tmp_path: Path, leaderboards: Any
) -> None:
    request = make(
        recipes=["last_layers"],
        tasks=sorted(KINDS),
        include_path=str(trunk_tasks),
        batch_size="4",
        limit=5,
    )
    together, apart = tmp_path / "together", tmp_path / "apart"
    result = compare_request(request, together, progress=False)
    assert (result.exit_code, dict(result.alone)) == (0, {})
    # The same checkpoint, not scored yet.
    shutil.copytree(together, apart)
    for name in ("score-dense", "score-last_layers", "report"):
        shutil.rmtree(apart / "jobs" / name)
    result = compare_request(request, apart, execution=Execution(trunk=False), progress=False)
    assert result.jobs == {
        "compress-last_layers": "kept", "score-dense": "done", "score-last_layers": "done"
    }  # fmt: skip
    walk = {"dense", "last_layers"}
    assert [set(each["together"]) for each in _facts(together)] == [walk] * 2
    assert [each["together"] for each in _facts(apart)] == [[]] * 2
    boards = [leaderboards.facts(run) for run in (together, apart)]
    for board in boards:  # the kept checkpoint was made in the first folder
        board["commands"] = [line for line in board["commands"] if " compress " not in line]
    # Without a trunk nothing is said about it.
    shared = [[frozenset(row.pop("scored_with")) for row in board["rows"]] for board in boards]
    assert shared == [[frozenset(walk)] * 2, [frozenset()] * 2]
    assert [[row.pop("scored_alone") for row in board["rows"]] for board in boards] == [
        [None] * 2
    ] * 2
    assert list(leaderboards.differences(*boards)) == []
    row = next(row for row in boards[0]["rows"] if row["label"] == "last_layers")
    assert {task["output_type"] for task in row["tasks"]} >= {"multiple_choice", "generate_until"}
    assert row["perplexities"]
    assert not (together / "jobs" / ".answers").exists()


@pytest.mark.slow
def test_a_row_that_shares_nothing_says_so_whatever_interrupted_the_run(
    make: Callable[..., Request], tasks: Path, tmp_path: Path, leaderboards: Any
) -> None:
    request = make(
        recipes=["last_layers", "first_layers"], tasks=["words"], include_path=str(tasks), limit=2
    )
    run = tmp_path / "run"
    result = compare_request(request, run, execution=Execution(workers=2), progress=False)
    assert result.exit_code == 0
    reason = "it shares no layer with 'dense': its first layer differs"
    assert dict(result.alone) == {"first_layers": reason}
    board = json.loads((run / "leaderboard.json").read_text(encoding="utf-8"))
    alone = {row["label"]: row["scored_alone"] for row in board["rows"]}
    assert alone == {"dense": None, "last_layers": None, "first_layers": reason}
    page = (run / "leaderboard.html").read_text(encoding="utf-8")
    assert "its first layer differs" in page
    # As after an interruption before the last row was scored: it has no company any more.
    before = leaderboards.facts(run)
    (run / "jobs" / "score-last_layers" / "done.json").unlink()
    result = compare_request(request, run, execution=Execution(workers=2), progress=False)
    assert dict(result.alone) == {
        "first_layers": reason, "last_layers": "no other row was left to score it with"
    }  # fmt: skip
    assert list(leaderboards.differences(before, leaderboards.facts(run))) == []
