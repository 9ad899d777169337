"""Benchmarks under the names that papers, harnesses and this project's tasks give them."""

from __future__ import annotations

import re

__all__ = ["benchmark"]

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
