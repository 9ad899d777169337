"""Imports run one way, and the command line starts without the heavy packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

LEVELS = {
    "errors": 0,
    "version": 0,
    "core": 2,
    "modeling": 3,
    "methods": 4,
    "stability": 4,
    "throughput": 4,
    "compression": 5,
    "harness": 6,
    "report": 6,
    "divergence": 7,
    "opencompass": 8,
    "runs": 8,
    "gate": 8,
    "demo": 9,
    "pytest_plugin": 9,
    "cli": 10,
    "__main__": 11,
}
"""A package may import from its own level only itself, and from lower levels anything."""

HEAVY = ("torch", "transformers", "lm_eval", "pandas", "scipy", "datasets", "plotly", "numpy")


_NAME = re.compile(r"streamline_bench\.(\w+)[\w.]*(:\w*)?")


def _imports(path: Path, package: Path) -> set[str]:
    """Top-level modules of the package that a file names in an import or, to load it, as text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            # "from streamline_bench import core"; other names are those of the package itself.
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # import_module("streamline_bench.core"), the beginning of an f-string, "module:Class"
            found.add(node.value)
    tops = {match[1] for name in found if (match := _NAME.fullmatch(name))}
    return {top for top in tops if (package / top).is_dir() or (package / f"{top}.py").exists()}


def test_imports_flow_one_way(repository: Path) -> None:
    package = repository / "streamline_bench"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        owner = path.relative_to(package).parts[0].removesuffix(".py")
        if owner == "__init__":
            continue  # the front door names what is above it, and loads it on first use
        for target in _imports(path, package) - {owner}:
            if LEVELS[target] >= LEVELS[owner]:
                wrong.append(f"{path.relative_to(package)} imports {target}")
    assert wrong == []


def test_every_top_level_module_has_a_level(repository: Path) -> None:
    package = repository / "streamline_bench"
    modules = {path.relative_to(package).parts[0].removesuffix(".py")
               for path in package.rglob("*.py")}  # fmt: skip
    assert modules - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize(
    "source",
    [
        "import streamline_bench.cli.main",
        "from streamline_bench.cli import main",
        "from streamline_bench import cli",
        "def f():\n    from streamline_bench import cli as other",
        "importlib.import_module('streamline_bench.cli.main')",
        "importlib.import_module(f'streamline_bench.cli.{name}')",
        "WHERE = {'main': 'streamline_bench.cli.main:main'}",
    ],
)
def test_every_way_of_importing_is_seen(source: str, tmp_path: Path, repository: Path) -> None:
    (tmp_path / "x.py").write_text(source)
    assert _imports(tmp_path / "x.py", repository / "streamline_bench") == {"cli"}


def test_the_front_door_loads_nothing(repository: Path) -> None:
    code = "import sys, streamline_bench; print([m for m in sys.modules if 'streamline_b' in m])"
    # Without site-packages, of which the .pth file loads the bridge to the harness.
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(repository)},
    ).stdout  # fmt: skip
    assert ast.literal_eval(shown) == ["streamline_bench.version", "streamline_bench"]


@pytest.mark.parametrize(
    "module",
    ["streamline_bench", "streamline_bench.cli.main", "streamline_bench.methods"],
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "[]"


def test_help_of_every_command_imports_nothing_heavy() -> None:
    from streamline_bench.cli.main import COMMANDS

    code = (
        "import sys\nfrom click.testing import CliRunner\n"
        "from streamline_bench.cli.main import COMMANDS, cli\n"
        # lm-eval hands --help on to the harness.
        "for name in set(COMMANDS) - {'lm-eval'}:\n"
        "    result = CliRunner().invoke(cli, [name, '--help'])\n"
        "    assert result.exit_code == 0, (name, result.output)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert len(COMMANDS) >= 8
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
