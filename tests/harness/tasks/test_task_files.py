"""What tasks ask is part of the key: their files, and the data that their configuration names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import EvaluationError
from streamline_bench.harness.tasks.task_files import check_tasks, data_files, tasks_sha256


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


def test_a_task_name_that_cannot_name_a_file_is_refused(tmp_path: Path) -> None:
    """The harness writes ``samples_TASK_DATE.jsonl`` after all the work is done."""
    longest = 255 - len("samples__2026-11-29T16-49-33.123456.jsonl")
    for name in ("t" * longest, "é" * (longest // 2)):
        check_tasks({name: {}}, {})
        (tmp_path / f"samples_{name}_2026-11-29T16-49-33.123456.jsonl").touch()
    for name in ("t" * (longest + 3), "é" * (longest // 2 + 2)):
        over = len(name.encode()) - longest
        with pytest.raises(EvaluationError, match=f"{over} bytes too long.*at most {longest}"):
            check_tasks({name: {}}, {})
        with pytest.raises(OSError, match="too long"):
            (tmp_path / f"samples_{name}_2026-11-29T16-49-33.123456.jsonl").touch()
