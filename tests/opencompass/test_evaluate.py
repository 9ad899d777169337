"""The folder of an OpenCompass run: one run at a time, and nothing of others is touched."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import OutputError, StreamlineBenchError
from streamline_bench.opencompass import evaluate as run_folder
from streamline_bench.opencompass.evaluate import claimed_folder, evaluate
from streamline_bench.opencompass.execution import Environment
from streamline_bench.opencompass.run_plan import OF_MODEL_CLASS, ModelEntry, RunPlan, config_text
from streamline_bench.opencompass.source import entry_source

HOLDER = """
import sys, time
from pathlib import Path
from streamline_bench.opencompass.evaluate import claimed_folder
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
        with pytest.raises(OutputError, match=str(tmp_path)):
            claim(folder, plan(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def loaded_by_the_config(entry: Mapping[str, Any]) -> str:
    """The folder that a task of OpenCompass loads: its own keys taken out, the rest to the class.

    ``build_model_from_cfg`` of OpenCompass 0.5.4; then the signature of ``StreamlineModel``.
    """
    own = {"type", "abbr", "max_out_len", "batch_size", "run_cfg", *OF_MODEL_CLASS}
    keys = {key: value for key, value in entry.items() if key not in own}
    path, overrides, more = (keys.pop(name, None) for name in ("path", "overrides", "model_kwargs"))
    return entry_source(path, **{**keys, **(more or {})}, overrides=overrides).prepared.pretrained


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"model_kwargs": {"dtype": "float16", "attn_implementation": "eager"}},
        {"torch_dtype": "bfloat16", "max_seq_len": 64},
        {},
    ],
)
def test_the_run_reports_the_checkpoint_that_its_tasks_load(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def ran(*_: Any, **__: Any) -> tuple[Path, list[str]]:
        return run / "work" / "now", ["opencompass"]

    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(run_folder, "run_opencompass", ran)
    given = {"device": "cpu", "cache": str(tmp_path / "cache"), **options}
    asked = RunPlan(
        models=(
            ModelEntry("dense", str(tiny_llama)),
            ModelEntry("last", str(tiny_llama), "random_layers", {"n_layers": 2, "seed": 3}),
        ),
        datasets=("piqa",),
        options=given,
    )
    reported = evaluate(run, asked, Environment(sys.executable, {}, 0)).rows[1].checkpoint
    (models,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(config_text(asked)).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "models"
    )
    assert given.items() <= models[1].items()
    assert reported == loaded_by_the_config(models[1])
    assert len(list((tmp_path / "cache" / "compressed").glob("*/streamline.json"))) == 1
