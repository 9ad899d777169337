"""The folder of an OpenCompass run: one run at a time, and nothing of others is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import OutputError, StreamlineBenchError
from streamline_bench.opencompass.run_folder import claimed_folder
from streamline_bench.opencompass.run_plan import ModelEntry, RunPlan

HOLDER = """
import sys, time
from pathlib import Path
from streamline_bench.opencompass.run_folder import claimed_folder
from streamline_bench.opencompass.run_plan import ModelEntry, RunPlan
with claimed_folder(Path(sys.argv[1]), RunPlan((ModelEntry("dense", "model"),), ("piqa",))):
    print("held", flush=True)
    time.sleep(600)
"""


def plan(**changes: Any) -> RunPlan:
    values: dict[str, Any] = {"models": (ModelEntry("dense", "model"),), "datasets": ("piqa",)}
    return RunPlan(**{**values, **changes})


def claim(folder: Path, asked: RunPlan, **options: bool) -> None:
    with claimed_folder(folder, asked, **options):
        pass


def test_two_runs_do_not_share_a_folder_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"process {holder.pid} on"):
            claim(run, plan(), overwrite=overwrite)
    assert (run / "opencompass.json").exists()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    claim(run, plan())


def test_a_damaged_claim_is_named_and_overwrite_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "opencompass.json").write_text('{"models": [')
    (tmp_path / "work").mkdir()
    with pytest.raises(OutputError, match=r"opencompass\.json is damaged .*--overwrite"):
        claim(tmp_path, plan())
    claim(tmp_path, plan(), overwrite=True)
    assert json.loads((tmp_path / "opencompass.json").read_text())["datasets"] == ["piqa"]
    assert not (tmp_path / "work").exists()


def test_overwrite_removes_what_a_run_makes_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, plan())
    (tmp_path / "work" / "20300101_000000").mkdir(parents=True)
    data = tmp_path.with_name("data")
    data.mkdir()
    (data / "piqa.jsonl").touch()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "data").symlink_to(data, target_is_directory=True)
    for name in ("run.json", "leaderboard.html", "opencompass.log", "thesis.txt"):
        (tmp_path / name).touch()
    claim(tmp_path, plan(limit=4), overwrite=True)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"opencompass.json", "thesis.txt"}
    assert (data / "piqa.jsonl").exists()


def test_a_plan_that_cannot_be_run_removes_nothing(tmp_path: Path) -> None:
    claim(tmp_path, plan())
    (tmp_path / "work").mkdir()
    with pytest.raises(StreamlineBenchError, match="no data sets called 'pica'"):
        claim(tmp_path, plan(datasets=("pica",)), overwrite=True)
    assert (tmp_path / "work").exists()


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(OutputError, match=r"no OpenCompass run|not a folder"):
            claim(folder, plan(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
