"""From a model and a recipe to a checkpoint: read the recipe, run its method, write, cache."""

from __future__ import annotations

from typing import Any

__all__ = ["CachedCheckpoint", "compress", "compress_cached", "list_recipes", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must answer ``--help`` without torch."""
    if name in ("CachedCheckpoint", "compress", "compress_cached"):
        from streamline_bench.compression import pipeline

        return getattr(pipeline, name)
    if name in ("list_recipes", "load_recipe"):
        from streamline_bench.compression import recipes

        return getattr(recipes, name)
    raise AttributeError(name)
