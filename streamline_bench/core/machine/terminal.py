"""Text for a terminal: a name from a model or a file may hold escape sequences."""

from __future__ import annotations

__all__ = ["printable"]


def printable(value: object, *, keep: str = "") -> str:
    """Return the text with every character that is neither printable nor in ``keep`` as U+FFFD."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in str(value))
