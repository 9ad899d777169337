"""The model that programs of tests train, in processes of their own."""

from __future__ import annotations

from typing import Any


def small_llama() -> Any:
    """Return a Llama of four layers with the same random weights each time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)
