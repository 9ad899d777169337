"""Strings of models, data sets and runs are hostile until escaped for the view they go to."""

from __future__ import annotations

import re
import unicodedata

from streamline_bench.core.machine.terminal import printable

__all__ = ["csv_cell", "markdown_text", "terminal_text", "visible_text"]

# Overrides of the reading direction can make a text show something else than it says.
_DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_WWW = re.compile(r"(?<=www)\.", re.IGNORECASE)
_MARKDOWN = re.compile(r"([\\`*_\[\]{}()#+!|~$-])")


def visible_text(value: object, *, keep: str = "\n\t") -> str:
    """Text without control characters and direction overrides; each becomes U+FFFD."""
    return "".join(
        character
        if character in keep
        or not (
            character in _DIRECTION or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        )
        else "\ufffd"
        for character in str(value)
    )


def terminal_text(value: object) -> str:
    """One printable line: no escape sequences, no line breaks."""
    return printable(" ".join(str(value).split("\n")))


def markdown_text(value: object) -> str:
    """Text that Markdown (GitHub's, inside a table too) shows as it is, on one line."""
    line = " ".join(visible_text(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKDOWN.sub(r"\\\1", line)
    # GitHub makes links of bare addresses, with and without a scheme.
    line = _WWW.sub(r"\\.", line)
    return line.replace("://", ":&#47;&#47;").replace("@", "&#64;")


def csv_cell(value: object) -> object:
    """Numbers as they are; text that a spreadsheet would run as a formula gets a quote in front."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = visible_text(value, keep="")
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text
