"""Which versions made a result."""

from __future__ import annotations

import platform
from importlib import metadata

from streamline_bench.version import __version__

__all__ = ["package_versions"]

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "lm_eval")


def package_versions() -> dict[str, str]:
    """Return the versions of this package, Python and the packages that decide a result."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"streamline-bench": __version__, "python": platform.python_version(), **found}
