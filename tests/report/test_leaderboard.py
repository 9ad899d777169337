"""The published JSON Schema is the one of the code, and says what it must."""

from __future__ import annotations

import json
from pathlib import Path

from streamline_bench.report.leaderboard import Leaderboard, json_schema


def test_the_committed_schema_is_current(repository: Path) -> None:
    """Else: ``streamline-bench report --schema > reports/leaderboard.schema.json``."""
    committed = (repository / "reports" / "leaderboard.schema.json").read_text(encoding="utf-8")
    assert json.loads(committed) == json_schema()


def test_the_schema_allows_nothing_that_the_code_does_not_know() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Leaderboard.model_fields)
    assert schema["properties"]["schema_version"]["enum"] == [3, 4, 5]


def test_committed_leaderboards_are_valid(repository: Path) -> None:
    from streamline_bench.report.leaderboard import read_leaderboard

    boards = sorted((repository / "reports").glob("*/leaderboard.json"))
    assert boards
    for path in boards:
        assert read_leaderboard(path).rows
