"""What one board can hold: checkpoints made elsewhere, several models, boards of several runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_jobs import InProcess

from streamline_bench.cli.main import cli
from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import ComparisonError
from streamline_bench.report.leaderboard import Row, read_leaderboard
from streamline_bench.report.merge import merged_leaderboard
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.run import compare_request

Run = Callable[..., dict[str, Row]]


@pytest.fixture
def run(
    make: Callable[..., Request], tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """Return a function that makes a board in a folder of this name, and gives its rows."""
    monkeypatch.setattr("streamline_bench.runs.run.LocalExecutor", InProcess)
    monkeypatch.setenv("STREAMLINE_BENCH_CACHE", str(tmp_path / "cache"))

    def run_it(name: str, **changes: Any) -> dict[str, Row]:
        InProcess.started.clear()
        request = make(**{"tasks": ["words"], "include_path": str(tasks), **changes})
        result = compare_request(request, tmp_path / name, progress=False)
        assert (result.exit_code, dict(result.failures)) == (0, {})
        board = read_leaderboard(tmp_path / name / "leaderboard.json")
        return {row.label: row for row in board.rows}

    return run_it


@pytest.mark.slow
def test_checkpoints_twins_and_merged_boards(
    run: Run,
    tiny_llama: Path,
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
    leaderboards: Any,
) -> None:
    """One walk through runs that share their models, as each costs seconds."""
    made = compress(
        tiny_llama, load_recipe("last_layers", {"n_layers": 3}), tmp_path / "made", progress=False
    )
    (made / "streamline.json").unlink()  # so that nothing says where it comes from
    elsewhere = {"label": "elsewhere", "checkpoint": str(made)}
    other = make_tiny_model("llama", seed=7, num_hidden_layers=4)
    smaller = {"label": "smaller", "checkpoint": str(other), "dtype": "float32"}
    twin = {"label": "twin", "recipe": "last_layers"}

    rows = run("one", recipes=["last_layers", twin, elsewhere])
    # A checkpoint shares the layers that are the dense model's, and its size is counted.
    assert set(rows["elsewhere"].scored_with) == {"dense", "last_layers", "twin", "elsewhere"}
    assert rows["elsewhere"].parameters == CheckpointReader(made).num_parameters
    assert rows["elsewhere"].bytes == 4 * CheckpointReader(made).num_parameters
    assert rows["elsewhere"].layers == 3
    assert rows["elsewhere"].made_elsewhere == {
        **(rows["elsewhere"].made_elsewhere or {}), "name": str(made)
    }  # fmt: skip
    lost = 1 - CheckpointReader(made).num_parameters / CheckpointReader(tiny_llama).num_parameters
    assert rows["elsewhere"].sparsity_reached == pytest.approx(lost)
    assert rows["last_layers"].made_elsewhere is None
    # The same weights are asked once, and are one row.
    assert "twin" not in rows
    assert [same.label for same in rows["last_layers"].same_weights] == ["twin"]
    assert "score-twin" not in InProcess.started
    page = (tmp_path / "one" / "leaderboard.html").read_text("utf-8")
    assert "not made here" in page
    assert "same weights: twin" in page

    # Another folder takes the compression from the cache, and makes what is new.
    two = run("two", recipes=["last_layers", "first_layers", smaller])
    assert InProcess.taken == ["compress-last_layers"]
    assert two["last_layers"].accuracy_macro == rows["last_layers"].accuracy_macro
    assert two["smaller"].scored_with == []

    # The board of both runs is the board of one run with all their rows.
    merged = merged_leaderboard([tmp_path / "one", tmp_path / "two"], progress=False)
    every = ["last_layers", twin, elsewhere, "first_layers", smaller]
    run("one", recipes=every)
    assert sorted(InProcess.started) == [
        *("compress-first_layers", "score-first_layers", "score-smaller"),
    ]
    both = merged, read_leaderboard(tmp_path / "one" / "leaderboard.json")
    facts = []
    for board in both:
        text = board.model_dump_json(exclude={"commands"})
        named = json.loads(text.replace(str(tmp_path / "two"), str(tmp_path / "one")))
        facts.append(leaderboards.facts_of(named, tmp_path))
    found = list(leaderboards.differences(*facts))
    assert not found, "\n".join(found)

    # Fewer rows: the others stay on disk, and out of the report.
    assert set(run("one", recipes=["first_layers"])) == {"dense", "first_layers"}
    assert InProcess.started == []
    assert (tmp_path / "one/last_layers/checkpoint").is_dir()


@pytest.mark.slow
def test_boards_of_other_questions_are_not_merged(
    run: Run, tasks: Path, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    text = (tasks / "words.yaml").read_text("utf-8")
    (tasks / "more.yaml").write_text(text.replace("task: words", "task: more_words"), "utf-8")
    other = make_tiny_model("llama", seed=7, num_hidden_layers=4)
    shutil.copytree(make_tiny_model("llama"), tmp_path / "a")
    rows = run("both", model=[str(tmp_path / "a"), str(other)], recipes=["last_layers"])
    name = other.name
    assert list(rows) == ["dense-a", f"dense-{name}", "last_layers-a", f"last_layers-{name}"]
    assert [row.reference for row in rows.values()] == [None, None, "dense-a", f"dense-{name}"]
    assert rows[f"last_layers-{name}"].layers_before == 4
    assert rows["last_layers-a"].axes == {"model": "a"}
    hashes = {rows[f"dense-{each}"].provenance.weights_sha256 for each in ("a", name)}
    assert len(hashes) == 2

    run("less", recipes=["dense"], limit=4)
    with pytest.raises(ComparisonError, match="documents"):
        merged_leaderboard([tmp_path / "both", tmp_path / "less"], progress=False)
    run("less", recipes=["dense"], tasks=["words", "more_words"])
    assert InProcess.started == ["score-dense-" + InProcess.started[0][-8:]]
    with pytest.raises(ComparisonError, match="'more_words'"):
        merged_leaderboard([tmp_path / "both", tmp_path / "less"], progress=False)
    # Asked for less again, the row shows less.
    assert [task.task for task in run("less", recipes=["dense"])["dense"].tasks] == ["words"]
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "both"), str(tmp_path / "less")])
