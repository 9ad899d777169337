"""What a paper's reader looks for first: tasks, machine, time, tokens, scaled-down settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.text import duration

_AMOUNTS = ("samples", "tokens", "sequence_length", "epochs", "min_steps")
"""Keys of a recipe's data and training that say how much a model sees."""


def _measured(board: Leaderboard) -> list[Row]:
    """The runs that have a result, each for itself."""
    return [row for row in board.rows if row.failed is None]


def tokens_seen(row: Row) -> dict[str, int]:
    """Tokens by what they were read for: calibration, training (every epoch), recovery."""
    training = row.provenance.training or {}
    recovery = training.get("recovery")
    found = {
        "calibration": row.provenance.calibration.get("tokens"),
        "training": training.get("tokens"),
        "recovery": recovery.get("tokens") if isinstance(recovery, Mapping) else None,
    }
    return {stage: count for stage, count in found.items() if isinstance(count, int) and count}


def scaled_down(board: Leaderboard) -> str | None:
    """A sentence where recipes were given less data or fewer steps than they name themselves."""
    made = [row for row in _measured(board) if not row.is_dense and row.provenance.recipe]
    less = [row for row in made if any(_is_less(*each) for each in row.overridden.items())]
    if not less:
        return None
    return (
        f"Scaled-down settings: {len(less)} of {len(made)} compressed models had less data or "
        "fewer steps than their recipes name. This is not a ranking of the papers."
    )


def _is_less(key: str, values: tuple[Any, Any]) -> bool:
    own, used = values
    return (
        key.rpartition(".")[2] in _AMOUNTS
        and isinstance(own, int | float)
        and isinstance(used, int | float)
        and used < own
    )


def setup(board: Leaderboard) -> list[tuple[str, str]]:
    """Tasks with shots, model, machine, tokens seen, time in all; what is unknown is not there."""
    rows = _measured(board)
    origin = board.dense_row.provenance
    sources = (row.provenance.source for row in rows if row.provenance.source)
    measured = (row.throughput.device for row in rows if row.throughput)
    seconds = sum(row.total_seconds or 0.0 for row in board.rows)
    found = [
        ("Tasks", _tasks(board)),
        ("Model", str(next(sources, origin.model) or "")),
        ("Machine", origin.machine or next(measured, None) or ""),
        ("Engine", origin.evaluated_with or ""),
        ("Calibration", _calibration(rows)),
        ("Training", _trained(rows)),
        ("Text of the token KL", _text(rows)),
        ("Time in all", f"{duration(seconds)}, all models together" if seconds else ""),
    ]
    return [(name, value) for name, value in found if value]


def _tasks(board: Leaderboard) -> str:
    tasks = [task for task in board.dense_row.tasks if task.main]
    return ", ".join(
        f"{task.task} ({task.n:,}{f', {task.shots}-shot' if task.shots is not None else ''})"
        for task in tasks
    )


def _calibration(rows: Sequence[Row]) -> str:
    """How many tokens in which form, the most used first."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if tokens := tokens_seen(row).get("calibration"):
            found.setdefault(f"{tokens:,} tokens{_sequences(row)}", []).append(_recipe(row))
    return _listed(found)


def _sequences(row: Row) -> str:
    """Whole documents are shorter than what is cut from one long text."""
    data = row.provenance.calibration
    count, length = data.get("sequences"), data.get("sequence_length")
    if not isinstance(count, int) or not isinstance(length, int):
        return ""
    wanted = (row.provenance.recipe or {}).get("calibration")
    packed = not isinstance(wanted, Mapping) or wanted.get("form", "packed") == "packed"
    return f" ({count:,} {'sequences of' if packed else 'documents, each cut at'} {length:,})"


def _trained(rows: Sequence[Row]) -> str:
    """Tokens of training and of recovery, every epoch counted."""
    found: dict[str, list[str]] = {}
    for row in rows:
        seen = tokens_seen(row)
        parts = [f"{seen[name]:,} tokens" for name in ("training", "recovery") if name in seen]
        if parts:
            found.setdefault(" and ".join(parts), []).append(_recipe(row))
    return f"{_listed(found)}; every epoch counted" if found else ""


def _listed(found: Mapping[str, Sequence[str]]) -> str:
    """What rows have in common, with the recipes of all but the largest group."""
    parts = sorted(found.items(), key=lambda item: -len(item[1]))
    return "; ".join(
        words if not number and len(parts) > 1 and len(names) > _NAMED
        else f"{words}: {', '.join(dict.fromkeys(names))}"
        for number, (words, names) in enumerate(parts)
    )  # fmt: skip


_NAMED = 6
"""So many rows are named by their recipes; the others are the rest."""


def _recipe(row: Row) -> str:
    return row.group or row.label


def _text(rows: Sequence[Row]) -> str:
    read = next((row.divergence for row in rows if row.divergence), None)
    if read is None:
        return ""
    return (
        f"{read.tokens:,} tokens of {read.documents:,} documents, windows of {read.window:,} tokens"
    )
