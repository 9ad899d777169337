"""A method in a package of its own goes every way that ours go: tests/example_method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.machine.environment import resource

pytestmark = pytest.mark.slow

Run = Callable[..., str]

OURS = ("-m", "streamline_bench")


@pytest.fixture(scope="module")
def run(repository: Path, tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Run:
    """Return a function that runs a command where the package is installed, and gives its output.

    A command is that of a script, or what is behind ``python``, which may then be a fork.
    It is installed into a folder of its own, so that no other test finds it.
    """
    work = tmp_path_factory.mktemp("outside")
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(work / "site"), os.environ.get("PYTHONPATH", "")]),
        "STREAMLINE_BENCH_CACHE": str(work / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }

    def call(*command: str, code: int = 0) -> str:
        script = not command[0].startswith("-")
        program = (
            [str(scripts / command[0]), *command[1:]] if script else [sys.executable, *command]
        )
        with forks.used():
            done = subprocess.run(
                program, cwd=work, env=environment, text=True, capture_output=True
            )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    source = str(repository / "tests" / "example_method")
    call("python", "-m", "pip", "install", *offline, "--target", str(work / "site"), source)
    return call


def test_it_is_listed_beside_ours(run: Run) -> None:
    rows = {row["name"]: row for row in json.loads(run("streamline-bench", "recipes", "--json"))}
    assert (rows["spread_layers"]["method"], rows["sleb"]["method"]) == ("spread_layers", "sleb")


def test_compress_records_who_wrote_it(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    run(
        *OURS, "compress", str(tiny_llama), "--recipe", "spread_layers",
        "--n-layers", "2", "-o", str(out),
    )  # fmt: skip
    manifest = read_manifest(out)
    assert manifest is not None
    made_by = manifest.method
    assert (made_by["package"], made_by["package_version"]) == ("example-method", "0.1.0")
    assert made_by["class"] == "example_method.spread_layers:SpreadLayers"
    # Of layers 1 to 5, two in the middle of their halves.
    assert manifest.chosen["removed_layers"] == [2, 4]
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 4


def test_a_recipe_may_name_the_class_itself(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: example_method.spread_layers:SpreadLayers\nn_layers: 1\n")
    out = tmp_path / "out"
    run(*OURS, "compress", str(tiny_llama), "--recipe", str(recipe), "-o", str(out))
    manifest = read_manifest(out)
    assert manifest is not None and manifest.method["package"] == "example-method"
    recipe.write_text("method: example_method.spread_layers:Other\nn_layers: 1\n")
    told = run(
        *OURS, "compress", str(tiny_llama), "--recipe", str(recipe),
        "-o", str(tmp_path / "none"), code=2,
    )  # fmt: skip
    assert "'Other'" in told and "Traceback" not in told


def test_the_stock_harness_scores_it(run: Run, tmp_path: Path) -> None:
    run(
        "-m", "lm_eval", "--model", "streamline", "--model_args",
        "pretrained=bundled,recipe=spread_layers,sparsity=0.25", "--device", "cpu",
        "--include_path", str(resource("tasks") / "lm_eval"), "--tasks", "streamline_demo_pairs",
        "--limit", "4", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    (path,) = (tmp_path / "out").rglob("results_*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["results"]["streamline_demo_pairs"]["acc,none"] >= 0
    assert result["config"]["streamline"]["recipe"]["name"] == "spread_layers"


def test_it_is_a_row_of_a_comparison_and_of_its_report(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(
        *OURS, "compare", "bundled", "--recipes", "spread_layers", "--sparsity",
        "0.25", "--tasks", "streamline_demo_pairs", "--limit", "4", "-o", str(out),
    )  # fmt: skip
    run(*OURS, "report", str(out))
    assert r"spread\_layers" in (out / "leaderboard.md").read_text(encoding="utf-8")
    board = (out / "leaderboard.json").read_text(encoding="utf-8")
    assert "Layers at equal distances removed" in board
