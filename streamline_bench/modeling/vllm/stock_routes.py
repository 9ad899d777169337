"""Asks the installed vLLM how it serves each causal type of transformers, and writes the answer.

``python -m streamline_bench.modeling.vllm.stock_routes``, in the environment of ``tox -e vllm``.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from streamline_bench.modeling.vllm.routes import STOCK_ROUTES, Route


def ask_registry() -> dict[str, Any]:
    """Return the versions of vLLM and transformers, and model type -> route."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models.registry import _TRANSFORMERS_SUPPORTED_MODELS, _VLLM_MODELS

    def route(architecture: str) -> Route:
        if architecture in _VLLM_MODELS and architecture not in _TRANSFORMERS_SUPPORTED_MODELS:
            return "native"
        found: Any = getattr(transformers, architecture, None)
        if found is None:
            return "none"
        able = found.is_backend_compatible() or found._can_set_attn_implementation()
        return "transformers" if able else "none"

    return {
        "vllm": metadata.version("vllm").partition("+")[0],
        "transformers": metadata.version("transformers"),
        "routes": {
            model_type: route(architecture)
            for model_type, architecture in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
            if isinstance(architecture, str)
        },
    }


def main() -> None:
    """Write the file."""
    path = Path(__file__).with_name(STOCK_ROUTES)
    path.write_text(json.dumps(ask_registry(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
