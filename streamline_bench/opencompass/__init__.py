"""OpenCompass: model classes, the bundled tasks as data sets, configs, and running it.

In a config, by path: ``type="streamline_bench.opencompass.StreamlineModel"``; or imported. The
classes need OpenCompass; it is imported when one of them is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from streamline_bench.errors import MissingDependencyError

__all__ = [
    "BundledDataset",
    "StreamlineChatModel",
    "StreamlineModel",
    "StreamlineVLLM",
    "StreamlineVLLMChat",
]

_MODULES = {**dict.fromkeys(__all__, "models"), "BundledDataset": "datasets"}

OPENCOMPASS_INSTALL = (
    "pip install 'streamline-bench[opencompass]' && "
    "pip install --no-deps opencompass==0.5.4 mmengine-lite==0.11.0rc3"
)
"""Works with transformers 5; OpenCompass's declared dependencies ask for numpy below 2."""


def __getattr__(name: str) -> Any:
    """Import on first use: OpenCompass takes seconds to import, and need not be installed."""
    if name not in _MODULES:
        raise AttributeError(name)
    if find_spec("opencompass") is None or find_spec("mmengine") is None:
        raise MissingDependencyError(
            f"OpenCompass is not installed in this environment; run: {OPENCOMPASS_INSTALL}"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
