"""A row's token divergence, for the leaderboard."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from streamline_bench.errors import SamplesError
from streamline_bench.stability.comparison import TokenDivergence

__all__ = ["read_divergence"]


def read_divergence(path: Path | None) -> TokenDivergence | None:
    """Return what a ``divergence.json`` holds; None without one.

    Raises:
        SamplesError: the file is missing or damaged.
    """
    if path is None:
        return None
    try:
        return TokenDivergence.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = " ".join(str(error).split())[:160]
        raise SamplesError(f"{path} cannot be read ({first}); make the run again.") from None
