"""A user's YAML file is a mapping, or refused in one sentence that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.core.files import read_yaml_mapping
from streamline_bench.errors import RecipeError

EXPECTED = "a plan: it must hold a mapping"


def test_a_mapping_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("tasks: [piqa]\nlimit: 4\n")
    assert read_yaml_mapping(path, EXPECTED) == {"tasks": ["piqa"], "limit": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [("- piqa\n", r"is not a plan: it must hold a mapping\.$"), ("a: [1\n", "cannot be read as")],
)
def test_anything_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_yaml_mapping(path, EXPECTED)


@pytest.mark.parametrize("text", ["limit: 3\nlimit: 5\n", "set: {n_layers: 2, n_layers: 3}\n"])
def test_a_key_that_stands_twice_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"plan\.yaml.*'(limit|n_layers)' stands twice"):
        read_yaml_mapping(path, EXPECTED)


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", encoding="utf-8")
    assert read_yaml_mapping(path, EXPECTED)["b"] == {"x": 1, "y": 3}
