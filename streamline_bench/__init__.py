"""streamline-bench: what a large language model loses and gains when layers are removed.

PYTEST_DONT_REWRITE: the line of our .pth file imports this package before pytest starts, which
would then warn, in everybody's tests, that it cannot rewrite it.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
