"""Environments go where that was asked for and the disk is short, and only then."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def make_room() -> ModuleType:
    path = Path(__file__).parent / "make_room.py"
    spec = importlib.util.spec_from_file_location("make_room", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    for file in ("bin/python", "lib/site.py", "tmp/run/leaderboard.html", "log/1.log"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    (tmp_path / "lib64").symlink_to("lib")
    (tmp_path / ".tox-info.json").write_text("{}")
    return tmp_path


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("wanted", "free", "kept"), [("10", 9, False), ("10", 11, True), (None, 9, True), ("", 9, True)]
)
def test_packages_go_only_when_asked_for_and_the_disk_is_short(
    make_room: ModuleType,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: str | None,
    free: int,
    kept: bool,
) -> None:
    monkeypatch.delenv("STREAMLINE_BENCH_MAKE_ROOM", raising=False)
    if wanted is not None:
        monkeypatch.setenv("STREAMLINE_BENCH_MAKE_ROOM", wanted)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free * 2**30))
    before = _left(environment)
    make_room.main(environment)
    assert _left(environment) == (before if kept else {"tmp", "log"})
    assert ("9.0 GiB of disk were left" in capsys.readouterr().out) is not kept
    assert (environment / "tmp/run/leaderboard.html").exists()
