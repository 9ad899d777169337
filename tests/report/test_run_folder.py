"""run.json, and the report made from a run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from streamline_bench.errors import OutputError, SamplesError
from streamline_bench.report import RunFile, RunRow, build_report, read_run_file, write_run_file
from streamline_bench.report.write import read_leaderboard


@pytest.fixture(scope="module")
def built(make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    build_report(folder, progress=False)
    return folder


def test_run_file_survives_a_round_trip(tmp_path: Path) -> None:
    run = RunFile(
        dense="a",
        rows=[RunRow(label="a", eval="a/eval", seconds={"evaluate": 1.5})],
        commands=["lm_eval"],
        versions={"torch": "2"},
    )
    write_run_file(tmp_path, run)
    assert read_run_file(tmp_path) == run
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_rows_must_make_sense() -> None:
    row = RunRow(label="a", eval="a")
    with pytest.raises(ValidationError, match="must be unique"):
        RunFile(dense="a", rows=[row, row])
    with pytest.raises(ValidationError, match="'b' is not among the rows"):
        RunFile(dense="b", rows=[row])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"schema_version": 7}', "schema version 7, this release reads 1"),
        ('{"schema_version": 1, "dense": "a"}', "'rows': Field required"),
        ("[]", "schema version None"),
    ],
)
def test_damaged_run_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SamplesError, match=message):
        read_run_file(tmp_path)


def test_missing_run_file(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"has no run\.json"):
        build_report(tmp_path)


def test_the_four_files(built: Path) -> None:
    for name in ("report.html", "report.md", "leaderboard.json", "leaderboard.csv"):
        assert (built / name).stat().st_size > 500
    board = read_leaderboard(built / "leaderboard.json")
    assert [row["label"] for row in board["rows"]] == ["dense", "none", "layer"]
    assert not [path for path in built.iterdir() if path.name.startswith(".")]


def test_making_it_again_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    again = shutil.copytree(built, tmp_path / "again")
    (again / "report.html").unlink()
    build_report(again, progress=False)
    for name in ("report.html", "report.md", "leaderboard.json", "leaderboard.csv"):
        assert (again / name).read_bytes() == (built / name).read_bytes()


def test_checkpoint_facts_reach_the_row(built: Path) -> None:
    board = read_leaderboard(built / "leaderboard.json")
    dense, _, layer = board["rows"]
    assert (layer["layers_before"], layer["layers"]) == (12, 10)
    assert layer["sparsity_reached"] == 0.231 and layer["replacement"] == "layer"
    assert layer["seconds"] == {"evaluate": 12.5, "compress": 71.2}
    assert layer["scan"]["start"] == 6 and layer["scan"]["n"] == 3
    assert len(layer["scan"]["cosine"]) == 13
    assert [point["step"] for point in layer["curve"]][:2] == [0, 80]
    assert layer["provenance"]["source_weights_sha256"] == "ab" * 32
    assert (dense["parameters"], dense["layers"]) == (3_120_000, 12)


def test_evaluations_stay_inside_the_run(built: Path, tmp_path: Path) -> None:
    write_run_file(tmp_path, RunFile(dense="a", rows=[RunRow(label="a", eval="../elsewhere")]))
    with pytest.raises(SamplesError, match="lies outside the run folder"):
        build_report(tmp_path)


def test_missing_parts_are_named(built: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(built, tmp_path / "broken")
    shutil.rmtree(broken / "layer" / "checkpoint")
    with pytest.raises(SamplesError, match=r"checkpoint .*layer/checkpoint' is missing"):
        build_report(broken, progress=False)
    shutil.rmtree(broken / "layer" / "eval")
    with pytest.raises(SamplesError, match="There is no file or folder"):
        build_report(broken, progress=False)


def test_damaged_training_curve(built: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(built, tmp_path / "broken")
    file = broken / "layer" / "checkpoint" / "training_curve.jsonl"
    file.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(SamplesError, match=r"training_curve\.jsonl, line 2"):
        build_report(broken, progress=False)


def test_unwritable_folder(built: Path, tmp_path: Path) -> None:
    from streamline_bench.report.write import write_report

    (tmp_path / "file").write_text("")
    board = json.loads((built / "leaderboard.json").read_text())
    with pytest.raises(OutputError):
        write_report(board, tmp_path / "file" / "inside")
