"""What the methods that drop layers share: the size they record is the size that was reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.methods.tools.layer_removal import is_linear_weight, stored_linear_weights


@pytest.fixture(scope="module")
def mixture(make_tiny_model: Callable[..., Path]) -> Path:
    """Every second layer is a mixture, the others are dense and smaller."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return make_tiny_model("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=5, **sizes)


@pytest.mark.parametrize("recipe", ["first_layers", "last_layers", "streamline_none", "streamline"])
def test_a_mixtures_recorded_size_is_that_of_the_layers_that_went(
    mixture: Path, make_recipe: Callable[..., Any], tmp_path: Path, recipe: str
) -> None:
    changes = {"n_layers": 1, "parameters.start": 1} if "streamline" in recipe else {"n_layers": 1}
    out = compress(mixture, make_recipe(recipe, **changes), tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    size = manifest.chosen["size"]
    assert size["removed"] == manifest.parameters_before - manifest.parameters_after
    assert size["reached"] == pytest.approx(manifest.sparsity_reached, abs=1e-9)


def test_norms_and_biases_are_left_out(make_tiny_model: Callable[..., Path]) -> None:
    reader = CheckpointReader(make_tiny_model("qwen3", num_hidden_layers=2, attention_bias=True))
    layers = stored_linear_weights(reader, 2)
    names = {f"self_attn.{p}_proj.weight" for p in "qkvo"}
    names |= {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert [set(layer) for layer in layers] == [names, names]
    assert layers[1]["mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"


def test_fused_experts_count_and_their_biases_do_not() -> None:
    assert is_linear_weight("mlp.experts.gate_up_proj", 3)
    assert not is_linear_weight("mlp.experts.gate_up_proj_bias", 2)
    assert not is_linear_weight("input_layernorm.weight", 1)
