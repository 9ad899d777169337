"""Reads structured files: YAML that a user wrote, JSON that names its schema's version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from streamline_bench.core.recipe.validation import first_problem
from streamline_bench.errors import RecipeError, StreamlineBenchError

Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path, error: type[StreamlineBenchError], advice: str) -> Any:
    """Return what a file holds.

    Args:
        error: what to raise.
        advice: what to do then: ``make the report again``.

    Raises:
        StreamlineBenchError: ``error``, where the file is missing or is not JSON.
    """
    try:
        # Unlike json, it refuses half a surrogate pair and nesting without end.
        return from_json(path.read_bytes())
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be read ({failure}); {advice}.") from None


def validated(
    model: type[Model],
    payload: Any,
    origin: str,
    *,
    newest: int,
    error: type[StreamlineBenchError],
    advice: str,
) -> Model:
    """Return what a file holds as a model.

    Args:
        origin: the file, for the message.
        newest: the highest ``schema_version`` that is known.
        error, advice: as for :func:`read_json`.

    Raises:
        StreamlineBenchError: ``error``, where the version is newer or the content does not follow
            the schema; the first problem is named.
    """
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if isinstance(version, int) and version > newest:
        raise error(
            f"{origin} has schema version {version}, newer than {newest}; upgrade streamline-bench."
        )
    try:
        return model.model_validate(payload)
    except ValidationError as failure:
        raise error(f"{origin}: {first_problem(failure)}; {advice}.") from None


def read_yaml_mapping(path: Path, expected: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
        expected: what the file is and must hold, for the message if it holds something else
            (``a plan: it must hold a mapping such as 'tasks: [piqa]'``).

    Raises:
        RecipeError: it cannot be read, is not YAML or holds no mapping.
    """
    try:
        payload = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(payload, default=str, skipkeys=True)  # fails if a list holds itself
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{path} cannot be read as YAML ({' '.join(str(error).split())})."
        ) from None
    if not isinstance(payload, dict):
        raise RecipeError(f"{path} is not {expected}.")
    return payload
