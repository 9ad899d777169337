"""first_layers: the shallowest layers go, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import compress
from streamline_bench.compression.cache import cache_root
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.errors import SparsityError


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
    with pytest.raises(SparsityError, match=r"\b6 of 6\b"):
        compress(tiny_llama, make_recipe("last_layers", n_layers=6), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    work = cache_root() / "work"
    assert list(work.iterdir()) == []


def _removed(folder: Path) -> list[int]:
    manifest = read_manifest(folder)
    assert manifest is not None
    removed: list[int] = manifest.chosen["removed_layers"]
    return removed


def test_the_seed_decides(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    drawn = []
    for number, seed in enumerate([0, 0, 1, 2, 3]):
        recipe = make_recipe("random_layers", seed=seed)
        out = compress(tiny_llama, recipe, tmp_path / str(number), progress=False)
        drawn.append(_removed(out))
        same_as_surgery(out, tiny_llama, drawn[-1])
    assert drawn[0] == drawn[1]
    assert len({tuple(removed) for removed in drawn}) > 1


def test_protected_ends_stay(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    ends = {"parameters.protect_first": 3, "parameters.protect_last": 1}
    recipe = make_recipe("random_layers", **ends)
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert _removed(out) == [3, 4]
    with pytest.raises(SparsityError, match="protect_first=3"):
        compress(tiny_llama, make_recipe("random_layers", n_layers=3, **ends), tmp_path / "more")


def test_the_listed_go(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    recipe = make_recipe("last_layers").model_copy(
        update={"method": "given_layers", "parameters": {"layers": [3, 1]}}
    )
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    same_as_surgery(out, tiny_llama, [1, 3])


@pytest.mark.parametrize(
    ("layers", "match"), [([1], "1 layers.*2 are to go; lower n_layers by 1"), ([1, 6], "layer 6")]
)
def test_a_list_that_does_not_fit_is_refused(
    layers: list[int], match: str, tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("last_layers").model_copy(
        update={"method": "given_layers", "parameters": {"layers": layers}}
    )
    with pytest.raises(SparsityError, match=match):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
