"""Sizes out of config and headers, beside those of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.throughput.footprint import footprint, ideal

MakeModel = Callable[..., Path]


def matrices(folder: Path, context: int) -> tuple[int, int, int]:
    """Return (parameters, multiply-adds per token by hooks on a real forward pass, KV numbers)."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    counted = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal counted
        counted += module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(count)
    with torch.no_grad():
        cache = model(torch.tensor([[5]])).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2 * heads * size * context * config.num_hidden_layers
    return sum(p.numel() for p in model.parameters()), counted + attention, kept


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox", "phi3", "qwen3"])
def test_sizes_are_those_of_the_loaded_model(model_type: str, make_tiny_model: MakeModel) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 2}
    if model_type == "opt":
        changes |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    folder = make_tiny_model(model_type, **changes)
    found = footprint(folder, context=20)
    parameters, multiply_adds, kept = matrices(folder, 20)
    assert found.parameters == parameters
    assert found.flops == 2 * multiply_adds
    assert found.kv_values_per_token == kept
    assert found.layers == 2
    assert found.dtype == "float32"


def test_experts_count_by_the_share_that_a_token_meets(make_tiny_model: MakeModel) -> None:
    folder = make_tiny_model(
        "mixtral", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=1
    )
    few = footprint(folder, 0)
    expert = 3 * 32 * 48
    dense = 32 * 32 * 2 + 32 * 16 * 2 + 4 * 32 + 100 * 32
    assert few.flops == 2 * (dense + expert)


def test_ideal_of_fewer_layers_is_their_ratio(make_tiny_model: MakeModel) -> None:
    dense, pruned = (footprint(make_tiny_model("llama", num_hidden_layers=n), 8) for n in (4, 3))
    found = ideal(dense, pruned)
    assert (found.kind, found.ratio) == ("layers", pytest.approx(4 / 3))
    assert 1 < found.flops < found.layers  # the LM head stays
    assert 1 < found.weights < found.layers
    assert ideal(dense, dense).ratio == 1.0


def test_ideal_of_narrower_layers_is_that_of_operations(make_tiny_model: MakeModel) -> None:
    dense = footprint(make_tiny_model("llama"), 8)
    narrow = footprint(make_tiny_model("llama", intermediate_size=24), 8)
    found = ideal(dense, narrow)
    assert (found.kind, found.layers) == ("flops", 1.0)
    assert found.ratio == found.flops > 1


def test_attached_networks_count(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from streamline_bench.modeling import StreamlineForCausalLM, streamline_config

    dense = make_tiny_model("llama", num_hidden_layers=4)
    config = AutoConfig.from_pretrained(dense)
    config.num_hidden_layers = 2
    entries = config.to_dict()
    entries["layer_types"] = None
    host = type(config).from_dict(entries)
    attached = {"after_layer": 0, "kind": "ffn", "intermediate_size": 40}
    StreamlineForCausalLM.from_config(streamline_config(host, [attached])).save_pretrained(tmp_path)
    bare = footprint(make_tiny_model("llama", num_hidden_layers=2), 8)
    found = footprint(tmp_path, 8)
    assert found.flops == bare.flops + 2 * 2 * 32 * 40
    assert found.layers == 2
    assert found.kv_values_per_token == bare.kv_values_per_token
    assert ideal(footprint(dense, 8), found).kind == "flops"


def test_a_family_without_a_row_still_has_sizes(make_tiny_model: MakeModel) -> None:
    import json

    folder = make_tiny_model("llama")
    known = footprint(folder, 8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
    found = footprint(folder, 8)
    assert found.weights_bytes == known.weights_bytes
    assert found.layers == 0 and found.kv_values_per_token is None
    assert ideal(known, found).kind == "flops"
