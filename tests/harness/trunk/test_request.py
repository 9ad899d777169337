"""Requests travel as JSON; what is wrong with one is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import RecipeError
from streamline_bench.harness.trunk.__main__ import main
from streamline_bench.harness.trunk.request import TrunkRequest

GOOD: dict[str, Any] = {
    "checkpoints": {"dense": "a", "pruned": "b"},
    "outputs": {"dense": "c", "pruned": "d"},
    "tasks": ["x"],
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_a_request_reads_as_it_was_written(tmp_path: Path) -> None:
    request = TrunkRequest.read(write(tmp_path / "a.json", limit=3, model_args={"max_length": 9}))
    request.write(tmp_path / "b.json")
    assert TrunkRequest.read(tmp_path / "b.json") == request
    assert request.dense == "dense"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ["x"]}, "'task': Extra inputs"),
        ({"tasks": []}, "'tasks'"),
        ({"outputs": {"dense": "c"}}, "'pruned' needs both a checkpoint and an output"),
        ({"outputs": {"dense": "c", "pruned": "./c"}}, "two labels have the same output"),
        ({"model_args": {"parallelize": True}}, "'parallelize' cannot be used in a shared walk"),
        ({"model_args": {"recipe": "streamline"}}, "'recipe' cannot be used in a shared walk"),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "request.json", **changes)
    with pytest.raises(RecipeError, match=message):
        TrunkRequest.read(path)
    assert main([str(path)]) == 2
    assert message in capsys.readouterr().err


def test_no_file_no_json_and_no_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.json").write_text('{"checkpoints": ')
    for name in ("torn.json", "none.json"):
        assert main([str(tmp_path / name)]) == 2
        assert "cannot be read as a request" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err
