"""Targets of rows, and sizes that a search adds to a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_jobs import InProcess

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import RecipeError, SparsityError
from streamline_bench.report.fronts import Front, FrontPlace
from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.views.terminal import terminal_table
from streamline_bench.runs.planning.plan import PlanRow, read_plan
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan
from streamline_bench.runs.run import compare_request
from streamline_bench.runs.search import _gaps


def test_a_target_gives_each_row_its_size(make: Callable[..., Request], tiny_llama: Path) -> None:
    total = CheckpointReader(tiny_llama).stored_bytes
    own = {"recipe": "random_layers", "set": {"n_layers": 1}}
    pruner = {"recipe": "llm_pruner", "set": {"parameters.criterion": "l1"}}
    asked = {
        "recipes": ["last_layers", pruner, own],
        "set": {},
        "target": {"bytes": total * 7 // 10},
    }
    plan = resolve_plan(make(**asked))
    rows = {row.label: row for row in plan.rows}
    assert rows["random_layers"].target == {} and rows["random_layers"].recipe["n_layers"] == 1
    # A layer has 7,744 of 52,896 numbers: two are 29.3 % of them, three 43.9 %.
    assert rows["last_layers"].axes == rows["last_layers"].size == {"n_layers": 3}
    assert rows["last_layers"].target == {"bytes": total * 7 // 10}
    given = resolve_plan(
        make(recipes=["last_layers", {**pruner, "set": {**pruner["set"],
             **rows["llm_pruner"].size}}], set=rows["last_layers"].size)
    )  # fmt: skip
    same = {row.label: row.key for row in given.rows}
    assert {label: row.key for label, row in rows.items() if row.target} == {
        label: key for label, key in same.items() if label != "dense"
    }
    with pytest.raises(SparsityError, match=r"Row 'last_layers'.*at its smallest"):
        resolve_plan(make(recipes=["last_layers"], set={}, target="bytes=1KB"))
    with pytest.raises(RecipeError, match="not both"):
        resolve_plan(make(target="bytes=1MB"))


def test_the_search_begins_where_most_is_open() -> None:
    places = [
        FrontPlace(label=label, cost=cost, accuracy=accuracy, on=on, share=1.0)
        for label, cost, accuracy, on in [
            ("a", 10, 0.2, True), ("b", 20, 0.1, False), ("c", 40, 0.5, True), ("d", 90, 0.6, True),
            ("e", 100, 0.9, True),
        ]
    ]  # fmt: skip
    found = [(one.label, two.label) for one, two in _gaps(Front(measure="bytes", places=places))]
    areas = {("a", "c"): 30 * 0.3, ("c", "d"): 50 * 0.1, ("d", "e"): 10 * 0.3}
    assert found == sorted(areas, key=lambda pair: -areas[pair])


@pytest.mark.slow
def test_a_search_adds_sizes_between_neighbours_and_continues(
    make: Callable[..., Request], tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    tiny_llama: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr("streamline_bench.runs.run.LocalExecutor", InProcess)
    # A random model's accuracies follow from nothing: look between the ends of the board.
    monkeypatch.setattr("streamline_bench.runs.search._gaps", lambda front: [
        (front.places[0], front.places[-1])
    ])  # fmt: skip
    total = CheckpointReader(tiny_llama).stored_bytes
    target = {"memory": int(1.2 * total), "concurrency": 2, "context": 16}
    five = {"recipe": "last_layers", "label": "five", "set": {"n_layers": 5}}

    def run(search: int) -> Leaderboard:
        InProcess.started.clear()
        request = make(
            recipes=["last_layers", five], set={}, target=target, search=search,
            tasks=["words"], include_path=str(tasks),
        )  # fmt: skip
        result = compare_request(request, tmp_path / "run", progress=False)
        assert (result.exit_code, dict(result.failures)) == (0, {})
        return read_leaderboard(tmp_path / "run" / "leaderboard.json")

    def added() -> list[PlanRow]:
        plan = read_plan(tmp_path / "run")
        assert plan is not None
        return [row for row in plan.rows if row.searched]

    board = run(1)
    rows = {row.label: row for row in board.rows}
    assert board.target and "16 tokens" in board.target
    assert (rows["last_layers"].memory or 0) <= target["memory"] < (rows["dense"].memory or 0)
    assert [front.measure for front in board.fronts] == ["memory", "bytes"]
    for name in ("leaderboard.html", "leaderboard.md"):
        text = (tmp_path / "run" / name).read_text("utf-8")
        assert "Pareto front" in text and "16 tokens" in text
    assert "Pareto front" in terminal_table(board)
    first = added()
    assert len(first) == 1 and first[0].label in rows
    # A longer search goes on from there; the same command again does nothing.
    run(2)
    assert [row.key for row in added()][:1] == [first[0].key]
    assert len([name for name in InProcess.started if name.startswith("compress")]) == 1
    plan = read_plan(tmp_path / "run")
    assert plan is not None
    sizes = [row.recipe["n_layers"] for row in plan.rows if not row.dense]
    assert len(sizes) == len(set(sizes)) == 4
    run(2)
    assert InProcess.started == []
    with pytest.raises(RecipeError, match="--until"):
        compare_request(make(search=1), tmp_path / "x", until="evaluate", progress=False)
