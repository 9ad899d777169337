"""Model cards: what the Hub's own library reads from them, and nothing a label could smuggle in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from streamline_bench.core.checkpoint.folder import (
    hash_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from streamline_bench.report.build import build_leaderboard, build_report
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import read_run_file, write_run_file
from streamline_bench.report.views.model_card import (
    evaluation_results,
    model_card,
    model_index,
    write_checkpoint_cards,
    write_model_cards,
)
from streamline_bench.stability.settings import Settings

HOSTILE = "---\n# <script>alert(1)</script> | [x](javascript:1) \x1b[31m \u202e: '\""


@pytest.fixture(scope="module")
def board(
    make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Leaderboard:
    run = make_run(tmp_path_factory.mktemp("run"))
    for results in run.glob("*/eval/model/results_*.json"):
        payload = json.loads(results.read_text())
        payload["configs"]["colours"] |= {"dataset_path": "owner/colours", "test_split": "test"}
        payload["configs"]["places"] |= {"dataset_path": "json", "dataset_name": "default"}
        payload["configs"]["stories"] |= {"dataset_path": "../../etc", "validation_split": "dev"}
        results.write_text(json.dumps(payload))
    return build_leaderboard(read_run_file(run), run, settings=Settings(draws=100), progress=False)


def test_the_hub_reads_the_model_index(board: Leaderboard) -> None:
    row = board.rows[2]
    card = ModelCard(model_card(board, row))
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert card.data.model_name == "layer" and set(found) == {"colours", "places", "stories"}
    for task in row.tasks:
        assert found[task.task].metric_value == round(100 * task.accuracy.value, 4)
    assert found["colours"].dataset_type == "owner/colours"
    assert found["colours"].dataset_split == "test"
    assert found["places"].dataset_type == "places", "a loader of local files is no data set"
    assert found["places"].dataset_config == "default"
    assert found["colours"].dataset_args == {"num_few_shot": 0}


def test_the_hub_reads_the_evaluation_results(board: Leaderboard, tmp_path: Path) -> None:
    hub = pytest.importorskip(
        "huggingface_hub._eval_results", reason="this huggingface_hub does not know .eval_results"
    )
    row = board.rows[2]
    assert set(evaluation_results(board, row)) == {"colours"}, "others are no data sets of the Hub"
    folder = write_model_cards(board, tmp_path)[1]
    (file,) = (folder / ".eval_results").iterdir()
    assert file.name == "colours.yaml"
    (entry,) = hub.parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("owner/colours", "colours")
    assert entry.value == round(100 * row.tasks[0].accuracy.value, 4)
    assert entry.date == "2026-01-02T03:04:05"
    assert "120 documents" in entry.notes and "0-shot" in entry.notes


def test_a_card_for_every_compressed_model_that_has_a_result(
    board: Leaderboard, tmp_path: Path
) -> None:
    row = board.rows[1]
    lost = row.model_copy(update={"label": "lost", "failed": "no", "tasks": [], "macro": None})
    same, hidden = (
        row.model_copy(update={"label": label}) for label in ("layer/../layer", "../..")
    )
    rows = [*board.rows, lost, same, hidden]
    folders = write_model_cards(board.model_copy(update={"rows": rows}), tmp_path)
    names = [folder.name for folder in folders]
    assert names == ["none", "layer", "layer_.._layer", "_.."]
    assert all(folder.parent == tmp_path for folder in folders)
    text = (folders[1] / "README.md").read_text()
    assert "12 → 10 layers" in text and "ab" * 32 in text and "| colours | 120 |" in text


def test_a_runs_checkpoints_get_their_cards(
    make_run: Callable[[Path], Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    given = read_run_file(run)
    elsewhere = tmp_path / "elsewhere"
    (run / "none" / "checkpoint").rename(elsewhere)
    rows = [row.model_copy(update={"checkpoint": str(elsewhere)}) if row.label == "none" else row
            for row in given.rows]  # fmt: skip
    write_run_file(run, given.model_copy(update={"rows": rows}))
    build_report(run, settings=Settings(draws=100), progress=False)
    checkpoint = run / "layer" / "checkpoint"
    manifest = read_manifest(checkpoint).model_copy(update={"files": hash_files(checkpoint)})
    write_manifest(checkpoint, manifest)
    written = write_checkpoint_cards(run)
    assert written == [checkpoint / "README.md"]
    assert not (elsewhere / "README.md").exists(), "a checkpoint outside the run is not ours"
    assert ModelCard.load(written[0]).data.model_name == "layer"
    verify_files(checkpoint, manifest)


def test_hostile_strings_stay_text(board: Leaderboard) -> None:
    row = board.rows[2]
    origin = row.provenance.model_copy(
        update={"source": HOSTILE, "engine": HOSTILE, "versions": {HOSTILE: HOSTILE},
                "recipe": {"paper": HOSTILE, HOSTILE: HOSTILE}}
    )  # fmt: skip
    row = row.model_copy(
        update={"label": HOSTILE, "title": HOSTILE, "method": HOSTILE, "provenance": origin,
                "tasks": [row.tasks[0].model_copy(update={"task": HOSTILE})]}
    )  # fmt: skip
    text = model_card(board.model_copy(update={"dense": HOSTILE}), row)
    assert "\x1b" not in text and "\u202e" not in text
    metadata, body = text.split("\n---\n\n", 1)
    (model,) = yaml.safe_load(metadata.removeprefix("---\n"))["model-index"]
    assert model["name"].startswith("---") and "base_model" not in metadata
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child.type for token in tokens for child in token.children or ()]
    assert set(inline) <= {"text", "text_special", "softbreak"}
    assert {token.type for token in tokens} & {"html_block", "hr"} == set()
    assert sum(token.type == "heading_open" for token in tokens) == 3


def test_index_without_data(board: Leaderboard) -> None:
    row = board.rows[2]
    tasks = [task.model_copy(update={"data": None}) for task in row.tasks]
    bare = row.model_copy(update={"tasks": tasks})
    types = [result["dataset"]["type"] for result in model_index(bare)[0]["results"]]
    assert types == ["colours", "places", "stories"]
    assert evaluation_results(board, bare) == {}
