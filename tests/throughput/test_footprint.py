"""Sizes out of config and headers, beside those of the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.throughput.footprint import Footprint, footprint, ideal
from streamline_bench.throughput.record import Ideal
from streamline_bench.throughput.workload import Workload

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
    found = footprint(folder)
    parameters, multiply_adds, kept = matrices(folder, 20)
    assert found.parameters == parameters
    assert found.flops(20) == 2 * multiply_adds
    assert found.kv_values_per_token == kept
    assert found.layers == 2
    assert found.dtype == "float32"


def test_experts_count_by_the_share_that_a_token_meets(make_tiny_model: MakeModel) -> None:
    folder = make_tiny_model(
        "mixtral", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=1
    )
    few = footprint(folder)
    expert = 3 * 32 * 48
    dense = 32 * 32 * 2 + 32 * 16 * 2 + 4 * 32 + 100 * 32
    assert few.flops(0) == 2 * (dense + expert)
    assert few.weights_read(1) == dense + expert
    assert few.weights_read(2) == dense + 4 * expert * (1 - 0.75**2)
    assert few.weights_read(1000) == pytest.approx(dense + 4 * expert)


SHORT = Workload(prompt_tokens=6, output_tokens=3)


def ratio(dense: Footprint, pruned: Footprint, batch: int = 1, work: Workload = SHORT) -> Ideal:
    return ideal(dense, pruned, work, batch, "float32", on_cpu=True)


def by_hand(sizes: Footprint, batch: int, work: Workload, ridge: float) -> tuple[float, ...]:
    """Bytes, operations and the roofline of a batch, pass by pass and token by token."""
    weights = sizes.layer_weights + sizes.outer_weights
    kept, width = sizes.kv_values_per_token or 0, 4
    moved = width * (weights + batch * kept * work.prompt_tokens)
    computed = sum(2 * sizes.layer_weights + 4 * sizes.attention_channels * (place + 1)
                   for place in range(work.prompt_tokens))  # fmt: skip
    computed = batch * (computed + 2 * sizes.outer_weights)
    passes = [(moved, computed)]
    for place in range(work.prompt_tokens + 1, work.prompt_tokens + work.output_tokens):
        attention = 4 * sizes.attention_channels * place
        passes.append((width * (weights + batch * kept * place), batch * (2 * weights + attention)))
    bound = sum(max(moved, computed / ridge) for moved, computed in passes)
    return sum(b for b, _ in passes), sum(f for _, f in passes), bound


@pytest.mark.parametrize("batch", [1, 64])
def test_the_ideal_is_a_ratio_of_rooflines(make_tiny_model: MakeModel, batch: int) -> None:
    dense, pruned = (footprint(make_tiny_model("llama", num_hidden_layers=n)) for n in (4, 3))
    found = ratio(dense, pruned, batch)
    assert found.ridge is not None
    above, below = (by_hand(sizes, batch, SHORT, found.ridge) for sizes in (dense, pruned))
    expected = [one / other for one, other in zip(above, below, strict=True)]
    assert [found.bytes, found.flops, found.ratio] == pytest.approx(expected)
    assert found.bytes is not None and found.layers == pytest.approx(4 / 3)
    ends = sorted((found.bytes, found.flops))
    assert 1 < ends[0] <= found.ratio <= ends[1] < 4 / 3  # the LM head stays
    assert ratio(dense, dense, batch).ratio == 1.0


def test_the_head_is_read_for_every_token_and_the_embedding_is_not() -> None:
    """SmolLM2-135M, 21 of 30 layers: 1.43 by layers, 1.31 by the weights read for a token."""
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536

    def sizes(layers: int, kept: int) -> Footprint:
        return Footprint(layers * layer + 49152 * 576, 1, layers, layers * layer, 49152 * 576, 0,
                         1.0, layers * 576, layers * kept, None, "float32")  # fmt: skip

    work = Workload(prompt_tokens=1, output_tokens=2)
    found = ratio(sizes(30, 384), sizes(21, 384), work=work)
    assert (found.layers, found.ratio) == (pytest.approx(30 / 21), pytest.approx(1.31, abs=2e-3))
    long = Workload(prompt_tokens=50_000, output_tokens=50_000)
    found = ratio(sizes(30, 384), sizes(21, 384), work=long)
    assert found.ratio > 1.4, "keys and values, of layers only, outweigh the head"


def test_narrower_layers_are_faster_by_what_they_read(make_tiny_model: MakeModel) -> None:
    dense = footprint(make_tiny_model("llama"))
    found = ratio(dense, footprint(make_tiny_model("llama", intermediate_size=24)))
    assert found.layers == 1.0 and found.ratio > 1


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
    bare = footprint(make_tiny_model("llama", num_hidden_layers=2))
    found = footprint(tmp_path)
    assert found.flops(8) == bare.flops(8) + 2 * 2 * 32 * 40
    assert found.layers == 2
    assert found.kv_values_per_token == bare.kv_values_per_token
    assert ratio(footprint(dense), found).ratio < ratio(footprint(dense), bare).ratio


def test_a_family_without_a_row_still_has_sizes(make_tiny_model: MakeModel) -> None:
    import json

    folder = make_tiny_model("llama")
    known = footprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
    found = footprint(folder)
    assert found.weights_bytes == known.weights_bytes
    assert found.layers == 0 and found.kv_values_per_token is None
    assert ratio(known, found).layers is None and ratio(known, found).ratio > 0
