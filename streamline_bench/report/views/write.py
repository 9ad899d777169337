"""Writes the four files of a report, each atomically, ``leaderboard.html`` last."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.recipe.validation import first_problem
from streamline_bench.errors import OutputError, SamplesError
from streamline_bench.report.board.published import published_numbers
from streamline_bench.report.data.removed_layers import block_start
from streamline_bench.report.data.schema import Leaderboard
from streamline_bench.report.views.csv_view import to_csv
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.stability.comparison import Estimate

__all__ = ["read_leaderboard", "upgraded", "write_report"]


def write_report(leaderboard: Mapping[str, Any], output: Path) -> Path:
    """Write leaderboard.json, leaderboard.csv, leaderboard.md and leaderboard.html into ``output``.

    Args:
        leaderboard: of :func:`streamline_bench.report.board.leaderboard.build_leaderboard`.
        output: folder, made if missing; files of an earlier report are replaced.

    Returns:
        The path of ``leaderboard.html``.

    Raises:
        SamplesError: the data does not follow the schema, or holds a number that is not finite.
        OutputError: the folder cannot be written.
    """
    board = _validated(leaderboard, "the leaderboard")
    output = Path(output)
    views = {
        "leaderboard.json": _json(board),
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


def read_leaderboard(path: Path) -> dict[str, Any]:
    """Read and validate a ``leaderboard.json``.

    Raises:
        SamplesError: the file is missing, damaged or of another schema version.
    """
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SamplesError(f"{path} cannot be read ({error}); make the report again.") from None
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if isinstance(version, int) and version > 3:
        raise SamplesError(
            f"{path} has schema version {version}, newer than 3; upgrade streamline-bench."
        )
    if version in (1, 2):
        try:
            payload = upgraded(payload)
        except (KeyError, TypeError, ValidationError) as error:
            raise SamplesError(
                f"{path} is no leaderboard of version {version} "
                f"({' '.join(str(error).split())}); make the report again."
            ) from None
    return _validated(payload, str(path))


def _json(board: Mapping[str, Any]) -> str:
    try:
        return json.dumps(board, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise SamplesError(
            f"The leaderboard holds a number that is not finite, in {_not_finite(board)}; no "
            "report is written."
        ) from None


def _not_finite(value: Any, where: str = "") -> str:
    """Where the first such number stands, e.g. ``rows.2.scan.cosine.0.1``."""
    if isinstance(value, float):
        return where if not math.isfinite(value) else ""
    if not isinstance(value, dict | list):
        return ""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    inside = (_not_finite(part, f"{where}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, inside), "")


def _validated(payload: Any, origin: str) -> dict[str, Any]:
    try:
        return Leaderboard.model_validate(payload).model_dump(mode="json")
    except ValidationError as error:
        raise SamplesError(f"{origin}: {first_problem(error, 'leaderboard')}.") from None


def upgraded(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the board of version 1 or 2 as one of version 3; not validated.

    What was added since has defaults, but for two things that the board itself knows: which of its
    numbers stand beside published ones, and which layers a block was made of.
    """
    rows = payload.get("rows")
    if not isinstance(rows, list):
        return {**payload, "schema_version": 3}
    return {
        **payload,
        "schema_version": 3,
        "rows": [_row(row) if isinstance(row, Mapping) else row for row in rows],
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **_published(row), **_scan(row)}


def _published(row: Mapping[str, Any]) -> dict[str, Any]:
    if not row.get("published"):
        return {}
    accuracies = {
        name: Estimate.model_validate(found)
        for name, found in (
            *((task["task"], task["accuracy"]) for task in row["tasks"] if task["main"]),
            *((group["group"], group["pruned"]) for group in row.get("groups") or ()),
        )
    }
    macro = row.get("macro") or {}
    own = {
        name: Estimate.model_validate(macro[name]) if macro.get(name) else None
        for name in ("stability", "retention")
    }
    recipe = {"name": row.get("label"), "published": row["published"]}
    return {"published": [one.model_dump() for one in published_numbers(recipe, accuracies, **own)]}


def _scan(row: Mapping[str, Any]) -> dict[str, Any]:
    scan = row.get("scan")
    if not scan:
        return {}
    removed = sorted(
        ((row.get("provenance") or {}).get("chosen") or {}).get("removed_layers") or ()
    )
    return {"scan": {**scan, "removed": removed, "start": block_start(removed)}}
