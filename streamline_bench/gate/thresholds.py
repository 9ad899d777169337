"""How much may be lost before a gate closes."""

from __future__ import annotations

from pydantic import Field

from streamline_bench.core.recipe.frozen import Frozen

__all__ = ["Thresholds"]


class Thresholds(Frozen):
    """What a gate tolerates, and how sure it must be.

    Attributes:
        accuracy: tolerated drop of accuracy, as a share (0.02 is two points).
        stability: tolerated drop of stability, as a share.
        speed: tolerated drop of tokens per second and of the ratio to dense, relative (0.05).
        confidence: of all intervals.
        draws, seed: of the bootstrap.
        strict: whether what cannot be told closes the gate too.
    """

    accuracy: float = Field(default=0.02, ge=0, lt=1)
    stability: float = Field(default=0.02, ge=0, lt=1)
    speed: float = Field(default=0.05, ge=0, lt=1)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    draws: int = Field(default=10_000, ge=100)
    seed: int = Field(default=0, ge=0)
    strict: bool = False
