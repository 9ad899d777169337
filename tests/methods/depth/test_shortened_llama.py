"""shortened_llama_ppl: the order of perplexities of separately pruned models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.reader import read_manifest
from streamline_bench.core.surgery.layers import keep_layers
from streamline_bench.errors import CalibrationError, SparsityError
from streamline_bench.methods.base import Compression


def _perplexities(work: Compression) -> list[float]:
    ids = work.tokens(work.recipe.calibration).input_ids
    found = []
    for layer in range(6):
        model = AutoModelForCausalLM.from_pretrained(work.folder).eval()
        keep_layers(model, [i for i in range(6) if i != layer])
        with torch.no_grad():
            found.append(model(ids, labels=ids).loss.exp().item())
    return found


def test_order_equals_separate_models(
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    folder = make_tiny_model("llama", initializer_range=0.2, seed=6)
    recipe = make_recipe("shortened_llama_ppl", n_layers=3)
    expected = _perplexities(Compression(folder, recipe, tmp_path))
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["order"] == sorted(range(6), key=expected.__getitem__)[:3]
    same_as_surgery(out, folder, manifest.chosen["removed_layers"])
    assert manifest.calibration["sequences"] == 10


def test_too_few_tokens(tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    one_word = tmp_path / "one.txt"
    one_word.write_text("w1", encoding="utf-8")
    recipe = make_recipe("shortened_llama_ppl", calibration=str(one_word))
    with pytest.raises(CalibrationError, match="give more text"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_protected_layers_make_the_size_unreachable(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("shortened_llama_ppl", **{"parameters.protect_first": 5})
    with pytest.raises(SparsityError, match="protect_first=5"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
