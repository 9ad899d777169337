"""Writes the four files of a report, each atomically, ``leaderboard.html`` last."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.errors import OutputError, SamplesError
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html


def write_report(board: Leaderboard, output: Path) -> Path:
    """Write leaderboard.json, leaderboard.csv, leaderboard.md and leaderboard.html into ``output``.

    Args:
        output: folder, made if missing; files of an earlier report are replaced.

    Returns:
        The path of ``leaderboard.html``.

    Raises:
        SamplesError: the leaderboard holds a number that is not finite.
        OutputError: the folder cannot be written.
    """
    output = Path(output)
    views = {
        "leaderboard.json": to_json(board),
        "leaderboard.csv": to_csv(board),
        "leaderboard.md": to_markdown(board),
        "leaderboard.html": to_html(board),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in views.items():
            atomic_write_text(output / name, text)
    except OSError as error:
        raise OutputError(
            f"The report cannot be written to '{output}' ({error.strerror or error})."
        ) from None
    return output / "leaderboard.html"


def to_json(board: Leaderboard) -> str:
    """The leaderboard as JSON without blanks, every number unrounded.

    Raises:
        SamplesError: a number is not finite; its place is named.
    """
    payload = board.model_dump(mode="json")
    try:
        return (
            json.dumps(payload, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
        )
    except ValueError:
        raise SamplesError(
            f"The leaderboard holds a number that is not finite, in {_not_finite(payload)}; no "
            "report is written."
        ) from None


def _not_finite(value: object, where: str = "") -> str:
    """The first place of such a number, e.g. ``rows.2.scan.cosine.0.1``."""
    if isinstance(value, float):
        return where if not math.isfinite(value) else ""
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        parts = list(enumerate(value))
    else:
        return ""
    inside = (_not_finite(part, f"{where}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, inside), "")
