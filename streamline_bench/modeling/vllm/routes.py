"""Which classes serve a checkpoint under vLLM, or why none does."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, Literal

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

HOSTS = (
    *NATIVE, "opt", "gemma3_text", "glm4", "granite", "olmo2", "phi", "phi3", "smollm3", "stablelm",
)  # fmt: skip
"""Host families whose greedy output under vLLM is checked against transformers'."""

Route = Literal["native", "transformers", "none"]
"""``native``: vLLM has a class of its own; ``transformers``: its backend runs that of transformers;
``none``: neither."""

STOCK_ROUTES = "stock_routes.json"
"""Made anew by ``python -m streamline_bench.modeling.vllm.stock_routes``, which asks vLLM."""


def stock_route(model_type: str) -> Route:
    """Return how vLLM serves stock checkpoints of a type; vLLM need not be installed.

    It is what vLLM's registry says (the version is in the file), not a test of the tokens.
    """
    route: Route = _stock_routes()["routes"].get(model_type, "none")
    return route


@cache
def _stock_routes() -> dict[str, Any]:
    text = files(__package__).joinpath(STOCK_ROUTES).read_text(encoding="utf-8")
    return dict(json.loads(text))


def architecture_for(config: Any) -> str:
    """Return the name of the class that serves a config of model type ``streamline``.

    Raises:
        ArchitectureError: no class gives this host family's output.
    """
    host = config.host_model_type
    if host not in HOSTS:
        reason = _NOT_SERVED.get(host)
        if reason is None and stock_route(host) == "none":
            reason = "vLLM has no class for the family, and its transformers backend cannot run it"
        raise ArchitectureError(
            f"A checkpoint of model type 'streamline' on host family '{host}' cannot be served by "
            f"vLLM: {reason or 'its output there has not been compared'}; served are: "
            f"{', '.join(sorted(HOSTS))}. Use transformers (--model streamline, --engine hf), or "
            "compress by a method that gives a stock checkpoint."
        )
    same_stream = not config.layer_widths and config.rotations is None
    native = same_stream and _as_native(config)
    if config.removed_sublayers is not None and not native:
        raise ArchitectureError(
            "A checkpoint whose layers lack attention or MLP cannot be served by vLLM on host "
            f"family '{host}' as this config has it: only vLLM's own classes of "
            f"{', '.join(sorted(NATIVE))} can leave them out. Use transformers "
            "(--model streamline, --engine hf)."
        )
    return NATIVE[host] if native else HOSTED


_NOT_SERVED = {
    **dict.fromkeys(
        ("gpt_neox", "gemma2"),
        "its transformers backend gives other tokens than transformers for this family",
    ),
}


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
