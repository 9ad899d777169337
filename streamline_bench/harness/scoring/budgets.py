"""How much one forward pass may hold: from ``batch_size``, or from the memory that is free."""

from __future__ import annotations

from typing import Any

import psutil
import torch

__all__ = ["cache_bytes_per_token", "generation_batch", "scoring_tokens"]

CPU_TOKENS = 1024
"""Tokens per pass on a CPU: beyond this nothing is gained, and short of it little is lost."""

MEMORY_SHARE = 0.5


def scoring_tokens(
    batch_size: int | str, longest: int, device: torch.device, max_batch_size: int
) -> int:
    """Return the padded tokens per scoring pass.

    A number N stands for the memory of N of the longest requests, but never less than a CPU
    handles well; ``auto`` starts large on an accelerator (memory errors halve it).
    """
    if str(batch_size).startswith("auto"):
        return CPU_TOKENS if device.type == "cpu" else max(CPU_TOKENS, max_batch_size * longest)
    return max(CPU_TOKENS, int(batch_size) * longest)


def generation_batch(
    config: Any, dtype: torch.dtype, max_length: int, max_batch_size: int, device: torch.device
) -> int:
    """Return how many sequences of ``max_length`` fit into half of the free memory, at least one.

    By arithmetic: the key-value cache, and the hidden states of a prefill.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    per_token = cache_bytes_per_token(config, dtype) + 16 * config.hidden_size * dtype.itemsize
    fitting = int(free * MEMORY_SHARE / (per_token * max_length))
    return max(1, min(max_batch_size, fitting))


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the key-value cache of one token in bytes, all layers."""
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * key_value_heads * head_size * dtype.itemsize)
