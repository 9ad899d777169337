"""Reads a YAML file that a user wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from streamline_bench.errors import RecipeError

__all__ = ["read_yaml_mapping"]


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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{path} cannot be read as YAML ({' '.join(str(error).split())})."
        ) from None
    if not isinstance(payload, dict):
        raise RecipeError(f"{path} is not {expected}.")
    return payload
