"""What tests of compressions share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import load_recipe
from streamline_bench.compression.recipes import applicable


@pytest.fixture
def small(recipe_source: Path) -> Callable[..., Any]:
    """Return a function: name of a recipe -> that recipe on little text."""

    def make(name: str, **changes: Any) -> Any:
        given = {"calibration": "auto", "sequence_length": 16, "calibration.samples": 20}
        given |= {"training.min_steps": 3, "training.epochs": 1, "training.data.samples": 12}
        given |= {"training.data.sequence_length": 16, "training.batch_size": 4}
        return load_recipe(name, {**applicable(given, load_recipe(name)), **changes})

    return make
