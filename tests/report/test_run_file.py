"""run.json, and the report made from a run folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from streamline_bench.errors import OutputError, SamplesError
from streamline_bench.report.build import build_report, write_report
from streamline_bench.report.leaderboard import read_leaderboard
from streamline_bench.report.run_file import (
    NoiseRun,
    RunFile,
    RunRow,
    read_run_file,
    write_run_file,
)
from streamline_bench.stability.settings import Settings

FEW = Settings(draws=100)


@pytest.fixture(scope="module")
def built(make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    build_report(folder, settings=FEW, progress=False)
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
    with pytest.raises(ValidationError, match="neither 'eval' nor 'failed'"):
        RunRow(label="a")
    again = NoiseRun(label="batch 1", eval="b")
    with pytest.raises(ValidationError, match="noise labels must be unique"):
        RunFile(dense="a", rows=[row], noise=[again, again])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"schema_version": 7}', "schema version 7"),
        ('{"schema_version": 1, "dense": "a"}', "'rows': Field required"),
        ("[]", "make the run again"),
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
    for name in ("leaderboard.json", "leaderboard.csv", "leaderboard.md", "leaderboard.html"):
        assert (built / name).stat().st_size > 500
    board = read_leaderboard(built / "leaderboard.json").model_dump(mode="json")
    assert [row["label"] for row in board["rows"]] == ["dense", "none", "layer"]
    assert not [path for path in built.iterdir() if path.name.startswith(".")]


def test_making_it_again_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    again = shutil.copytree(built, tmp_path / "again")
    (again / "leaderboard.html").unlink()
    build_report(again, settings=FEW, progress=False)
    for name in ("leaderboard.json", "leaderboard.csv", "leaderboard.md", "leaderboard.html"):
        assert (again / name).read_bytes() == (built / name).read_bytes()


def test_checkpoint_facts_reach_the_row(built: Path) -> None:
    board = read_leaderboard(built / "leaderboard.json").model_dump(mode="json")
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
        build_report(broken, settings=FEW, progress=False)
    shutil.rmtree(broken / "layer" / "eval")
    with pytest.raises(SamplesError, match="There is no file or folder"):
        build_report(broken, settings=FEW, progress=False)


def test_damaged_training_curve(built: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(built, tmp_path / "broken")
    file = broken / "layer" / "checkpoint" / "training_curve.jsonl"
    file.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(SamplesError, match=r"training_curve\.jsonl, line 2"):
        build_report(broken, settings=FEW, progress=False)


def changed(built: Path, target: Path, **changes: object) -> Path:
    """A copy of a run folder with other fields in its run.json."""
    copy = shutil.copytree(built, target)
    run = read_run_file(copy)
    write_run_file(copy, run.model_copy(update=changes))
    return copy


def test_a_failed_row_is_shown_with_its_reason(built: Path, tmp_path: Path) -> None:
    rows = read_run_file(built).rows
    lost = RunRow(
        label="lost",
        failed="The threshold reaches no size.",
        checkpoint="lost/checkpoint",
        recipe={"title": "LaCo", "method": "laco", "cost": "calibrated", "sparsity": 0.25},
    )
    run = changed(built, tmp_path / "run", rows=[*rows[:2], lost, rows[2]])
    build_report(run, settings=FEW, progress=False)
    board = read_leaderboard(run / "leaderboard.json").model_dump(mode="json")
    row = board["rows"][2]
    assert [row["label"] for row in board["rows"]] == ["dense", "none", "lost", "layer"]
    assert row["failed"] == "The threshold reaches no size." and row["method"] == "laco"
    assert row["accuracy_macro"] is None and row["tasks"] == [] and row["macro"] is None
    for name in ("leaderboard.csv", "leaderboard.md", "leaderboard.html"):
        assert "The threshold reaches no size." in (run / name).read_text()
    before = read_leaderboard(built / "leaderboard.json").model_dump(mode="json")
    assert before["rows"] == [other for other in board["rows"] if not other["failed"]]


def test_a_failed_dense_row_leaves_nothing_to_compare_with(built: Path, tmp_path: Path) -> None:
    rows = read_run_file(built).rows
    dense = RunRow(label="dense", failed="Out of memory.")
    run = changed(built, tmp_path / "run", rows=[dense, *rows[1:]])
    with pytest.raises(SamplesError, match=r"'dense' has no result \(Out of memory\.\)"):
        build_report(run, settings=FEW, progress=False)


def test_noise_is_the_dense_model_against_itself(built: Path, tmp_path: Path) -> None:
    noise = [NoiseRun(label="same", eval="dense/eval"), NoiseRun(label="other", eval="none/eval")]
    run = changed(built, tmp_path / "run", noise=noise)
    build_report(run, settings=FEW, progress=False)
    board = read_leaderboard(run / "leaderboard.json").model_dump(mode="json")
    noise, micro = board["noise"], board["rows"][1]["micro"]
    assert noise["repeats"] == ["same", "other"]
    flips = micro["flips"]["right_to_wrong"] + micro["flips"]["wrong_to_right"]
    floor = flips / micro["n"] / 2  # the mean over no flip at all and those of the first row
    assert noise["flips"]["value"] == pytest.approx(floor)
    assert micro["flips_above_noise"]["value"] == pytest.approx(floor)


def test_throughput_reaches_the_rows_of_the_same_label(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamline_bench.throughput import speed as figures

    common = {"engine": "vllm 0.29", "device": "cpu", "dtype": "float32", "batch_size": 8}
    measured = {
        "dense": figures.ThroughputFigures(
            label="dense",
            status="ok",
            output_tokens_per_second=100.0,
            clock="wall",
            blocks=3,
            self_ratio=1.01,
            self_ratio_low=0.97,
            self_ratio_high=1.05,
            **common,
        ),
        "layer": figures.ThroughputFigures(
            label="layer", status="failed", reason="no kernel", clock="wall", **common
        ),
    }
    monkeypatch.setattr("streamline_bench.report.reading.read_figures", lambda path: measured)
    run = changed(built, tmp_path / "run", throughput="throughput.json")
    build_report(run, settings=FEW, progress=False)
    dense, none, layer = read_leaderboard(run / "leaderboard.json").model_dump(mode="json")["rows"]
    assert dense["throughput"]["output_tokens_per_second"] == 100.0
    assert none["throughput"] is None
    assert (layer["throughput"]["status"], layer["throughput"]["reason"]) == ("failed", "no kernel")
    for page in ("leaderboard.md", "leaderboard.html"):
        text = (run / page).read_text(encoding="utf-8").replace("\\", "")
        assert re.search(r"1\.01. \[0\.97., 1\.05.\]", text), "what a copy of dense shows"


@pytest.mark.parametrize("version", [1, 2, 6, None])
def test_other_schema_versions_are_refused(built: Path, tmp_path: Path, version: Any) -> None:
    path = tmp_path / "leaderboard.json"
    board = json.loads((built / "leaderboard.json").read_text())
    path.write_text(json.dumps({**board, "schema_version": version}))
    with pytest.raises(SamplesError, match=r"schema.version.*\b5\b"):
        read_leaderboard(path)


def test_files_of_version_4_are_read(built: Path, tmp_path: Path) -> None:
    board = json.loads((built / "leaderboard.json").read_text())
    whole = read_leaderboard(built / "leaderboard.json")
    del board["grade_ranks"], board["method"]["pairs"]
    for row in board["rows"]:
        del row["formats"], row["solved"]
        for text in row["generations"]:
            for name in ("tokens", "thinking", "unfinished", "tokens_per_solved"):
                del text[name]
    (tmp_path / "old.json").write_text(json.dumps({**board, "schema_version": 4}))
    old = read_leaderboard(tmp_path / "old.json")
    assert old.model_copy(update={"schema_version": 5}) == whole


def test_a_number_that_is_not_finite_is_named(built: Path, tmp_path: Path) -> None:
    board = read_leaderboard(built / "leaderboard.json")
    board.rows[1].seconds["evaluate"] = float("inf")
    with pytest.raises(SamplesError, match=r"rows\.1\.seconds\.evaluate"):
        write_report(board, tmp_path)
    assert not list(tmp_path.iterdir())


def built_with(built: Path, target: Path, curves: dict[str, str], **manifest: Any) -> Any:
    """The row 'layer' of a copy with other curves and another manifest in its checkpoint."""
    copy = shutil.copytree(built, target)
    checkpoint = copy / "layer" / "checkpoint"
    for name, text in curves.items():
        (checkpoint / name).write_text(text)
    payload = json.loads((checkpoint / "streamline.json").read_text())
    (checkpoint / "streamline.json").write_text(json.dumps({**payload, **manifest}))
    build_report(copy, settings=FEW, progress=False)
    row = read_leaderboard(copy / "leaderboard.json").model_dump(mode="json")["rows"][2]
    return row, (copy / "leaderboard.html").read_text()


def test_curves_of_replacement_and_recovery(built: Path, tmp_path: Path) -> None:
    recovery = [{"step": 0, "train_loss": None, "val_loss": 3.0},
                {"step": 10, "train_loss": 2.5, "val_loss": 2.25}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in recovery)
    row, page = built_with(built, tmp_path / "both", {"recovery_curve.jsonl": text})
    assert row["recovery_curve"] == recovery and len(row["curve"]) == 11
    assert row["curve_notes"] == []
    assert "<b>layer</b>: replacement" in page and "<b>layer</b>: recovery" in page
    assert "Training of the recovery, 10 steps; validation loss: first 3 at step 0" in page


def test_a_training_that_diverged_is_shown_with_a_note(built: Path, tmp_path: Path) -> None:
    lines = [{"step": 5, "train_loss": 0.5, "val_loss": 0.6},
             {"step": 6, "train_loss": float("nan"), "val_loss": float("inf")},
             {"step": 7, "train_loss": float("nan")}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    row, page = built_with(built, tmp_path / "nan", {"recovery_curve.jsonl": text})
    assert row["recovery_curve"][1] == {"step": 6, "train_loss": None, "val_loss": None}
    note = "recovery: 3 losses are not finite, the first at step 6"
    assert row["curve_notes"] == [note] and page.count(note) == 1
    lost = "".join(json.dumps({**line, "train_loss": float("nan"), "val_loss": None}) + "\n"
                   for line in lines)  # fmt: skip
    _, page = built_with(built, tmp_path / "all", {"recovery_curve.jsonl": lost})
    assert "recovery: 3 losses" in page, "the note stands where there is nothing to draw"


@pytest.mark.parametrize(
    ("chosen", "start", "words"),
    [
        ({"removed_layers": [4, 5, 6, 7]}, 4, "layers 4 to 7"),  # replaceme: start is in blocks
        ({"removed_layers": [2, 5, 6]}, None, "layers 2, 5 to 6"),  # shortgpt
        ({"removed_layers": [3], "start": 3}, 3, "layer 3"),
        ({}, None, None),  # what removes no layer
    ],
)
def test_removed_layers_are_marked(
    built: Path, tmp_path: Path, chosen: dict[str, Any], start: int | None, words: str | None
) -> None:
    row, page = built_with(built, tmp_path / "run", {}, chosen=chosen)
    removed = chosen.get("removed_layers", [])
    assert row["scan"]["removed"] == removed and row["scan"]["start"] == start
    assert row["scan"]["n"] == (len(removed) or None)
    figure = next(part for part in page.split("<figure") if 'class="names"' in part
                  and ">layer<" in part)  # fmt: skip
    assert figure.count('class="mark"') == (1 if start is not None else len(removed))
    if words:
        assert f"</ul>{words}, 4,096 tokens" in figure


def test_unwritable_folder(built: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    board = read_leaderboard(built / "leaderboard.json")
    with pytest.raises(OutputError):
        write_report(board, tmp_path / "file" / "inside")
