"""Tiny random models of every family in the architecture table, and of their special features.

A test that takes ``variant`` runs once per entry of ``VARIANTS``. Weights are drawn wide enough
that every layer, window and expert shows in the logits: with the usual initialisation of 0.02
a wrong layer would change them by less than any tolerance.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.core.architecture import ARCHITECTURES

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_WINDOW = {"sliding_window": 4}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_GEMMA3_TYPES = ["sliding_attention", "full_attention"] * 3

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "mistral": ("mistral", _WINDOW),
    "qwen2": ("qwen2", _QWEN_WINDOW),
    "qwen3": ("qwen3", {**_QWEN_WINDOW, "head_dim": 8}),
    "gemma2": ("gemma2", {**_WINDOW, "head_dim": 8}),
    "gemma3_text": ("gemma3_text", {**_WINDOW, "head_dim": 8, "layer_types": _GEMMA3_TYPES}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 24}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, **_WINDOW}),
    "granite": ("granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.7}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**_QWEN_MOE, "mlp_only_layers": [1, 4]}),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),
    "gpt_oss": (
        "gpt_oss",
        {
            **_WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gemma3_text-pattern": ("gemma3_text", {**_WINDOW, "head_dim": 8, "sliding_window_pattern": 3}),
    "opt-postnorm": ("opt", {"ffn_dim": 48, "do_layer_norm_before": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "qwen3_moe-period": (
        "qwen3_moe",
        {**_QWEN_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "deepseek_v3-full-query": ("deepseek_v3", {**_DEEPSEEK, "q_lora_rank": None}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "variant" in metafunc.fixturenames and "variant" not in chosen:
        metafunc.parametrize("variant", list(VARIANTS))


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """Return a function variant -> causal LM in evaluation mode, the same at every call."""

    def build(variant: str, **changes: Any) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        model_type, extra = VARIANTS[variant]
        config = AutoConfig.for_model(model_type, **{**SIZES, **extra, **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name.endswith("e_score_correction_bias") or tensor.requires_grad:
                    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    tensor.copy_(centre + 0.25 * torch.randn_like(tensor))
        model.generation_config.eos_token_id = None
        return model.eval()

    return build


@pytest.fixture(scope="session")
def token_ids() -> Any:
    """Two sequences of 11 tokens, ``[2, 11]`` int64, longer than every sliding window."""
    import torch

    return torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama that a test may damage, in one file."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(random_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A tiny Llama in several shards."""
    random_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"
