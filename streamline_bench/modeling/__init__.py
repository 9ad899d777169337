"""The one model type for checkpoints that no stock class can express.

``import streamline_bench.modeling; streamline_bench.modeling.register()`` makes
``AutoModelForCausalLM.from_pretrained`` load them. Names are imported on first use, because torch
and transformers are heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamline_bench.modeling.attachments import Attachment
    from streamline_bench.modeling.configuration import StreamlineConfig, streamline_config
    from streamline_bench.modeling.models import StreamlineForCausalLM, StreamlineModel, register
    from streamline_bench.modeling.widths import LayerWidths

__all__ = [
    "Attachment",
    "LayerWidths",
    "StreamlineConfig",
    "StreamlineForCausalLM",
    "StreamlineModel",
    "register",
    "streamline_config",
]

_HOMES = {
    "Attachment": "attachments",
    "LayerWidths": "widths",
    "StreamlineConfig": "configuration",
    "StreamlineForCausalLM": "models",
    "StreamlineModel": "models",
    "register": "models",
    "streamline_config": "configuration",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
