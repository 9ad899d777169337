"""OpenCompass: model classes, the bundled tasks as data sets, configs, and running it.

In a config, by path: ``type="streamline_bench.opencompass.StreamlineModel"``; or imported. The
classes need OpenCompass; it is imported when one of them is first used.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BundledDataset",
    "StreamlineChatModel",
    "StreamlineModel",
    "StreamlineVLLM",
    "StreamlineVLLMChat",
]

_MODULES = {
    "BundledDataset": "datasets",
    "StreamlineChatModel": "models",
    "StreamlineModel": "models",
    "StreamlineVLLM": "models",
    "StreamlineVLLMChat": "models",
}


def __getattr__(name: str) -> Any:
    """Import on first use: OpenCompass takes seconds to import, and need not be installed."""
    if name not in _MODULES:
        raise AttributeError(name)
    from importlib import import_module

    from streamline_bench.opencompass.availability import require_opencompass

    require_opencompass()
    return getattr(import_module(f"streamline_bench.opencompass.{_MODULES[name]}"), name)
