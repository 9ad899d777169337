"""The plans that come along leave no recipe out by oversight."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.compression.recipes import list_recipes, load_recipe
from streamline_bench.runs.planning.request import make_request, read_request
from streamline_bench.runs.planning.rows import resolve_rows


@pytest.mark.parametrize("plan", ["bundled", "stories260k", "stories260k_half"])
def test_every_recipe_is_in_the_plan_but_those_with_a_papers_settings(
    plan: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    rows = resolve_rows(make_request({"tasks": ["any"], **read_request(plan)}))
    assert rows[0].is_dense
    labels = [row.label for row in rows]
    recipes = [load_recipe(name) for name in list_recipes()]
    assert sorted(labels) == sorted(
        recipe.name for recipe in recipes if not (recipe.paper_settings or recipe.mixtures_only)
    )


def test_the_plan_of_generation_asks_in_both_forms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from streamline_bench.core.machine.environment import resource

    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    request = make_request(read_request("generation"))
    rows = [row.label for row in resolve_rows(request)]
    assert rows[0] == "dense" and {"last_layers", "streamline", "llm_pruner"} <= set(rows)
    folder = resource("tasks") / "lm_eval" / "local"
    tasks = {task: (folder / f"{task}.yaml").read_text("utf-8") for task in request.task_names}
    pairs = {
        task: line.split()[-1]
        for task, text in tasks.items()
        for line in text.splitlines()
        if "same_questions_as" in line
    }
    assert len(pairs) == 2 and set(pairs.values()) <= set(tasks)


def test_the_plans_of_a_real_model_compare_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    hub, local = (make_request(read_request(name)) for name in ("smollm2", "smollm2_local"))
    assert [f"local_{task}" for task in hub.task_names[:6]] == list(local.task_names)
    every, first = resolve_rows(hub), resolve_rows(local)
    assert {row.group or row.label for row in every} == {row.group or row.label for row in first}
    assert len(first) == 25
    sizes_board = resolve_rows(make_request(read_request("smollm2_sizes")))
    assert {row.group or row.label for row in sizes_board} <= {
        row.group or row.label for row in first
    }

    def values(group: str) -> set[tuple[object, ...]]:
        axes = [row.axes for row in every if row.group == group]
        return {tuple(each.get(axis) for axis in ("sparsity", "seed", "calibration"))
                for each in axes}  # fmt: skip

    sizes, texts = (0.125, 0.25, 0.375, 0.5), hub.overrides["calibration"]
    assert values("last_layers") == {(size, None, None) for size in sizes}
    assert values("random_layers") == {(size, seed, None) for size in sizes for seed in range(3)}
    assert values("shortgpt") == {(size, None, text) for size in sizes for text in texts}
    assert values("streamline") == {
        (size, seed, text) for size in sizes for seed in (0, 1) for text in texts
    }
