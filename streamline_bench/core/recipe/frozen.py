"""The base of schemas: what a file or a result holds does not change under its reader."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Frozen"]


class Frozen(BaseModel):
    """Immutable; a key that the schema does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
