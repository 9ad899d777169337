"""streamline-bench: what a large language model loses and gains when layers are removed.

The names below are the library's front door; they are imported on first use, so that
``import streamline_bench`` costs nothing. Two finished evaluations are compared by
:mod:`streamline_bench.stability`, speeds measured by :mod:`streamline_bench.throughput`.

PYTEST_DONT_REWRITE: the line of our .pth file imports this package before pytest starts, which
would then warn, in everybody's tests, that it cannot rewrite it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamline_bench.version import __version__

if TYPE_CHECKING:
    from streamline_bench.compression.pipeline import compress, compress_cached
    from streamline_bench.compression.recipes import list_recipes, load_recipe
    from streamline_bench.core.recipe.schema import Recipe
    from streamline_bench.report.frame import results
    from streamline_bench.runs.run import CompareResult, compare

__all__ = [
    "CompareResult",
    "Recipe",
    "__version__",
    "compare",
    "compress",
    "compress_cached",
    "list_recipes",
    "load_recipe",
    "results",
]

_WHERE = {
    "CompareResult": "runs.run",
    "Recipe": "core.recipe.schema",
    "compare": "runs.run",
    "compress": "compression.pipeline",
    "compress_cached": "compression.pipeline",
    "list_recipes": "compression.recipes",
    "load_recipe": "compression.recipes",
    "results": "report.frame",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
