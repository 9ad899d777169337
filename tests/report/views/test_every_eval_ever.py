"""Records of Every Eval Ever: what they say is what the run's own answers say."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import OutputError
from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.reading import row_answers
from streamline_bench.report.run_file import read_run_file
from streamline_bench.report.views.every_eval_ever import write_records
from streamline_bench.stability.settings import Settings


@pytest.fixture(scope="module")
def run(make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def board(run: Path) -> Leaderboard:
    return build_leaderboard(read_run_file(run), run, settings=Settings(draws=50), progress=False)


@pytest.fixture(scope="module")
def records(run: Path, board: Leaderboard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    count = write_records(board, folder, "Example Lab", row_answers(run, progress=False))
    assert count == len(read(folder)) > 0
    return folder


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Path in the folder -> record."""
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text())
        for path in sorted(folder.rglob("*.json"))
    }


def test_a_record_for_each_row_and_task(records: Path, board: Leaderboard) -> None:
    found = {
        (record["model_info"]["additional_details"]["row"], result["evaluation_name"],
         result["metric_config"]["metric_name"]): result["score_details"]
        for record in read(records).values() for result in record["evaluation_results"]
    }  # fmt: skip
    for row in board.rows:
        for task in row.tasks:
            details = found[(row.label, task.name, task.verdict)]
            assert details["score"] == task.accuracy.value
            error = details["uncertainty"]["standard_error"]["value"]
            assert error == task.accuracy.standard_error
            assert ("difference" in details.get("details", {})) != row.is_dense


def test_scores_are_the_means_of_the_answers_beside(records: Path) -> None:
    for name, record in read(records).items():
        about = record["detailed_evaluation_results"]
        assert about["file_path"] == name.replace(".json", "_samples.jsonl")
        content = (records / about["file_path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == about["checksum"]
        lines = [json.loads(line) for line in content.splitlines()]
        assert len(lines) == about["total_rows"]
        for result in record["evaluation_results"]:
            own = [line for line in lines
                   if line["evaluation_result_id"] == result["evaluation_result_id"]]  # fmt: skip
            mean = statistics.fmean(line["evaluation"]["score"] for line in own)
            assert mean == pytest.approx(result["score_details"]["score"])
            for line in own:
                assert line["evaluation_id"] == record["evaluation_id"]
                assert line["model_id"] == record["model_info"]["id"]
                if "choices" in line["input"]:
                    right = line["output"]["raw"] == line["input"]["reference"]
                    assert line["evaluation"]["is_correct"] == right


def test_a_compressed_model_is_not_taken_for_its_dense_one(records: Path) -> None:
    ids = {record["model_info"]["additional_details"]["row"]: record for record in
           read(records).values()}  # fmt: skip
    compressed = ids["layer"]
    details = compressed["model_info"]["additional_details"]
    assert compressed["model_info"]["id"].startswith("Example-Lab/")
    assert compressed["source_metadata"]["evaluator_relationship"] == "first_party"
    assert details["method"] == "streamline" and details["layers"] == "10"
    dense = ids["dense"]
    assert dense["model_info"]["id"].startswith("local/")
    assert dense["source_metadata"]["evaluator_relationship"] == "third_party"


def test_again_replaces_and_a_board_alone_has_no_answers(
    board: Leaderboard, run: Path, tmp_path: Path
) -> None:
    write_records(board, tmp_path, "Lab", row_answers(run, progress=False))
    before = set(read(tmp_path))
    write_records(board, tmp_path, "Lab")
    assert set(read(tmp_path)) == before and not list(tmp_path.rglob("*.jsonl"))
    for record in read(tmp_path).values():
        assert record["source_metadata"]["source_type"] == "documentation"


def test_names_are_paths_inside_the_folder(board: Leaderboard, tmp_path: Path) -> None:
    payload = board.model_dump(mode="json")
    payload["title"] = payload["rows"][-1]["label"] = "../../<b> CON \u2028 |"
    payload["ranks"] = {}
    write_records(Leaderboard.model_validate(payload), tmp_path / "in", "../x y")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    for name in read(tmp_path / "in"):
        assert re.fullmatch(r"data(/[\w.+-]+){3}/[0-9a-f-]{36}\.json", name)
    for organization in ("..", "data", "\u5b57"):
        with pytest.raises(OutputError, match="organization"):
            write_records(board, tmp_path, organization)


def test_the_packages_own_validator_finds_nothing(records: Path) -> None:
    command = shutil.which("every_eval_ever")
    if command is None:
        pytest.skip("the command every_eval_ever is not installed (it needs Python 3.12)")
    done = subprocess.run([command, "validate", "data/*/*/*/*.json*"], cwd=records,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout
