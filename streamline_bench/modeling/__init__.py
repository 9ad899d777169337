"""The one model type for checkpoints that no stock class can express.

``import streamline_bench.modeling; streamline_bench.modeling.register()`` makes
``AutoModelForCausalLM.from_pretrained`` load them. Names are imported on first use, because torch
and transformers are heavy.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamline_bench.modeling.attachments import Attachment
    from streamline_bench.modeling.configuration import StreamlineConfig, streamline_config
    from streamline_bench.modeling.models import StreamlineForCausalLM, StreamlineModel
    from streamline_bench.modeling.sublayers import RemovedSublayers
    from streamline_bench.modeling.widths import LayerWidths

__all__ = [
    "Attachment",
    "LayerWidths",
    "RemovedSublayers",
    "StreamlineConfig",
    "StreamlineForCausalLM",
    "StreamlineModel",
    "register",
    "streamline_config",
]

_HOMES = {
    "Attachment": "attachments",
    "LayerWidths": "widths",
    "RemovedSublayers": "sublayers",
    "StreamlineConfig": "configuration",
    "StreamlineForCausalLM": "models",
    "StreamlineModel": "models",
    "streamline_config": "configuration",
}


@cache
def register() -> None:
    """Register config and models with AutoConfig, AutoModel and AutoModelForCausalLM.

    Idempotent. Afterwards ``AutoModelForCausalLM.from_pretrained(folder)`` loads any checkpoint of
    model type ``streamline``.
    """
    from transformers import AutoConfig

    from streamline_bench.modeling.configuration import MODEL_TYPE, StreamlineConfig, on_new_host

    AutoConfig.register(MODEL_TYPE, StreamlineConfig, exist_ok=True)
    on_new_host(_register_models)


def _register_models(config_class: type[StreamlineConfig]) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from streamline_bench.modeling.models import StreamlineForCausalLM, StreamlineModel

    # The Auto classes look models up by the config's exact class, hence once per host. Their own
    # ``register`` insists on equal class names, which made classes cannot have.
    AutoModel._model_mapping.register(config_class, StreamlineModel, exist_ok=True)
    AutoModelForCausalLM._model_mapping.register(config_class, StreamlineForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
