"""The line that every interpreter runs, and the registration behind it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from streamline_bench.harness.bridge import MODELS

PTH = "streamline_bench_lm_eval.pth"
HEAVY = ("torch", "transformers", "lm_eval", "pydantic", "numpy", "click", "yaml")


def said_while_importing(module: str, folders: list[Path], line: str) -> str:
    """Import a module behind the line of the .pth, which must not stop it; return the warnings."""
    program = (
        f"import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}\n{line}\n"
        f"import {module}; print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "alive"
    return done.stderr


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
        "import sys, json, lm_eval.models, lm_eval.tasks\n"
        "from lm_eval.api.registry import model_registry as r\n"
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


MANAGER = """
class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True):
        self.folders = include_path
"""
TASK_DISCOVERY = """
from importlib.metadata import entry_points
def discover_plugin_task_paths():
    return [point.value for point in entry_points(group="lm_eval.tasks")]
"""


def fake_harness(folder: Path, registry: str, manager: str = MANAGER) -> None:
    """A package named lm_eval with a registry, a manager of tasks, and nothing in them."""
    for package in ("", "api", "models", "tasks"):
        (folder / "lm_eval" / package).mkdir(parents=True, exist_ok=True)
        (folder / "lm_eval" / package / "__init__.py").write_text("")
    (folder / "lm_eval" / "api" / "registry.py").write_text(registry)
    (folder / "lm_eval" / "tasks" / "manager.py").write_text(manager)


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


@pytest.mark.parametrize(("source", "ours"), [(MANAGER, True), (MANAGER + TASK_DISCOVERY, False)])
def test_our_tasks_are_added_where_the_harness_does_not_find_them(
    tmp_path: Path, line: str, repository: Path, source: str, ours: bool
) -> None:
    fake_harness(tmp_path, REGISTRY, source)
    program = (
        f"import sys, json; sys.path[:0] = [{str(tmp_path)!r}, {str(repository)!r}]\n{line}\n"
        "import lm_eval.models; from lm_eval.tasks.manager import TaskManager as T\n"
        f"own = {str(repository / 'tasks' / 'lm_eval')!r}\n"
        "given = [T(), T(None, 'x'), T(include_path=['x', 'y']), T(include_path=[own, 'x'])]\n"
        "print(json.dumps([[str(f) for f in t.folders or ()] for t in given]))\n"
        "print([type(f).__name__ for f in sys.meta_path if 'bridge' in type(f).__module__])"
    )
    first, finders = run("-I", "-S", "-c", program).splitlines()
    own = str(repository / "tasks" / "lm_eval")
    assert json.loads(first) == (
        [[own], [own, "x"], [own, "x", "y"], [own, "x"]]
        if ours
        else [[], ["x"], ["x", "y"], [own, "x"]]
    )
    assert finders == "[]"


def test_a_manager_of_another_make_does_not_stop_the_harness(
    tmp_path: Path, line: str, repository: Path
) -> None:
    fake_harness(tmp_path, REGISTRY, "nothing = 'known'\n")
    said = said_while_importing("lm_eval.tasks.manager", [tmp_path, repository], line)
    assert "could not register its lm-eval tasks" in said


def test_the_entry_point_of_the_tasks_leads_to_their_folder(repository: Path) -> None:
    """As the harness looks for it: without importing what it names."""
    points = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["lm_eval.models"] == MODELS
    (value,) = points["lm_eval.tasks"].values()
    spec = importlib.util.find_spec(value)
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    assert Path(folder).resolve() == repository / "tasks" / "lm_eval"


@pytest.mark.usefixtures("installed")
def test_the_stock_harness_finds_our_tasks_once() -> None:
    program = (
        "import logging; logging.basicConfig(level='WARNING')\n"
        "from lm_eval.tasks import TaskManager\n"
        "from streamline_bench.core.machine.environment import resource\n"
        "for given in (None, str(resource('tasks') / 'lm_eval')):\n"
        "    known = TaskManager(include_path=given, include_defaults=False).all_tasks\n"
        "    print('streamline_demo' in known, 'streamline_race_high' in known)"
    )
    assert run("-I", "-c", program).split() == ["True"] * 4


CHECKOUTS = [each for each in os.environ.get("STREAMLINE_BENCH_LM_EVAL", "").split(":") if each]


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.skipif(not CHECKOUTS, reason="STREAMLINE_BENCH_LM_EVAL names no checkout of lm-eval")
@pytest.mark.parametrize("checkout", CHECKOUTS or [""])
def test_snapshots_of_the_harness_answer_our_tasks_with_our_model(
    checkout: str, tmp_path: Path
) -> None:
    """Of its main branch, or of what is proposed for it: ours are found, once, by either side."""
    discovers = [
        "entry_points(" in (Path(checkout) / "lm_eval" / name).read_text()
        for name in ("api/registry.py", "tasks/manager.py")
    ]
    program = (
        "import json, sys, logging; logging.basicConfig(level='WARNING')\n"
        "import lm_eval, lm_eval.models\n"
        "from lm_eval.tasks import manager\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        "by_us = isinstance(model_registry._objs.get('streamline'), str)\n"
        "print(json.dumps([lm_eval.__file__, hasattr(manager.TaskManager.__init__, '__wrapped__'),"
        " by_us, get_model('streamline').__name__,"
        " 'streamline_demo' in manager.TaskManager(include_defaults=False).all_tasks]))"
    )
    environment = {**os.environ, "PYTHONPATH": checkout, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    file, tasks_by_us, model_by_us, model, known = json.loads(done.stdout)
    assert Path(file).is_relative_to(checkout)
    assert (model, known) == ("StreamlineLM", True)
    assert [not model_by_us, not tasks_by_us] == discovers
    assert "overrides" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "streamline", "--model_args",
         "pretrained=bundled", "--tasks", "streamline_demo_story", "--limit", "2",
         "--device", "cpu", "--log_samples", "--output_path", str(tmp_path)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.rglob("samples_streamline_demo_story_*.jsonl"))) == 1


def test_a_registry_of_another_make_does_not_stop_the_harness(
    tmp_path: Path, line: str, repository: Path
) -> None:
    fake_harness(tmp_path, "nothing = 'known'\n")
    said = said_while_importing("lm_eval.models", [tmp_path, repository], line)
    assert "could not register" in said
