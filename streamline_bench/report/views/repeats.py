"""What the rows of a recipe at several sizes repeat, said once: literature, settings, commands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from streamline_bench.report.provenance import is_model
from streamline_bench.report.row import Published, Row

_Row = TypeVar("_Row", bound=Row)


def published_beside(rows: Sequence[_Row]) -> list[tuple[_Row, list[Published]]]:
    """Rows with published numbers; of several sizes, each number stands beside the nearest one."""
    nearest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        for number in row.published:
            key = _key(row, number)
            if key not in nearest or _distance(row, number) < _distance(nearest[key], number):
                nearest[key] = row
    found = [
        (row, [number for number in row.published if nearest[_key(row, number)] is row])
        for row in rows
    ]
    return [(row, numbers) for row, numbers in found if numbers]


def literature(rows: Sequence[_Row]) -> list[tuple[bool, list[tuple[_Row, list[Published]]]]]:
    """Published numbers on the same model, then those on others, by row; neither if empty."""
    found = []
    for wanted in (True, False):
        parts = [
            (row, [one for one in numbers if is_model(row, one.model) is wanted])
            for row, numbers in published_beside(rows)
        ]
        kept = [(row, numbers) for row, numbers in parts if numbers]
        if kept:
            found.append((wanted, kept))
    return found


def _key(row: Row, number: Published) -> tuple[Any, ...]:
    said = (number.model, number.metric, number.value, number.sparsity, number.source)
    return _recipe(row), *said


def _distance(row: Row, number: Published) -> float:
    """From the size that a number was published for; of one without size, from the dense model."""
    return abs((row.sparsity_reached or 0.0) - (number.sparsity or 0.0))


def _recipe(row: Row) -> str:
    """What the rows of one recipe at several sizes have in common."""
    return (row.group if row.size else None) or row.label


class Setting(NamedTuple):
    """A key that rows have another value of than their recipe's own."""

    rows: str
    key: str
    used: Any
    own: Any


def settings(rows: Sequence[Row]) -> list[Setting]:
    """Every overridden key; rows of one recipe that share the value are named by the recipe."""
    labels: dict[tuple[str, ...], list[str]] = {}
    values: dict[tuple[str, ...], tuple[Any, Any]] = {}
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[_recipe(row)] = sizes.get(_recipe(row), 0) + 1
        for name, (own, used) in row.overridden.items():
            key = (_recipe(row), name, str(used), str(own))
            labels.setdefault(key, []).append(row.label)
            values[key] = used, own
    return [
        Setting(
            key[0] if len(named) == sizes[key[0]] else ", ".join(named), key[1], *values[key]
        )
        for key, named in labels.items()
    ]  # fmt: skip


ROW = "ROW"
"""Stands for the label in a command that several rows share."""


class Command(NamedTuple):
    """A command line; with ``rows``, it is that of each of them, the label in the place of ROW."""

    line: str
    rows: Sequence[str] = ()


def commands(stages: Mapping[str, Sequence[str]], rows: Sequence[Row]) -> dict[str, list[Command]]:
    """Command lines by stage; those of rows at several sizes once."""
    labels = sorted((row.label for row in rows if row.size), key=len, reverse=True)
    if not labels:
        return {stage: [Command(line) for line in lines] for stage, lines in stages.items()}
    pattern = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, labels))})(?![\w.])")
    return {stage: _shared(lines, pattern) for stage, lines in stages.items()}


def _shared(lines: Sequence[str], pattern: re.Pattern[str]) -> list[Command]:
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        named = set(pattern.findall(line))
        label = named.pop() if len(named) == 1 else ""
        found.setdefault(pattern.sub(ROW, line) if label else line, []).append((label, line))
    return [
        Command(shared, [label for label, _ in each]) if len(each) > 1 else Command(each[0][1])
        for shared, each in found.items()
    ]
