"""Imports run one way, and the command line starts without the heavy packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LEVELS = {
    "errors": 0,
    "resources": 1,
    "core": 1,
    "modeling": 2,
    "methods": 3,
    "stability": 3,
    "throughput": 3,
    "harness": 4,
    "report": 4,
    "opencompass": 5,
    "runs": 5,
    "gate": 5,
    "demo": 6,
    "pytest_plugin": 6,
    "cli": 7,
}
"""A package may import from its own level only itself, and from lower levels anything."""

HEAVY = ("torch", "transformers", "lm_eval", "pandas", "scipy", "datasets", "plotly", "numpy")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith("streamline_bench.")}


def test_imports_flow_one_way(repository: Path) -> None:
    package = repository / "streamline_bench"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        owner = path.relative_to(package).parts[0].removesuffix(".py")
        if owner not in LEVELS:
            continue
        for name in _imports(path):
            target = name.split(".")[1]
            if target in LEVELS and target != owner and LEVELS[target] >= LEVELS[owner]:
                wrong.append(f"{path.relative_to(package)} imports {name}")
    assert wrong == []


def test_every_package_has_a_level(repository: Path) -> None:
    package = repository / "streamline_bench"
    folders = {p.name for p in package.iterdir() if (p / "__init__.py").exists()}
    assert folders <= set(LEVELS)


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
