"""What a library found wrong, as the part of a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["first_line", "first_problem"]

_OWN = "Value error, "
"""What pydantic puts in front of a validator's own words."""


def first_problem(error: ValidationError, whole: str = "file") -> str:
    """Return the first problem: where it is, and what is wrong there.

    Args:
        whole: what the place is called where the problem is not in one part.

    Returns:
        Without a full stop: ``'rows.0.label': Field required``.
    """
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    return f"'{where}': {first['msg'].removeprefix(_OWN)}"


def first_line(error: object, most: int = 200) -> str:
    """Return what an exception says in its first line; its type where it says nothing.

    A line that ends with a colon says nothing without the next one.

    Args:
        most: characters.

    Returns:
        Without a full stop.
    """
    lines = [" ".join(line.split()) for line in str(error).strip().splitlines()]
    told = lines[0] if lines else type(error).__name__
    if told.endswith(":") and len(lines) > 1:
        told = f"{told} {lines[1]}"
    return told.rstrip(".") if len(told) <= most else f"{told[:most].rstrip()}…"
