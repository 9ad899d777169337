"""The real ``lm_eval`` command, in a process of its own, with this package installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def installed() -> None:
    try:
        metadata.distribution("streamline-bench")
    except metadata.PackageNotFoundError:
        pytest.skip("streamline-bench is not installed in this environment (pip install -e .)")


@pytest.fixture(scope="module")
def tasks(
    words_choice: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return words_choice(tmp_path_factory.mktemp("tasks"), 8)


def lm_eval(program: list[str], arguments: dict[str, str], cwd: Path) -> Any:
    options = [part for key, value in arguments.items() for part in (f"--{key}", value) if part]
    return subprocess.run([*program, *options], capture_output=True, text=True, cwd=cwd)


def samples(folder: Path) -> list[list[float]]:
    (file,) = folder.rglob("samples_words_choice_*.jsonl")
    rows = sorted(
        (json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"]
    )
    return [[float(score) for score, _ in row["filtered_resps"]] for row in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_recipe_from_the_stock_command_with_one_response_cache_for_two_models(
    tiny_llama: Path, tasks: Path, tmp_path: Path, forks: Any
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i) % 96}" for i in range(4000)))
    dense = f"pretrained={tiny_llama},dtype=float32"
    recipe = f"recipe=streamline_none,n_layers=2,calibration={text},sequence_length=32"
    installed = [str(Path(sys.executable).with_name("lm_eval"))]

    def run(name: str, model_args: str, program: list[str], **more: str) -> str:
        done = lm_eval(
            program,
            {
                "model": "streamline",
                "model_args": model_args,
                "tasks": "words_choice",
                "include_path": str(tasks),
                "device": "cpu",
                "output_path": str(tmp_path / name),
                "log_samples": "",
                **more,
            },
            tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return str(done.stderr)

    cache = {"use_cache": str(tmp_path / "answers")}
    said = run("pruned", f"{dense},{recipe}", installed, **cache)
    assert "Compressed with recipe 'streamline_none'" in said
    with forks.used():
        run("dense", dense, [sys.executable, "-m", "lm_eval"], **cache)
        again = run("again", f"{dense},{recipe}", [sys.executable, "-m", "lm_eval"], **cache)
    assert "Reusing the result of recipe 'streamline_none'" in again
    assert "Cached requests: 24, Requests remaining: 0" in again
    (result,) = (tmp_path / "again").rglob("results_*.json")
    ours = json.loads(result.read_text())["config"]["streamline"]
    assert ours["layers_after"] == 4
    for name, folder in (("dense", str(tiny_llama)), ("pruned", ours["path"])):
        expected = in_process("hf", folder, tasks)
        for row, stock in zip(samples(tmp_path / name), expected, strict=True):
            assert row == pytest.approx(stock, abs=1e-4)
    assert samples(tmp_path / "again") == samples(tmp_path / "pruned")
    assert samples(tmp_path / "pruned") != samples(tmp_path / "dense")


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("model_args", "sentence"),
    [
        ("pretrained={model},sparisty=0.5", "did you mean 'sparsity'?"),
        ("pretrained={model},recipe=streamlne", "Unknown recipe 'streamlne'"),
        ("pretrained={model},recipe=streamline,n_layers=6", "6"),
        ("pretrained=/no/such/folder", "/no/such/folder does not exist"),
    ],
)
def test_a_users_error_is_one_sentence_and_exit_code_2(
    model_args: str, sentence: str, tiny_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    done = lm_eval(
        [sys.executable, "-I", "-m", "lm_eval"],
        {
            "model": "streamline",
            "model_args": model_args.format(model=tiny_llama),
            "tasks": "words_choice",
            "include_path": str(tasks),
            "device": "cpu",
        },
        tmp_path,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("streamline-bench: ")]
    assert sentence in line


def in_process(model: str, folder: str, tasks: Path) -> list[list[float]]:
    """The answers of a model without command, cache or recipe."""
    import lm_eval as harness
    from lm_eval.tasks import TaskManager

    results = harness.simple_evaluate(
        model=model,
        model_args={"pretrained": folder, "dtype": "float32"},
        tasks=["words_choice"],
        device="cpu",
        batch_size="auto" if model == "streamline" else 4,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    rows = sorted(results["samples"]["words_choice"], key=lambda row: row["doc_id"])
    return [[score for ((score, _),) in row["resps"]] for row in rows]


def test_simple_evaluate_knows_both_classes(tiny_llama: Path, tasks: Path) -> None:
    from streamline_bench.harness.bridge import register

    register()
    expected = in_process("hf", str(tiny_llama), tasks)
    for ours, stock in zip(in_process("streamline", str(tiny_llama), tasks), expected, strict=True):
        assert ours == pytest.approx(stock, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["--model", "streamline", "--tasks", "t"], ["ours"]),
        (["run", "--tasks", "t", "--include_path", "mine"], ["ours", "mine"]),
        (["ls", "tasks"], ["ours"]),
        (["validate", "--tasks", "t", "--include_path=mine"], ["ours", "mine"]),
    ],
)
def test_our_own_command_adds_our_tasks_and_calls_the_harness(
    monkeypatch: pytest.MonkeyPatch, given: list[str], folders: list[str]
) -> None:
    from click.testing import CliRunner
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry

    from streamline_bench.cli.lists import lm_eval as command

    seen: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(HarnessCLI, "execute", lambda _, asked: seen.append(asked))
    done = CliRunner().invoke(command, given)
    assert done.exit_code == 0, done.output
    assert "streamline" in model_registry
    (asked,) = seen
    assert asked.command == (given[0] if given[0] in ("ls", "validate") else "run")
    ours, *own = asked.include_path
    assert ["ours", *own] == folders
    assert (Path(ours) / "paper").is_dir()
