"""last_layers: the deepest layers go, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import compress
from streamline_bench.compression.pipeline import cache_root
from streamline_bench.core.checkpoint.reader import read_manifest
from streamline_bench.errors import SparsityError


def test_the_deepest_go(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    out = compress(tiny_llama, make_recipe("last_layers"), tmp_path / "out", progress=False)
    same_as_surgery(out, tiny_llama, [4, 5])
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["order"] == [5, 4]
    assert manifest.layers_after == 4


def test_all_layers_cannot_go(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SparsityError, match="Cannot remove 6 of 6"):
        compress(tiny_llama, make_recipe("last_layers", n_layers=6), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    work = cache_root() / "work"
    assert list(work.iterdir()) == []
