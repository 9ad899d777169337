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


@pytest.fixture(scope="session")
def same_as_surgery() -> Callable[[Path, Path, list[int]], None]:
    """Return a check of a depth-pruned folder.

    It loads in plain transformers with nothing missing or left over, and gives the logits of its
    source with those layers removed in memory.
    """

    def check(folder: Path, source: Path, removed: list[int]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from streamline_bench.core.surgery import keep_layers

        written, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
        assert not report["mismatched_keys"]
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        depth = model.config.num_hidden_layers
        keep_layers(model, [index for index in range(depth) if index not in removed])
        ids = torch.tensor([[1, 5, 9, 40, 22, 7]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, written.eval()(ids).logits)

    return check
