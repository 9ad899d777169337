"""One tree of errors, in one file, as its docstring draws it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from streamline_bench import errors
from streamline_bench.core.machine.environment import resource
from streamline_bench.errors import InstallationError, StreamlineBenchError


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = re.findall(r"^[ │├└─]*(\w+Error)\b", str(errors.__doc__), re.MULTILINE)
    defined = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert sorted(drawn) == sorted(defined)
    assert all(issubclass(getattr(errors, name), StreamlineBenchError) for name in defined)


def test_no_other_module_has_errors_of_users(repository: Path) -> None:
    found = []
    ours = {name for name in vars(errors) if name.endswith("Error")}
    for path in sorted((repository / "streamline_bench").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bases = {ast.unparse(base).split(".")[-1] for base in getattr(node, "bases", [])}
            if bases & ours and path.name != "errors.py":
                found.append(f"{path.name}: {getattr(node, 'name', '')}")
    assert found == []


def test_missing_data_is_an_error_of_the_tree() -> None:
    assert (resource("baselines") / "streamline.yaml").is_file()
    with pytest.raises(InstallationError, match=r"'no such folder' .* reinstall the package"):
        resource("no such folder")
