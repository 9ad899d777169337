"""The plans that come along leave no recipe out by oversight."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.compression.recipes import list_recipes
from streamline_bench.runs.planning.request import read_request

PAPERS_OWN = {"llm_pruner_paper", "slicegpt_paper", "streamline_paper"}
"""Their papers' calibration data or ratio are part of what they reproduce."""


@pytest.mark.parametrize(
    "plan", ["bundled", "stories260k", "stories260k_half", "stories260k_benchmarks"]
)
def test_every_recipe_is_in_the_plan(
    plan: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    rows = [row if isinstance(row, str) else row["recipe"] for row in read_request(plan)["recipes"]]
    assert len(rows) == len(set(rows))
    assert set(rows) == set(list_recipes()) - PAPERS_OWN
