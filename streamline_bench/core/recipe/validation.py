"""What is wrong with a value, as the part of a sentence: from a library, or an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

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


def wrong_value(error: ValidationError, schema: type[BaseModel], within: str = "") -> str:
    """Return the first problem of what a user gave: key and value, and what is wrong with them.

    Args:
        schema: of the whole, for the keys that would have been known.
        within: key under which the whole stands.

    Returns:
        With its full stop or question mark: ``unknown key 'training.lrr'; did you mean
        'training.lr'?``,
        ``'training.lr' is -1: Input should be greater than 0.``
    """
    problem = error.errors(include_url=False)[0]
    path = problem["loc"]
    where = ".".join(str(part) for part in ([within] if within else []) + list(path))
    if problem["type"] == "extra_forbidden":
        known = _fields_at(schema, path[:-1])
        parent = where.rpartition(".")[0]
        return f"unknown key '{where}'{suggest_or_list(str(path[-1]), known, parent)}"
    reason = problem["msg"].removeprefix(_OWN)
    # A sentence about values that contradict each other names them itself.
    return f"'{where}' is {problem.get('input')!r}: {reason}." if path else f"{reason}."


def _fields_at(schema: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    from pydantic import BaseModel

    for part in path:
        if isinstance(part, int):  # an item of a list of the schema
            continue
        annotation = schema.model_fields[part].annotation
        # An optional part is a union of its schema and None.
        schemas = [
            choice
            for choice in (annotation, *get_args(annotation))
            if isinstance(choice, type) and issubclass(choice, BaseModel)
        ]
        if not schemas:
            return []
        schema = schemas[0]
    return list(schema.model_fields)


def suggest(name: str, known: Iterable[str], within: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string.

    Args:
        within: dotted key that the names stand under; the suggestion names the whole key.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{within}{'.' if within else ''}{close[0]}'?" if close else ""


def suggest_or_list(name: str, known: Iterable[str], within: str = "") -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, or all of them."""
    names = list(known)
    listed = f"; known: {', '.join(names)}." if names else "; there are none here."
    return suggest(name, names, within) or listed
