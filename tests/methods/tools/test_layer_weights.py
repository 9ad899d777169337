"""Which tensors of a layer are its linear weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.methods.tools.layer_weights import is_linear_weight, stored_linear_weights


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
