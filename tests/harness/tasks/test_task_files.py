"""What tasks ask is part of the key: their files, and the data that their configuration names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.harness.tasks.task_files import data_files, tasks_sha256
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan


def _named(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> list[str]:
    return sorted(data_files([config], environment or {}).values())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with some data files."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.parquet", "b.parquet", "c.csv", "sub/d.txt", ".hidden"):
        (folder / name).write_text(name, encoding="utf-8")
    return folder


def test_files_that_configurations_name(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(value: Any) -> list[str]:
        return _named({"dataset_path": "parquet", "dataset_kwargs": {"data_files": value}})

    assert files(str(data / "a.parquet")) == ["a.parquet"]
    assert files({"test": [str(data / "c.csv")], "train": str(data / "a.parquet")}) == [
        "a.parquet",
        "c.csv",
    ]
    assert files(str(data / "*.parquet")) == ["a.parquet", "b.parquet"]
    assert files("https://example.org/a.parquet") == []
    everything = ["a.parquet", "b.parquet", "c.csv", "sub/d.txt"]
    assert _named({"dataset_path": str(data)}) == everything
    assert _named({"dataset_path": "csv", "dataset_kwargs": {"data_dir": str(data)}}) == everything
    (data / "json").mkdir()
    (data / "json" / "e.txt").write_text("not what load_dataset('json') reads", encoding="utf-8")
    monkeypatch.chdir(data)
    assert _named({"dataset_path": "json"}) == []
    assert _named({"dataset_path": "sub"}) == ["d.txt"]


def test_files_that_own_code_is_told(data: Path) -> None:
    config = {"custom_dataset": "load", "dataset_kwargs": {"file": "sub/d.txt", "subset": "sub"}}
    assert _named(config) == []
    assert _named(config, {"STREAMLINE_BENCH_DATA": str(data)}) == ["d.txt"]
    assert _named(config, {"STREAMLINE_BENCH_DATA": str(data.parent)}) == ["d.txt"]
    other = {"custom_dataset": "load", "dataset_kwargs": {"file": "$MY_DATA/c.csv"}}
    assert _named(other, {"MY_DATA": str(data)}) == ["c.csv"]


def test_only_content_and_names_count(data: Path, tmp_path: Path) -> None:
    def key() -> str:
        return tasks_sha256([data], [], {})

    first = key()
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    assert tasks_sha256([moved], [], {}) == first
    (data / ".hidden").write_text("changed", encoding="utf-8")
    (data / "__pycache__").mkdir()
    (data / "__pycache__" / "x.pyc").write_text("compiled", encoding="utf-8")
    # A run folder beside the tasks, as --include-path . leaves it.
    (data / "run" / "jobs").mkdir(parents=True)
    (data / "run" / "plan.yaml").write_text("title: x\n", encoding="utf-8")
    assert key() == first
    for name in ("a.parquet", "sub/d.txt"):
        (data / name).write_text("changed", encoding="utf-8")
        assert key() != first
        first = key()


def test_changed_data_elsewhere_is_another_plan(
    make: Callable[..., Request], tasks: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    shutil.move(tasks / "words.jsonl", elsewhere)
    yaml = (tasks / "words.yaml").read_text(encoding="utf-8")
    (tasks / "words.yaml").write_text(
        yaml.replace(str(tasks / "words.jsonl"), str(elsewhere)), encoding="utf-8"
    )
    (tasks / "_all.yaml").write_text("group: all_words\ntask: [words]\n", encoding="utf-8")

    def key(*names: str) -> str:
        request = make(tasks=list(names), include_path=str(tasks))
        return resolve_plan(request).evaluation.tasks_sha256

    asked = [("words",), ("all_words",), ("wor*",), (str(tasks / "words.yaml"),)]
    before = [key(*names) for names in asked]
    packaged = key("streamline_demo_pairs")
    text = elsewhere.read_text(encoding="utf-8")
    elsewhere.write_text(text.replace("w9 w4", "w9 w8"), encoding="utf-8")
    assert all(key(*names) != old for names, old in zip(asked, before, strict=True))
    assert key("streamline_demo_pairs") == packaged  # which reads none of it
