"""Published numbers of a recipe, beside the task of this report that each of them names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from streamline_bench.errors import SamplesError
from streamline_bench.report.schema import Published

__all__ = ["published_numbers"]


def published_numbers(recipe: Mapping[str, Any], tasks: Iterable[str]) -> list[Published]:
    """Return the recipe's ``published`` section; metrics find tasks by their letters and digits.

    ``HellaSwag`` finds ``hellaswag``, ``ARC-easy`` finds ``arc_easy``; ``average of 13`` nothing.

    Raises:
        SamplesError: an entry is not a published number.
    """
    by_letters = {_letters(task): task for task in tasks}
    try:
        return [
            Published.model_validate({**entry, "task": by_letters.get(_letters(entry["metric"]))})
            for entry in recipe.get("published") or ()
        ]
    except (ValidationError, KeyError, TypeError) as error:
        raise SamplesError(
            f"The recipe '{recipe.get('name')}' has a published number that cannot be read "
            f"({' '.join(str(error).split())}); it needs model, metric, value and source."
        ) from None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
