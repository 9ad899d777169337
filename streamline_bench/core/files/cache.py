"""The folder in which results of this user are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["user_cache"]


def user_cache() -> Path:
    """Return the user's cache of streamline-bench (not created)."""
    named = os.environ.get("STREAMLINE_BENCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "streamline-bench"
