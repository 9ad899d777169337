"""Which of our model classes serves a checkpoint under vLLM, or why none does."""

from __future__ import annotations

from typing import Any

from streamline_bench.errors import ArchitectureError

HOSTED = "StreamlineTransformersForCausalLM"
"""The class on vLLM's transformers backend; it runs the same modules as transformers does."""

NATIVE = {
    "llama": "StreamlineLlamaForCausalLM",
    "mistral": "StreamlineMistralForCausalLM",
    "qwen2": "StreamlineQwen2ForCausalLM",
    "qwen3": "StreamlineQwen3ForCausalLM",
}
"""Host family -> the subclass of vLLM's own class of that family."""

HOSTS = (*NATIVE, "opt")
"""Host families whose greedy output under vLLM is checked against transformers'."""


def architecture_for(config: Any) -> str:
    """Return the name of the class that serves a config of model type ``streamline``.

    Raises:
        ArchitectureError: no class gives this host family's output.
    """
    host = config.host_model_type
    if host not in HOSTS:
        raise ArchitectureError(
            f"A checkpoint of model type 'streamline' on host family '{host}' cannot be served by "
            f"vLLM; served are: {', '.join(sorted(HOSTS))}. Use transformers (--model streamline, "
            "--engine hf), or compress by a method that gives a stock checkpoint."
        )
    only_networks = not config.layer_widths and config.rotations is None
    return NATIVE[host] if only_networks and _as_native(config) else HOSTED


def _as_native(config: Any) -> bool:
    """Whether vLLM's own class of the host reads all that this config says."""
    if config.host_model_type not in NATIVE:
        return False
    if config.host_model_type != "qwen2":
        return True
    # vLLM's Qwen2 derives the head size and knows one kind of attention only.
    head_dim = getattr(config, "head_dim", None)
    derived = config.hidden_size // config.num_attention_heads
    return head_dim in (None, derived) and len(set(config.layer_types or ())) <= 1
