"""streamline-bench: what a large language model loses and gains when layers are removed.

The names below are the library's front door; they are imported on first use, so that
``import streamline_bench`` costs nothing. Two finished evaluations are compared by
:mod:`streamline_bench.stability`, speeds measured by :mod:`streamline_bench.throughput`.

PYTEST_DONT_REWRITE: the line of our .pth file imports this package before pytest starts, which
would then warn, in everybody's tests, that it cannot rewrite it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamline_bench.core.recipe import Recipe
    from streamline_bench.methods.compression import compress, compress_cached
    from streamline_bench.methods.library import list_recipes, load_recipe
    from streamline_bench.runs.comparison import CompareResult, compare

__version__ = "0.1.0"

__all__ = [
    "CompareResult",
    "Recipe",
    "__version__",
    "compare",
    "compress",
    "compress_cached",
    "list_recipes",
    "load_recipe",
]

_WHERE = {
    "CompareResult": "runs.comparison",
    "Recipe": "core.recipe",
    "compare": "runs.comparison",
    "compress": "methods.compression",
    "compress_cached": "methods.compression",
    "list_recipes": "methods.library",
    "load_recipe": "methods.library",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
