"""streamline-bench: what a large language model loses and gains when layers are removed."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
