"""The line that every interpreter runs, and the registration behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

PTH = "streamline_bench_lm_eval.pth"
HEAVY = ("torch", "transformers", "lm_eval", "pydantic", "numpy", "click", "yaml")


def run(*arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def line(repository: Path) -> str:
    text = (repository / "streamline_bench" / "harness" / PTH).read_text()
    assert text.startswith("import ")  # Anything else would be taken for a folder.
    assert len(text.splitlines()) == 1
    return text


@pytest.fixture(scope="module")
def installed() -> None:
    try:
        files = metadata.distribution("streamline-bench").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("streamline-bench is not installed in this environment (pip install -e .)")
    assert any(file.name == PTH for file in files)


@pytest.mark.usefixtures("installed")
def test_every_start_watches_for_the_harness_and_imports_nothing_heavy() -> None:
    program = (
        "import sys, json; print(json.dumps([sorted({m.split('.')[0] for m in sys.modules}),"
        " [type(f).__module__ for f in sys.meta_path]]))"
    )
    for flags in ([], ["-I"]):
        modules, finders = json.loads(run(*flags, "-c", program))
        assert "streamline_bench.harness.bridge" in finders
        assert not set(HEAVY) & set(modules)


@pytest.mark.usefixtures("installed")
def test_the_harness_knows_our_model_and_still_knows_its_own() -> None:
    program = (
        "import sys, json, lm_eval.models; from lm_eval.api.registry import model_registry as r\n"
        "print(json.dumps(['hf' in r, r._objs['streamline'], 'torch' in sys.modules,"
        " [type(f).__module__ for f in sys.meta_path]]))"
    )
    knows_hf, target, torch_imported, finders = json.loads(run("-I", "-c", program))
    assert knows_hf
    assert target == "streamline_bench.harness.lm:StreamlineLM"
    assert not torch_imported
    assert "streamline_bench.harness.bridge" not in finders


def test_the_line_is_silent_when_the_package_is_gone(line: str) -> None:
    assert run("-I", "-S", "-c", line) == ""


@pytest.mark.parametrize(
    ("arguments", "watches"),
    [
        (["/x/bin/streamline-bench", "compress"], False),
        (["-m", "streamline_bench", "compress"], False),
        (["/x/bin/lm_eval", "run"], True),
        (["-m", "lm_eval", "run"], True),
        (["/x/streamline-bench/evaluate.py", "--model"], True),
        (["-m", "streamline_bench.core.machine.processes", "streamline_bench.harness.trunk"], True),
    ],
)
def test_commands_of_ours_start_without_the_bridge(
    line: str, repository: Path, arguments: list[str], watches: bool
) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(repository)!r})\n"
        f"sys.orig_argv[1:] = {arguments!r}\n{line}\n"
        "print('streamline_bench.harness.bridge' in sys.modules)"
    )
    assert run("-I", "-S", "-c", program).strip() == str(watches)


def fake_harness(folder: Path, registry: str) -> None:
    """A package named lm_eval with a registry and no models."""
    for package in ("", "api", "models"):
        (folder / "lm_eval" / package).mkdir(parents=True, exist_ok=True)
        (folder / "lm_eval" / package / "__init__.py").write_text("")
    (folder / "lm_eval" / "api" / "registry.py").write_text(registry)


REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target
model_registry = Registry()
"""
DISCOVERY = """
def discover():
    from importlib.metadata import entry_points
    for point in entry_points(group="lm_eval.models"):
        model_registry.register(point.name, point)
"""


@pytest.mark.parametrize(("source", "ours"), [(REGISTRY, True), (REGISTRY + DISCOVERY, False)])
def test_a_harness_with_discovery_of_its_own_is_left_alone(
    tmp_path: Path, line: str, repository: Path, source: str, ours: bool
) -> None:
    fake_harness(tmp_path, source)
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(repository)!r}]\n{line}\n"
        "import lm_eval.models; from lm_eval.api.registry import model_registry\n"
        "print('streamline' in model_registry)"
    )
    assert run("-I", "-S", "-c", program).strip() == str(ours)


def test_a_registry_of_another_make_does_not_stop_the_harness(
    tmp_path: Path, line: str, repository: Path
) -> None:
    fake_harness(tmp_path, "nothing = 'known'\n")
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(repository)!r}]\n{line}\n"
        "import lm_eval.models; print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "alive"
    assert "could not register" in done.stderr
