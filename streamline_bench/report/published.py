"""Published numbers of a recipe, each with what its row reached on the same benchmark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from streamline_bench.errors import SamplesError
from streamline_bench.report.leaderboard import Published
from streamline_bench.stability.comparison import Estimate


def published_numbers(
    recipe: Mapping[str, Any],
    accuracies: Mapping[str, Estimate],
    *,
    stability: Estimate | None = None,
    retention: Estimate | None = None,
) -> list[Published]:
    """Return the recipe's ``published`` section; a metric finds the task or group of its name.

    ``PIQA`` finds ``piqa`` and ``local_piqa``, ``MMLU`` the group ``mmlu``; ``stability`` and
    ``retained average`` are the row's own, over its tasks; ``average of 13`` finds nothing, because
    its tasks differ. A number that is not in percent is compared with none of ours.

    Args:
        recipe: with ``published``, a list of mappings (see
            :class:`~streamline_bench.core.recipe.schema.PublishedResult`).
        accuracies: name of a task or group -> the row's accuracy, what is preferred first.
        stability, retention: of the row, over its tasks.

    Raises:
        SamplesError: an entry is not a published number.
    """
    named: dict[str, str] = {}
    for name in accuracies:
        named.setdefault(benchmark(name), name)
    own = {"stability": stability, "retainedaverage": retention}
    found = []
    for entry in _entries(recipe):
        key = benchmark(entry.metric)
        task = named.get(key) if entry.unit == "%" else None
        ours = accuracies[task] if task is not None else own.get(key)
        found.append(entry.model_copy(update={"task": task, "ours": ours}))
    return found


def _entries(recipe: Mapping[str, Any]) -> list[Published]:
    try:
        return [
            Published.model_validate({**entry, "task": None, "ours": None})
            for entry in recipe.get("published") or ()
        ]
    except (ValidationError, TypeError) as error:
        raise SamplesError(
            f"The recipe '{recipe.get('name')}' has a published number that cannot be read "
            f"({' '.join(str(error).split())}); it needs model, metric, value and source."
        ) from None


_PREFIXES = ("local_", "streamline_")
"""Of this project's own tasks (``tasks/lm_eval``)."""

_ALIASES = {
    "arcc": "arcchallenge",
    "arce": "arceasy",
    "chiddev": "chid",
    "csqa": "commonsenseqa",
    "hesw": "hellaswag",
    "obqa": "openbookqa",
    "raceh": "racehigh",
    "racem": "racemiddle",
    "winogrand": "winogrande",
}
"""Letters and digits of a name in tables of papers -> those of the name in the harnesses."""


def benchmark(name: str) -> str:
    """Return the benchmark that a task, a group or a metric names, in letters and digits.

    ``ARC-e``, ``arc_easy`` and ``local_arc_easy`` are one; CoQA and CommonsenseQA are two, though
    tables made with OpenCompass call the second by the first's name.
    """
    bare = name.strip().lower()
    prefix = next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), "")
    letters = re.sub(r"[^a-z0-9]", "", bare[len(prefix) :])
    return _ALIASES.get(letters, letters)
