"""The plans that come along leave no recipe out by oversight."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.compression.recipes import list_recipes, load_recipe
from streamline_bench.runs.planning.request import make_request, read_request
from streamline_bench.runs.planning.rows import resolve_rows


@pytest.mark.parametrize(
    "plan", ["bundled", "stories260k", "stories260k_half", "stories260k_benchmarks"]
)
def test_every_recipe_is_in_the_plan_but_those_with_a_papers_settings(
    plan: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    rows = resolve_rows(make_request({"tasks": ["any"], **read_request(plan)}))
    assert rows[0].is_dense
    labels = [row.label for row in rows]
    assert sorted(labels) == sorted(
        name for name in list_recipes() if not load_recipe(name).paper_settings
    )
