"""``recipes`` and ``tasks`` list what the package brings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamline_bench.methods.base import get_method


def test_recipes_lists_every_file_with_its_cost(call: Callable[..., Any], repository: Path) -> None:
    ended = call("recipes", "--json")
    assert ended.code == 0, ended.err
    listed = {row["name"]: row["cost"] for row in json.loads(ended.out)}
    assert {path.stem for path in (repository / "baselines").glob("*.yaml")} <= set(listed)
    assert listed["dense"] == "no training"
    assert listed["streamline"] == "recovered"


def test_recipe_file_name_is_its_name(repository: Path) -> None:
    for path in (repository / "baselines").glob("*.yaml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == path.stem


@pytest.fixture
def recipes(call: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(call("recipes", "--json").out)}


def test_every_recipe_says_what_it_is_and_what_it_reproduces(
    recipes: dict[str, dict[str, Any]],
) -> None:
    for name, row in recipes.items():
        assert row["title"] and (row["reproduces"] or "").endswith("."), name
        cited = (row["paper"] is not None, row["link"] is not None)
        assert cited in ((False, False), (True, True)), name
        if row["link"]:
            number = row["link"].rsplit("/", 1)[-1]
            assert row["link"].startswith("https://arxiv.org/abs/") and number in row["paper"], name
    titles = [row["title"] for row in recipes.values()]
    assert len(set(titles)) == len(titles)


def test_every_recipe_gives_its_parameters(repository: Path) -> None:
    for path in (repository / "baselines").glob("*.yaml"):
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        method = get_method(written["method"])
        options = bool(method.parameters.model_fields) or "replacement" in method.reads
        given = bool(written.get("parameters") or written.get("replacement"))
        assert given == options, path
        own = written.get("parameters", {})
        size = (written.get("sparsity"), own.get("slicing"), own.get("ratio"))
        assert any(size) == (written["method"] != "dense"), path


def test_published_numbers_are_whole_and_carry_their_source(
    recipes: dict[str, dict[str, Any]],
) -> None:
    for name, row in recipes.items():
        assert bool(row["published"]) != bool(row["unpublished"]), name
        for number in row["published"]:
            told = f"{name}: {number}"
            assert number["source"] and number["model"] and number["metric"], told
            perplexity = "perplexity" in number["metric"]
            assert number["unit"] == ("perplexity" if perplexity else "%"), told
            assert 0 < number["value"] <= (100 if number["unit"] == "%" else math.inf), told
            assert 0 < (number["sparsity"] or 0.5) < 0.5 + 1e-9, told
            noted = "notes" in number["source"] or "quoted by others" in number["source"]
            assert noted == number["source"].startswith("second hand, "), told
        named = [(n["model"], n["metric"], n["value"], n["source"]) for n in row["published"]]
        assert len(set(named)) == len(named), name


@pytest.mark.parametrize(
    ("recipe", "model", "metric", "value"),
    [
        ("llm_pruner", "Llama-2-7B", "average of 13", 34.78),
        ("llm_pruner", "Llama-2-13B", "average of 13", 38.97),
        ("llm_pruner", "Llama-3-8B", "WikiText-2 perplexity at 2048", 34.13),
        ("shortgpt", "Llama-3.1-8B-Instruct", "average of 8 after fine-tuning", 40.8),
        ("shortgpt", "Llama-2-7B", "average of 9", 60.59),
        ("uidl", "Llama-2-7B", "retained average", 90.3),
        ("uidl", "Llama-3-8B-Instruct", "retained average", 89.5),
        ("laco", "Llama-2-7B", "retained average", 80.28),
        ("laco", "Llama-2-13B", "retained average", 85.21),
        ("laco", "Llama-2-13B", "WikiText perplexity", 13.93),
        ("last_layers_partial", "Llama-3-8B", "average of 8 tasks (acc)", 56.33),
        ("linear_patch", "Llama-3-8B", "retained average", 94.15),
        ("ridge_map", "Llama-3-8B", "average of 9", 60.1),
        ("sleb", "Llama-2-7B", "zero-shot average", 56.8),
        ("streamline", "Qwen3-8B", "average of 7", 50.49),
        ("streamline_lm", "Llama-2-7B to 4.7B", "ARC-e", 64.6),
        ("streamline_two_layers", "Llama-3.1-8B to 5.4B", "ARC-e", 72.2),
    ],
)
def test_numbers_of_papers_and_re_runs(
    recipes: dict[str, dict[str, Any]], recipe: str, model: str, metric: str, value: float
) -> None:
    numbers = [(n["model"], n["metric"], n["value"]) for n in recipes[recipe]["published"]]
    assert (model, metric, value) in numbers


def test_published_numbers_stand_beside_the_tasks_of_a_packaged_plan(
    recipes: dict[str, dict[str, Any]], repository: Path
) -> None:
    from streamline_bench.report.provenance import published_numbers
    from streamline_bench.stability.estimate import Estimate

    plan = yaml.safe_load((repository / "reports" / "plans" / "smollm2_local.yaml").read_text())
    accuracies = {task: Estimate(value=0.5) for task in plan["tasks"]}
    found: dict[str, set[str]] = {}
    for name in recipes:
        for one in published_numbers(recipes[name], accuracies):
            if one.task:
                found.setdefault(one.metric, set()).add(one.task)
    assert found == {
        "PIQA": {"local_piqa"}, "HellaSwag": {"local_hellaswag"}, "ARC-e": {"local_arc_easy"},
        "ARC-easy": {"local_arc_easy"},
        "BoolQ": {"local_boolq"}, "OpenBookQA": {"local_openbookqa"},
    }  # fmt: skip


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
    idle = call("tasks", "--path", "--json")
    assert idle.code == 2 and "--json has no effect" in idle.err
