"""What a dumped OpenCompass config says: which data sets, asked how often, and which models.

OpenCompass saves the whole config of a run as Python source in ``<work>/<time>/configs/*.py``.
It is read as data: nothing in it is executed, and what is not a literal or ``dict(...)`` is None.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.errors import SamplesError

__all__ = ["DumpedConfig", "read_dumped_config"]


@dataclass(frozen=True)
class DumpedConfig:
    """The parts of a config that its predictions do not repeat.

    Attributes:
        repetitions: data set -> how many times each question was asked (``n`` of its config).
        models: model abbreviation -> the model's config, literals only.
    """

    repetitions: Mapping[str, int] = field(default_factory=dict)
    models: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def read_dumped_config(run: Path) -> DumpedConfig | None:
    """Read the newest config of a run folder ``<work>/<time>``; None where it has none.

    Raises:
        SamplesError: the config is not Python source.
    """
    files = sorted((run / "configs").glob("*.py"))
    if not files:
        return None
    try:
        tree = ast.parse(files[-1].read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise SamplesError(
            f"{files[-1]} is not a config that OpenCompass wrote ({error}); remove it or run again."
        ) from None
    values = {
        target.id: _literal(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return DumpedConfig(
        repetitions={
            str(entry["abbr"]): entry["n"] if isinstance(entry.get("n"), int) else 1
            for entry in _entries(values.get("datasets"))
        },
        models={str(entry["abbr"]): entry for entry in _entries(values.get("models"))},
    )


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    """Dictionaries with a name, in lists of any depth."""
    if isinstance(value, dict) and value.get("abbr"):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _entries(part)


def _literal(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {item.arg: _literal(item.value) for item in node.keywords if item.arg}
    if isinstance(node, ast.Dict):
        return {
            str(_literal(key)): _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
        }
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(part) for part in node.elts]
    try:
        value = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
    return value if isinstance(value, bool | int | float | str) else None
