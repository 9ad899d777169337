"""Running OpenCompass: what is missing is noticed although it ends with exit code 0."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from streamline_bench.errors import MissingDependencyError, OpenCompassError
from streamline_bench.opencompass.execution import (
    Environment,
    inspect_environment,
    run_opencompass,
)

HERE = Environment(sys.executable, {}, 0)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PYTHONPATH with a stand-in for OpenCompass."""
    folder = tmp_path / "site"
    for package in ("opencompass", "opencompass/cli", "mmengine"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "torch.py").write_text(
        "class cuda:\n    device_count = staticmethod(lambda: 2)\n", encoding="utf-8"
    )
    source = Path(__file__).with_name("fake_opencompass.py")
    shutil.copy(source, folder / "opencompass" / "cli" / "main.py")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def run(tmp_path: Path, **options: bool) -> tuple[Path, list[str]]:
    config = tmp_path / "config.py"
    config.touch()
    return run_opencompass(HERE, config, tmp_path / "run", progress=False, **options)


def test_environment_with_and_without(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = inspect_environment(sys.executable)
    assert "streamline-bench" in environment.versions
    assert environment.gpus == 2
    shutil.rmtree(fake / "mmengine")
    (fake / "mmengine.py").write_text("")
    inspect_environment(sys.executable)
    with pytest.raises(MissingDependencyError, match="cannot be used"):
        inspect_environment(str(fake / "python"))


def test_missing_opencompass_comes_with_the_command(tmp_path: Path) -> None:
    python = tmp_path / "python"
    answer = json.dumps({"versions": {}, "missing": ["opencompass", "mmengine"], "gpus": 0})
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps opencompass=="):
        inspect_environment(str(python))
    python.write_text(f"#!/bin/sh\necho '{answer.replace('mmengine', 'streamline_bench')}'\n")
    with pytest.raises(MissingDependencyError, match="lacks streamline-bench"):
        inspect_environment(str(python))


def test_a_run_that_is_whole(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    found, command = run(tmp_path, in_process=True)
    assert found == tmp_path / "run" / "work" / "20300101_000000"
    assert command[1:3] == ["-m", "opencompass.cli.main"]
    assert command[-1] == "--debug"
    log = (tmp_path / "run" / "opencompass.log").read_text()
    assert "started in scratch debug True" in log
    assert (tmp_path / "run" / "scratch" / "data").resolve() == tmp_path / "data"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no predictions", r"no predictions of model 'pruned' on 'two': ValueError: infer broke"),
        ("no results", r"no results of model 'pruned' on 'two': ValueError: eval broke"),
        ("error", r"could not evaluate model 'dense' on 'one' \(no pen\)"),
        ("start", r"did not start: ModuleNotFoundError: No module named 'zebra'; see .*\.log"),
    ],
)
def test_what_is_missing_is_named(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, sentence: str
) -> None:
    monkeypatch.setenv("FAKE", fault)
    with pytest.raises(OpenCompassError, match=sentence):
        run(tmp_path)


def test_the_same_command_goes_on_and_half_written_files_are_made_again(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = run(tmp_path)
    half = found / "predictions" / "pruned" / "one.json"
    half.write_text(half.read_text()[:9])
    monkeypatch.setenv("ROUND", "2")
    _, command = run(tmp_path)
    assert command[-2:] == ["-r", "20300101_000000"]

    def made(kind: str, name: str) -> str:
        text = (found / kind / "pruned" / f"{name}.json").read_text()
        return str(json.loads(text)["0"]["made"])

    assert (made("predictions", "one"), made("results", "one")) == ("2", "2")
    assert (made("predictions", "two"), made("results", "two")) == ("1", "1")


def test_an_interrupt_ends_opencompass_too(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamline_bench.opencompass import execution

    monkeypatch.setenv("FAKE", "sleep")
    children: list[psutil.Process] = []

    def interrupt(seconds: float) -> None:
        children.extend(_with_task(psutil.Process(os.getpid())))
        raise KeyboardInterrupt

    # Of that module only: ending a process sleeps as well.
    monkeypatch.setattr(execution, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert gone and not alive


STARTER = """
import sys
from pathlib import Path
from streamline_bench.opencompass.execution import Environment, run_opencompass
folder = Path(sys.argv[1])
run_opencompass(Environment(sys.executable, {}, 0), folder / "c.py", folder, progress=False)
"""


def test_opencompass_does_not_outlive_who_started_it(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kill -9, too: else it would write on into a folder that the next run takes."""
    monkeypatch.setenv("FAKE", "sleep")
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path)])
    children = _with_task(psutil.Process(starter.pid))
    starter.kill()
    starter.wait()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 2 and not alive


def _with_task(starter: psutil.Process) -> list[psutil.Process]:
    """OpenCompass and its task, once both run."""
    until = time.monotonic() + 60
    found: list[psutil.Process] = []
    while len(found) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        found = starter.children(recursive=True)
    return found
