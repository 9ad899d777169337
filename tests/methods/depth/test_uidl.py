"""uidl: the block equals that of a loop over samples; the ends stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.modeling.loading import SourceModel


def _brute_force(work: Compression, n: int) -> list[float]:
    """Mean angular distance of the last token for each block that does not end the model."""
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float64).eval()
    tokens = work.tokens(work.recipe.calibration)
    sums = [0.0] * (model.config.num_hidden_layers - n)
    for row in tokens.input_ids:
        with torch.no_grad():
            states = model(row[None], output_hidden_states=True).hidden_states
        for start in range(len(sums)):
            a, b = states[start][0, -1], states[start + n][0, -1]
            sums[start] += math.acos(float(a @ b / (a.norm() * b.norm()))) / math.pi
    return [total / len(tokens) for total in sums]


@pytest.mark.parametrize("first", [False, True])
def test_block_equals_brute_force(
    first: bool,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    folder = make_tiny_model("llama", initializer_range=0.1, seed=4)
    recipe = make_recipe("uidl", calibration_samples=8, **{"parameters.allow_first_layer": first})
    expected = _brute_force(Compression(SourceModel(folder), recipe, tmp_path), 2)
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["scores"][:-1] == pytest.approx(expected, abs=1e-6)
    start = manifest.chosen["start"]
    allowed = range(0 if first else 1, len(expected))
    assert start == min(allowed, key=expected.__getitem__)
    assert manifest.chosen["removed_layers"] == [start, start + 1]
    same_as_surgery(out, folder, [start, start + 1])


def test_simple_takes_the_deepest_but_the_last(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    out = compress(tiny_llama, make_recipe("uidl_simple"), tmp_path / "out", progress=False)
    same_as_surgery(out, tiny_llama, [3, 4])


def test_ends_that_stay_make_the_size_unreachable(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SparsityError, match=r"\b5 of 6\b"):
        compress(tiny_llama, make_recipe("uidl", n_layers=5), tmp_path / "out", progress=False)
    simple = make_recipe("uidl_simple", n_layers=5)
    with pytest.raises(SparsityError, match=r"\b5 of 6\b.*layer 0\b.*allow_first_layer"):
        compress(tiny_llama, simple, tmp_path / "out", progress=False)
    allowed = make_recipe("uidl_simple", n_layers=5, **{"parameters.allow_first_layer": True})
    compress(tiny_llama, allowed, tmp_path / "out", progress=False)
