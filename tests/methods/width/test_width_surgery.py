"""Sliced tensors and the config that holds them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.methods.width.width_plan import KeptUnits, narrowed_config, sliced_tensors
from streamline_bench.modeling import LayerWidths

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])


def config_of(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, **changes}
    if family == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
        del sizes["num_key_value_heads"], sizes["head_dim"], sizes["intermediate_size"]
    return AutoConfig.for_model(family, **sizes)


def test_the_stock_config_comes_first_and_streamline_last(caplog: Any) -> None:
    def kind(family: str, widths: LayerWidths, **changes: Any) -> str:
        config = config_of(family, **changes)
        return narrowed_config(config, dict.fromkeys(range(6), widths)).model_type

    assert kind("llama", LayerWidths(4, 2, 40)) == "llama"
    assert kind("llama", LayerWidths(6, 3, 40)) == "mistral"
    assert kind("opt", LayerWidths(8, 8, 40)) == "opt"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert kind("opt", LayerWidths(6, 6, 40)) == "streamline"
    assert kind("llama", LayerWidths(6, 3, 40), attention_bias=True) == "streamline"
    assert "of model type 'streamline'" in caplog.text


def test_slices_are_those_of_torch_pruning(make_tiny_model: Callable[..., Path]) -> None:
    """Its dependency graph finds the coupled rows and columns by itself (no heads shared)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        pruning = pytest.importorskip(
            "torch_pruning", reason="the oracle is not installed (pip install torch-pruning)"
        )
    folder = make_tiny_model("llama", num_hidden_layers=2, num_key_value_heads=4, use_cache=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = pruning.DependencyGraph().build_dependency(
            model, example_inputs={"input_ids": torch.tensor([[1, 5, 9]])}
        )
        for root, gone in (
            (layer.self_attn.q_proj, [*range(8, 16), *range(24, 32)]),  # heads 1 and 3
            (layer.mlp.gate_proj, [3, 40]),
        ):
            graph.get_pruning_group(root, pruning.prune_linear_out_channels, idxs=gone).prune()
    channels = torch.tensor([c for c in range(48) if c not in (3, 40)])
    heads = torch.tensor([0, 2])
    kept = {1: KeptUnits(heads, heads, channels)}
    ours = sliced_tensors(CheckpointReader(folder), AutoConfig.from_pretrained(folder), kept)
    theirs = model.state_dict()
    assert len(ours) == 7
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_layers_that_keep_all_are_not_touched(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model("llama")
    reader, config = CheckpointReader(folder), AutoConfig.from_pretrained(folder)
    every = KeptUnits(torch.arange(4), torch.arange(2), torch.arange(48))
    fewer = KeptUnits(torch.arange(4), torch.arange(2), torch.arange(0, 48, 2))
    sliced = sliced_tensors(reader, config, {0: every, 3: fewer})
    assert set(sliced) == {f"model.layers.3.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
