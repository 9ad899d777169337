"""Engines by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from streamline_bench.core.recipe.suggestions import suggest
from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.engines.base import Engine, EngineSettings, Loaded

__all__ = ["ENGINES", "Engine", "EngineSettings", "Loaded", "engine_class", "engine_path"]

ENGINES: Mapping[str, str] = {
    "hf": "streamline_bench.throughput.engines.hf:TransformersEngine",
    "vllm": "streamline_bench.throughput.engines.vllm:VLLMEngine",
}
"""Name -> ``module:Class``."""


def engine_path(name: str) -> str:
    """Return ``module:Class`` of an engine; a name of that form stands for itself.

    Raises:
        ThroughputError: there is no engine of this name.
    """
    if ":" in name:
        return name
    if name not in ENGINES:
        raise ThroughputError(f"There is no engine '{name}'{suggest(name, list(ENGINES))}")
    return ENGINES[name]


def engine_class(name: str) -> type[Engine]:
    """Return the class of an engine.

    Raises:
        ThroughputError: there is no engine of this name.
    """
    module, _, attribute = engine_path(name).partition(":")
    found: type[Engine] = getattr(importlib.import_module(module), attribute)
    return found
