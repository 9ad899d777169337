"""What one board can hold: checkpoints made elsewhere, several models, boards of several runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantised_models import make_twins
from run_jobs import InProcess
from safetensors.torch import load_file

from streamline_bench.cli.main import cli
from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import ComparisonError
from streamline_bench.report.leaderboard import read_leaderboard
from streamline_bench.report.merge import merged_leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.text import count
from streamline_bench.report.views.terminal import terminal_table
from streamline_bench.runs.planning.request import Request, read_request
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
    board = read_leaderboard(tmp_path / "both" / "leaderboard.json")
    assert f"Compared with dense-{name}: last_layers-{name}." in terminal_table(board)
    short = (tmp_path / "both" / "leaderboard.md").read_text("utf-8").replace("\\", "")
    assert f"| last_layers-{name} | dense-{name} |" in short
    page = (tmp_path / "both" / "leaderboard.html").read_text("utf-8")
    assert f"<small>compared with dense-{name}</small>" in page

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


@pytest.mark.slow
def test_the_released_models_beside_what_was_published(
    run: Run, tasks: Path, choice_task: Callable[..., str], make_tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """The plan with tiny models in place of the hub's, and other tasks under the same names."""
    plan = read_request("released_models")
    layers = {
        "meta-llama/Llama-2-7b-hf": 4, "meta-llama/Llama-3.1-8B": 5,
        "XiaodongChen/Llama-2-4.7B": 3, "XiaodongChen/Llama-3.1-5.4B": 4,
    }  # fmt: skip
    text = json.dumps(plan)
    for seed, (name, depth) in enumerate(layers.items()):
        made = make_tiny_model("llama", seed=seed, num_hidden_layers=depth)
        folder = shutil.copytree(made, tmp_path / Path(name).name)
        assert f'"{name}"' in text
        text = text.replace(f'"{name}"', f'"{folder}"')
    for task in plan["tasks"]:
        (tasks / f"{task}.yaml").write_text(choice_task(task, tasks / "words.jsonl"), "utf-8")
    rows = run("board", **{"set": {}, **json.loads(text)})

    assert {label: row.reference for label, row in rows.items()} == {
        "Llama-2-7B": None, "Llama-3.1-8B": None,
        "Llama-2-4.7B": "Llama-2-7B", "Llama-3.1-5.4B": "Llama-3.1-8B",
    }  # fmt: skip
    elsewhere = {label for label, row in rows.items() if row.made_elsewhere}
    assert elsewhere == {"Llama-2-4.7B", "Llama-3.1-5.4B"}
    # The last column of the authors' table is the mean of the seven.
    means = {"Llama-2-7B": 59.7, "Llama-2-4.7B": 54.1, "Llama-3.1-8B": 64.0, "Llama-3.1-5.4B": 58.2}
    for label, row in rows.items():
        ours = {task.task: task.accuracy for task in row.tasks}
        assert [each.task for each in row.published] == plan["tasks"]
        assert [each.ours for each in row.published] == [ours[task] for task in plan["tasks"]]
        mean = sum(each.value for each in row.published) / 7
        assert mean == pytest.approx(means[label], abs=0.0501)
    page = (tmp_path / "board" / "leaderboard.html").read_text("utf-8")
    assert "RUCKBReasoning/LLM-Streamline" in page
    assert "On the same model" in page and "On other models" not in page


@pytest.mark.slow
def test_a_quantised_checkpoint_keeps_its_parameters_and_loses_bytes(
    make: Callable[..., Request], tasks: Path, make_tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    coded, plain = make_twins("fp8", make_tiny_model)
    unread, _ = make_twins("gptq", make_tiny_model)
    monkeypatch.setattr("streamline_bench.runs.run.LocalExecutor", InProcess)
    monkeypatch.setattr("streamline_bench.modeling.loading._is_installed", lambda _: False)
    request = make(
        model=str(plain), tasks=["words"], include_path=str(tasks), set={}, dtype="bfloat16",
        recipes=[{"label": label, "checkpoint": str(folder)}
                 for label, folder in (("fp8", coded), ("gptq", unread))],
    )  # fmt: skip
    result = compare_request(request, tmp_path / "run", progress=False)
    assert result.exit_code == 1 and list(result.failures) == ["gptq"]
    assert "pip install gptqmodel" in result.failures["gptq"]

    board = read_leaderboard(tmp_path / "run" / "leaderboard.json")
    dense, fp8, gptq = board.rows
    tensors = load_file(coded / "model.safetensors").values()
    assert fp8.bytes == sum(tensor.nbytes for tensor in tensors) < (dense.bytes or 0)
    assert fp8.parameters == sum(t.numel() for t in load_file(plain / "model.safetensors").values())
    assert fp8.sparsity_reached == 0 and fp8.made_elsewhere is not None
    # The codes stand for the very weights of the dense model.
    assert fp8.macro is not None and fp8.macro.flips.verdicts == 0
    assert gptq.failed is not None and gptq.bytes == CheckpointReader(unread).stored_bytes
    page, short = (
        (tmp_path / "run" / f"leaderboard.{kind}").read_text() for kind in ("html", "md")
    )
    assert "not made here" in page
    for shown in (page, short):
        assert f"{count(fp8.bytes)}B" in shown and f"{count(dense.bytes)}B" in shown
