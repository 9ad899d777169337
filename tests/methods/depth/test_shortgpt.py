"""shortgpt: scores and order equal a loop over samples, layers and tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.modeling.loading import SourceModel


def _brute_force(work: Compression, postnorm: bool) -> list[float]:
    """Block influence in float64, one token at a time; states taken by plain hooks."""
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float64).eval()
    states: list[torch.Tensor] = []
    layers = decoder_layers(model)
    layers[0].register_forward_pre_hook(lambda m, a, k: states.append(a[0]), with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(lambda m, a, output: states.append(output))
    tokens = work.tokens(work.recipe.calibration)
    sums, count = [0.0] * len(layers), 0
    for row in tokens.input_ids:
        states.clear()
        with torch.no_grad():
            model(row[None])
        if postnorm:
            states[-1] = model.model.norm(states[-1]).detach()
        for position in range(len(row)):
            count += 1
            for index in range(len(layers)):
                a, b = states[index][0, position], states[index + 1][0, position]
                sums[index] += 1 - float(a @ b / (a.norm() * b.norm()))
    return [total / count for total in sums]


@pytest.mark.parametrize("last_state", ["raw", "postnorm"])
def test_order_equals_brute_force(
    last_state: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    folder = make_tiny_model("llama", initializer_range=0.1, seed=5)
    recipe = make_recipe(
        "shortgpt", **{"parameters.last_state": last_state, "n_layers": 3, "calibration_samples": 6}
    )
    expected = _brute_force(
        Compression(SourceModel(folder), recipe, tmp_path), last_state == "postnorm"
    )
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert list(manifest.chosen["scores"].values()) == pytest.approx(expected, abs=1e-6)
    assert manifest.chosen["order"] == sorted(range(6), key=expected.__getitem__)[:3]
    same_as_surgery(out, folder, manifest.chosen["removed_layers"])
    assert "similarity.json" in manifest.files
    assert manifest.calibration["sequence_length"] == 16


def test_protected_layers_make_the_size_unreachable(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("shortgpt", n_layers=3, **{"parameters.protect_last": 4})
    with pytest.raises(SparsityError, match=r"\b2\b.*protect"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
