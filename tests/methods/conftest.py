"""Fixtures of the method tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.core.recipe import Recipe


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of 2,000 known words in 100 documents."""
    lines = [" ".join(f"w{(i * 7 + j * 13) % 96}" for j in range(20)) for i in range(100)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(text_file: Path) -> Callable[..., Recipe]:
    """Return a function that loads a recipe, made small enough for a test."""

    def make(name: str = "streamline", **changes: Any) -> Recipe:
        from streamline_bench.methods import load_recipe

        small = {
            "calibration": str(text_file),
            "sequence_length": 16,
            "n_layers": 2,
            "training.min_steps": 6,
            "training.batch_size": 4,
        }
        if "sparsity" in changes:
            small.pop("n_layers")
        return load_recipe(name, {**small, **changes})

    return make
