"""magnitude: sums over the stored projections equal those over the loaded model's modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streamline_bench.compression import compress
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import SparsityError
from streamline_bench.methods.depth.magnitude import layer_magnitudes


def _expected(folder: Path, power: int) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    sums = []
    for layer in decoder_layers(model):
        linears = [m for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))]
        assert len(linears) >= 4
        sums.append(sum(m.weight.double().abs().pow(power).sum().item() for m in linears))
    return sums


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", {}), ("phi3", {}), ("qwen2", {}), ("opt", {"ffn_dim": 48})],
)
def test_equals_the_modules_of_the_model(
    family: str, changes: dict[str, Any], make_tiny_model: Callable[..., Path]
) -> None:
    folder = make_tiny_model(family, num_hidden_layers=3, **changes)
    reader = CheckpointReader(folder)
    for power, norm in ((1, "l1"), (2, "l2")):
        found = layer_magnitudes(reader, 3, norm, progress=False)  # type: ignore[arg-type]
        assert found == pytest.approx(_expected(folder, power), rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_smallest_go(
    norm: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    folder = make_tiny_model("llama", seed=3)
    sums = torch.tensor(_expected(folder, 1 if norm == "l1" else 2))
    out = compress(folder, make_recipe(f"magnitude_{norm}"), tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["order"] == sums.argsort()[:2].tolist()
    same_as_surgery(out, folder, manifest.chosen["removed_layers"])


def test_protected_layers_make_the_size_unreachable(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("magnitude_l1", n_layers=3, **{"parameters.protect_first": 4})
    with pytest.raises(SparsityError, match=r"\b2\b.*protect"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
