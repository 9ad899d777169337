"""What is wrong with a run folder is said in one sentence that names the place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.errors import ComparisonError, SamplesError, StreamlineBenchError
from streamline_bench.report.build import build_report
from streamline_bench.report.leaderboard import read_leaderboard
from streamline_bench.report.run_file import RunFile, RunRow, read_run_file, write_run_file
from streamline_bench.stability.settings import Settings

FEW = Settings(draws=50)


@pytest.fixture(scope="module")
def whole(make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def report(run: Path) -> Path:
    return build_report(run, settings=FEW, progress=False)


def only(run: Path, pattern: str) -> Path:
    (file,) = run.glob(pattern)
    return file


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("run.json", r"run\.json cannot be read"),
        ("layer/eval/model/results_*.json", r"layer.*results_2026.*\.json"),
        ("layer/eval/model/samples_places_*.jsonl", r"samples_places_2026.*\.jsonl"),
        ("layer/checkpoint/streamline.json", r"streamline\.json cannot be read"),
        ("layer/checkpoint/similarity.json", r"similarity\.json"),
        ("layer/checkpoint/training_curve.jsonl", r"training_curve\.jsonl, line"),
    ],
)
def test_a_truncated_file_is_named(run: Path, pattern: str, message: str) -> None:
    truncate(only(run, pattern))
    with pytest.raises(StreamlineBenchError, match=message):
        report(run)
    assert not list(run.glob("leaderboard.*")), "nothing is written from half a run"


def test_foreign_files_are_left_alone(run: Path) -> None:
    for folder in (run, run / "layer", run / "layer" / "eval", run / "layer" / "checkpoint"):
        (folder / "notes \x1b[31m.txt").write_text("mine")
        (folder / "picture.json").write_bytes(b"\x89PNG")
    (run / "layer" / "eval" / "model" / "samples_other_2020-01-01T00-00-00.jsonl").write_text("{")
    report(run)
    assert len(read_leaderboard(run / "leaderboard.json").model_dump(mode="json")["rows"]) == 3
    assert (run / "notes \x1b[31m.txt").read_text() == "mine"


def test_an_earlier_report_stays_when_a_new_one_fails(run: Path) -> None:
    before = report(run).read_bytes()
    truncate(only(run, "layer/checkpoint/streamline.json"))
    with pytest.raises(StreamlineBenchError):
        report(run)
    assert (run / "leaderboard.html").read_bytes() == before


def test_a_failed_row_may_have_a_damaged_checkpoint(run: Path) -> None:
    """That may be why it failed; the reason is shown."""
    truncate(only(run, "layer/checkpoint/streamline.json"))
    rows = read_run_file(run).rows
    broken = rows[2].model_copy(update={"failed": "The disk was full.", "eval": None})
    write_run_file(run, RunFile(dense="dense", rows=[*rows[:2], broken]))
    report(run)
    board = read_leaderboard(run / "leaderboard.json").model_dump(mode="json")
    assert [row["failed"] for row in board["rows"]] == [None, None, "The disk was full."]


def test_one_row_alone(run: Path) -> None:
    write_run_file(run, RunFile(dense="dense", rows=read_run_file(run).rows[:1]))
    page = report(run).read_text()
    assert "dense answers" in page and 'id="flips"' not in page and 'id="differences"' not in page
    assert "nan" not in page.lower().replace("annan", "")


def test_only_failed_rows_beside_the_dense_one(run: Path) -> None:
    lost = RunRow(label="lost", failed="No.")
    write_run_file(run, RunFile(dense="dense", rows=[read_run_file(run).rows[0], lost]))
    page = report(run).read_text()
    assert "1 more failed" in page and 'id="statistics"' not in page


def test_rows_without_a_common_task(run: Path) -> None:
    results = only(run, "layer/eval/model/results_*.json")
    payload = json.loads(results.read_text())
    for part in ("results", "configs", "versions", "n-shot", "n-samples", "task_hashes"):
        payload[part] = {f"other_{task}": value for task, value in payload[part].items()}
    results.write_text(json.dumps(payload))
    for samples in results.parent.glob("samples_*.jsonl"):
        samples.rename(samples.with_name(samples.name.replace("samples_", "samples_other_")))
    with pytest.raises(ComparisonError, match="The runs share no task: 'dense' has colours"):
        report(run)


def test_all_answers_alike(run: Path) -> None:
    """A row that is the dense model itself: no flip, no division by zero, no NaN."""
    rows = read_run_file(run).rows
    same = RunRow(label="same", eval="dense/eval")
    write_run_file(run, RunFile(dense="dense", rows=[rows[0], same]))
    page = report(run).read_text()
    assert "No answer went from right to wrong." in page
    row = read_leaderboard(run / "leaderboard.json").model_dump(mode="json")["rows"][1]
    assert row["macro"]["agreement"]["value"] == 1.0 and row["worst_flips"] == []


def test_missing_throughput_and_noise_are_named(run: Path) -> None:
    given = read_run_file(run)
    write_run_file(run, given.model_copy(update={"throughput": "speed/throughput.json"}))
    with pytest.raises(StreamlineBenchError, match=r"throughput\.json"):
        report(run)
    write_run_file(run, given.model_copy(update={"throughput": "../throughput.json"}))
    with pytest.raises(SamplesError, match="lies outside the run folder"):
        report(run)
    (run / "throughput.json").write_text("{}")
    write_run_file(run, given.model_copy(update={"throughput": "throughput.json"}))
    with pytest.raises(StreamlineBenchError, match=r"throughput\.json"):
        report(run)
    noise = [{"label": "again", "eval": "noise/eval"}]
    payload = {**json.loads((run / "run.json").read_text()), "noise": noise, "throughput": None}
    (run / "run.json").write_text(json.dumps(payload))
    with pytest.raises(SamplesError, match=r"no file or folder '.*noise/eval'"):
        report(run)


def test_a_published_number_that_cannot_be_read(run: Path) -> None:
    rows = read_run_file(run).rows
    recipe = {"name": "mine", "published": [{"metric": "PIQA", "value": "high"}]}
    changed = rows[1].model_copy(update={"recipe": recipe})
    write_run_file(run, RunFile(dense="dense", rows=[rows[0], changed]))
    with pytest.raises(SamplesError, match=r"The recipe 'mine' has a published number"):
        report(run)
