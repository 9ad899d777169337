"""A run folder with quick jobs: compressing a tiny model by dropping layers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.runs.planning.plan import Plan
from streamline_bench.runs.planning.request import Request, make_request


@pytest.fixture
def make(tiny_llama: Path) -> Callable[..., Request]:
    """Return a function that makes a request for the tiny model; keywords change it."""

    def make_it(**changes: Any) -> Request:
        return make_request(
            {
                "model": str(tiny_llama),
                "recipes": ["dense", "first_layers", "last_layers"],
                "tasks": ["streamline_demo_pairs"],
                "set": {"n_layers": 2},
                "device": "cpu",
                **changes,
            }
        )

    return make_it


@pytest.fixture
def plan(make: Callable[..., Request]) -> Plan:
    """The plan of that request."""
    from streamline_bench.runs.planning.resolve import resolve_plan

    return resolve_plan(make())


@pytest.fixture
def tasks(tmp_path: Path, choice_task: Callable[[str, Path], str]) -> Path:
    """A folder with the task 'words': eight questions with two choices each."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = [
        {"question": f"w{i} w{i + 1}", "choices": ["w5", "w9 w4"], "gold": i % 2} for i in range(8)
    ]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "words.jsonl").write_text(lines, encoding="utf-8")
    task = choice_task("words", folder / "words.jsonl")
    (folder / "words.yaml").write_text(task, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def leaderboards(repository: Path) -> Any:
    """The module tests/benchmarks/compare_kill_resume.py, which compares leaderboards."""
    path = repository / "tests" / "benchmarks" / "compare_kill_resume.py"
    spec = importlib.util.spec_from_file_location("compare_kill_resume", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
