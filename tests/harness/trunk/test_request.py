"""What is wrong with a request is named."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from streamline_bench.harness.trunk.request import TrunkRequest

GOOD: dict[str, Any] = {
    "checkpoints": {"dense": "a", "pruned": "b"},
    "outputs": {"dense": "c", "pruned": "d"},
    "tasks": ["x"],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ["x"]}, r"task\n.*not permitted"),
        ({"tasks": []}, "tasks\n"),
        ({"outputs": {"dense": "c"}}, "'pruned' needs .*checkpoint.*output"),
        ({"outputs": {"dense": "c", "pruned": "./c"}}, "same output"),
        ({"model_args": {"parallelize": True}}, "'parallelize' .*max_length"),
        ({"model_args": {"recipe": "streamline"}}, "'recipe' .*max_length"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrunkRequest.model_validate({**GOOD, **changes})


def test_the_first_checkpoint_is_the_dense_one() -> None:
    request = TrunkRequest.model_validate({**GOOD, "limit": 3, "model_args": {"max_length": 9}})
    assert request.dense == "dense" and request.model_args == {"max_length": 9}
