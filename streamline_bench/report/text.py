"""How a report writes numbers, and how it makes strings of models, data sets and runs harmless.

Shares are written in percent, differences in points with their sign. A string of a run may hold
escape sequences or markup until it is escaped for the view that shows it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING

from streamline_bench.core.machine.environment import printable

if TYPE_CHECKING:
    from streamline_bench.stability.comparison import GradeComparison
    from streamline_bench.stability.estimate import Estimate

# Overrides of the reading direction can make a text show something else than it says.
_DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_WWW = re.compile(r"(?<=www)\.", re.IGNORECASE)
_MARKDOWN = re.compile(r"([\\`*_\[\]{}()#+!|~$-])")

MISSING = "\N{EN DASH}"
"""What stands where there is no number."""
MINUS = "\N{MINUS SIGN}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.8125 -> ``81.2`` (the unit stands in the heading)."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    """-0.031 -> ``−3.1`` percentage points, always with a sign."""
    return decimal(None if value is None else 100 * value, digits, signed=True)


def _ends(estimate: Estimate | None, write: Callable[..., str], **options: bool) -> str:
    if estimate is None or estimate.low is None:
        return ""
    return f"[{write(estimate.low, **options)}, {write(estimate.high, **options)}]"


def interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    """``[70.1, 84.2]`` in percent, or an empty string without one."""
    return _ends(estimate, points if signed else percent)


def nats(estimate: Estimate | None, *, signed: bool = False) -> str:
    """``[0.011, 0.042]``: the interval of a number in nats, or an empty string without one."""
    return _ends(estimate, decimal, signed=signed)


def with_interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    """``−3.1 [−5.0, −1.2]``; nothing without an estimate."""
    if estimate is None:
        return ""
    write = points if signed else percent
    return f"{write(estimate.value)} {interval(estimate, signed=signed)}".strip()


def with_error(estimate: Estimate | None) -> str:
    """``81.2 ± 1.1`` in percent."""
    if estimate is None:
        return MISSING
    error = estimate.standard_error
    return percent(estimate.value) + (f" ± {percent(error)}" if error is not None else "")


def p_value(value: float | None) -> str:
    """Two significant digits, never a false zero."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def count(value: float | None) -> str:
    """6738415616 -> ``6.74 B``."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, two units at most."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def decimal(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """-0.0312 -> ``−0.031``: nats, Brier scores, kappas."""
    if value is None:
        return MISSING
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+' if signed else ''}{text}"


def significant(value: float | None, digits: int = 4) -> str:
    """17.3571 -> ``17.36``, 3.2e9 -> ``3.2e+09``."""
    return MISSING if value is None else f"{value:.{digits}g}"


def stored(value: float) -> str:
    """12.86 -> ``12.86``, 72.0 -> ``72``: every digit that a number was given with."""
    return f"{value:.10g}"


def times(value: float | None) -> str:
    """1.3125 -> ``1.31×``."""
    return MISSING if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def rate(value: float | None) -> str:
    """1234.5 -> ``1,234``; 12.34 -> ``12.3`` (tokens per second)."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


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
    # GitHub makes links of bare addresses, with and without a scheme.
    line = _WWW.sub(r"\\.", _MARKDOWN.sub(r"\\\1", line))
    return line.replace("://", ":&#47;&#47;").replace("@", "&#64;")


_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
     "^": r"\textasciicircum{}", MINUS: "$-$", "\N{PLUS-MINUS SIGN}": r"$\pm$",
     "\N{MULTIPLICATION SIGN}": r"$\times$", MISSING: "--", "<": r"\textless{}",
     ">": r"\textgreater{}", "[": "{[}", "]": "{]}", **{sign: f"\\{sign}" for sign in "$&#%_"}}
)  # fmt: skip


def latex_text(value: object) -> str:
    """Text that LaTeX sets as it is, on one line: no command of a string is run."""
    return visible_text(" ".join(str(value).split()), keep="").translate(_LATEX)


def csv_cell(value: object) -> object:
    """Numbers as they are; text that a spreadsheet would run as a formula gets a quote in front."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = visible_text(value, keep="")
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def ratio(estimate: Estimate | None) -> str:
    """``1.31× [1.25×, 1.38×]``; nothing without one."""
    if estimate is None:
        return ""
    return f"{times(estimate.value)} {_ends(estimate, times)}".strip()


def grade_mean(found: GradeComparison, estimate: Estimate) -> str:
    """A grade as ``81.2 ± 1.1`` in percent of the highest; another metric as ``17.36``."""
    return with_error(estimate) if found.kind == "grade" else significant(estimate.value)


def grade_change(found: GradeComparison) -> str:
    """A grade as ``−3.1 [−5.0, −1.2]`` in points, a ratio as ``1.31× [1.25×, 1.38×]``."""
    if found.kind == "grade":
        return with_interval(found.difference, signed=True)
    if found.kind == "ratio":
        return ratio(found.ratio) or MISSING
    value = found.difference.value if found.difference else None
    return f"{decimal(value, signed=True)} {nats(found.difference, signed=True)}".strip()


FILTERS = {
    write.__name__: write
    for write in (
        *(count, decimal, duration, interval, nats, p_value, percent, points, rate, significant),
        *(grade_change, grade_mean, ratio, stored, times, with_error, with_interval),
    )
}
"""What the templates call by name."""
