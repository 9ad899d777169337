"""Fusing norms leaves the function alone and leaves norms without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.rotation.norm_fusion import fuse_norms
from streamline_bench.modeling.rotations import StreamNorm

IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 81], [1, 77, 3, 3, 60, 12, 11]])


def test_logits_stay_the_same(rotatable: str, double_model: Callable[..., Any]) -> None:
    model = double_model(rotatable)
    with torch.no_grad():
        before = model(IDS).logits
        fuse_norms(model)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-11, atol=1e-11)
    norms = [m for m in model.modules() if isinstance(m, StreamNorm)]
    assert len(norms) == (3 if rotatable == "phi" else 2 * 3) + 1
    assert not [p for norm in norms for p in norm.parameters()]


def test_means_are_taken_out_only_where_the_norm_takes_them_out(
    double_model: Callable[..., Any],
) -> None:
    """Of a LayerNorm model every writer is centred; that would change an RMSNorm model."""
    for key, centred in (("opt", True), ("llama", False)):
        model = double_model(key)
        fuse_norms(model)
        means = [model.get_input_embeddings().weight.mean(1)]
        for layer in decoder_layers(model):
            down = layer.fc2 if key == "opt" else layer.mlp.down_proj
            means.append(down.weight.mean(0))
        assert all((float(mean.detach().abs().max()) < 1e-12) == centred for mean in means)


def test_embeddings_are_untied(double_model: Callable[..., Any]) -> None:
    model = double_model("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embeddings = model.model.embed_tokens.weight.detach().clone()
    fuse_norms(model)
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    assert not torch.equal(model.lm_head.weight, embeddings)


def test_each_model_keeps_its_own_epsilon(double_model: Callable[..., Any]) -> None:
    model = double_model("llama")
    epsilon = model.config.rms_norm_eps
    fuse_norms(model)
    assert {m.eps for m in model.modules() if isinstance(m, StreamNorm)} == {epsilon}
    assert epsilon != 1e-5


def test_a_norm_of_another_form_is_refused(double_model: Callable[..., Any]) -> None:
    """Gemma's gain is 1 + w, for example: whatever is not understood is not guessed."""
    model = double_model("llama")
    norm = model.model.layers[1].input_layernorm
    plain = norm.forward
    norm.forward = lambda states: plain(states) + states
    with pytest.raises(ArchitectureError, match=r"LlamaRMSNorm.*gain.*depth method"):
        fuse_norms(model)


def test_a_norm_with_bias_needs_maps_with_bias() -> None:
    config = AutoConfig.for_model(
        "opt",
        vocab_size=50,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        enable_bias=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.decoder.layers[0].self_attn_layer_norm.bias.fill_(1.0)
    with pytest.raises(ArchitectureError, match=r"bias.*depth method"):
        fuse_norms(model)


def test_bfloat16_models_are_understood(tiny_llama: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    fuse_norms(model)
    assert model(IDS).logits.isfinite().all()
