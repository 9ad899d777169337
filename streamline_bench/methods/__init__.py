"""Compression methods behind one interface; see CONTRIBUTING.md for adding one."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CachedCheckpoint",
    "compress",
    "compress_cached",
    "list_recipes",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must answer ``--help`` without torch."""
    if name in ("CachedCheckpoint", "compress", "compress_cached"):
        from streamline_bench.methods import compression

        return getattr(compression, name)
    if name in ("list_recipes", "load_recipe"):
        from streamline_bench.methods import library

        return getattr(library, name)
    raise AttributeError(name)
