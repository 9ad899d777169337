"""first_layers: the shallowest layers go, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.reader import read_manifest


def test_the_shallowest_go(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    out = compress(tiny_llama, make_recipe("first_layers"), tmp_path / "out", progress=False)
    same_as_surgery(out, tiny_llama, [0, 1])
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["removed_layers"] == [0, 1]
