"""``did you mean`` for names that a user mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["suggest", "suggest_or_list"]


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def suggest_or_list(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, or all of them."""
    names = list(known)
    listed = f"; known: {', '.join(names)}." if names else "; there are none here."
    return suggest(name, names) or listed
