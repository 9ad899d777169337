"""Fixtures of the method tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def same_as_surgery() -> Callable[[Path, Path, list[int]], None]:
    """Return a check of a depth-pruned folder.

    It loads in plain transformers with nothing missing or left over, and gives the logits of its
    source with those layers removed in memory.
    """

    def check(folder: Path, source: Path, removed: list[int]) -> None:
        import torch
        from surgery_in_memory import keep_layers
        from transformers import AutoModelForCausalLM

        written, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys"))
        assert not report["mismatched_keys"]
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        depth = model.config.num_hidden_layers
        keep_layers(model, [index for index in range(depth) if index not in removed])
        ids = torch.tensor([[1, 5, 9, 40, 22, 7]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, written.eval()(ids).logits)

    return check


ROTATABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt-no-gains": {
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "layer_norm_elementwise_affine": False,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "phi": {},
    "gpt_neox": {},
    "gpt_neox-sequential": {"use_parallel_residual": False},
    "gpt2": {"n_inner": 48},
}
"""Families whose residual stream can be rotated, and features of theirs that it must survive."""


@pytest.fixture(params=list(ROTATABLE))
def rotatable(request: pytest.FixtureRequest) -> str:
    """One key of ``ROTATABLE`` after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def double_model() -> Callable[..., Any]:
    """Return a function: key of ``ROTATABLE`` -> random float64 causal LM of three layers.

    Its norms compute in float64 (those of transformers go down to float32 on the way), gains and
    biases are drawn wide, so that a tolerance of 1e-11 tells right from wrong.
    """

    def build(key: str) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = AutoConfig.for_model(key.partition("-")[0], **{**sizes, **ROTATABLE[key]})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.25 * torch.randn_like(parameter))
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _exact_norm(module)
        return model

    return build


def _exact_norm(norm: Any) -> Callable[[Any], Any]:
    def forward(states: Any) -> Any:
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight

    return forward
