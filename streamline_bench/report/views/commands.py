"""The command lines of a run by what they do, for a reader who repeats it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

__all__ = ["commands_by_stage"]

_STAGES = {
    "compress": "Compress",
    "scan": "Compress",
    "lm_eval": "Evaluate",
    "lm-eval": "Evaluate",
    "opencompass": "Evaluate",
    "divergence": "Compare on a text",
    "throughput": "Measure speed",
    "compare": "All at once",
}
_OTHER = "Other"


def commands_by_stage(commands: Iterable[str]) -> dict[str, list[str]]:
    """Return heading -> command lines, headings in the order of a run, none without a line."""
    order = dict.fromkeys((*_STAGES.values(), _OTHER))
    found: dict[str, list[str]] = {heading: [] for heading in order}
    for command in commands:
        found[_stage(command)].append(command)
    return {heading: lines for heading, lines in found.items() if lines}


def _stage(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    # Variables before the program, the interpreter and its -m say nothing of the stage.
    program = [word for word in words if not re.fullmatch(r"\w+=.*", word, re.S)][:4]
    for word in program:
        name = word.rsplit("/", 1)[-1].removesuffix("-bench")
        if name in _STAGES:
            return _STAGES[name]
    return _OTHER
