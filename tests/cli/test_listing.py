"""``recipes`` and ``tasks`` list what the package brings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def test_recipes_lists_every_file_with_its_cost(call: Callable[..., Any], repository: Path) -> None:
    ended = call("recipes", "--json")
    assert ended.code == 0, ended.err
    listed = {row["name"]: row["cost"] for row in json.loads(ended.out)}
    assert set(listed) == {path.stem for path in (repository / "baselines").glob("*.yaml")}
    assert listed["dense"] == "no training"
    assert listed["streamline"] == "recovered"


def test_recipe_file_name_is_its_name(repository: Path) -> None:
    for path in (repository / "baselines").glob("*.yaml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == path.stem


def test_published_numbers_carry_their_source(call: Callable[..., Any]) -> None:
    rows = json.loads(call("recipes", "--json").out)
    published = [number for row in rows for number in row["published"]]
    assert len(published) >= 8
    assert all(number["source"] and number["model"] for number in published)


def test_show_one_recipe_as_yaml_that_loads_again(call: Callable[..., Any], tmp_path: Path) -> None:
    shown = call("recipes", "streamline_ffn").out
    path = tmp_path / "mine.yaml"
    path.write_text(shown, encoding="utf-8")
    assert json.loads(call("recipes", path, "--json").out)["replacement"]["kind"] == "ffn"


def test_tasks_lists_the_bundled_group(call: Callable[..., Any]) -> None:
    rows = json.loads(call("tasks", "--json").out)
    kinds = {row["name"]: row["kind"] for row in rows}
    assert kinds["streamline_demo"] == "group"
    assert sum(name.startswith("streamline_demo_") for name in kinds) >= 7


def test_tasks_path_is_a_folder(call: Callable[..., Any]) -> None:
    assert Path(call("tasks", "--path").out.strip()).is_dir()
