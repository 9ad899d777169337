"""Names of tasks, from the text of their YAML files: a typo costs no import of the harness.

Parsing the harness's 14,000 files takes 18 seconds of CPU, reading them half a second. Every name
that the harness knows stands in one of them, so that a name that stands nowhere is unknown.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import EvaluationError

_DEFINED = re.compile(
    rb"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([^\s:#"'\[]+)["']?[ \t]*$""", re.MULTILINE
)


def refuse_unknown(names: Sequence[str], folders: Iterable[str | Path]) -> None:
    """Refuse names that stand in no task file; paths and patterns are left to the harness.

    Args:
        folders: of task files beside the harness's own.

    Raises:
        EvaluationError: naming the first such name, and the nearest that is defined.
    """
    plain = [name for name in names if not re.search(r"[*?\[]|\.yaml$", name)]
    missing = [name for name in plain if not Path(name).is_dir()]
    known: set[bytes] = set()
    for text in _texts([*map(Path, folders), *_of_the_harness()]):
        if not missing:
            return
        missing = [name for name in missing if not _stands_in(name, text)]
        known.update(_DEFINED.findall(text))
    if missing:
        found = [name.decode("utf-8", "replace") for name in known]
        hint = suggest(missing[0], found) or "; see: lm_eval ls tasks, streamline-bench tasks."
        raise EvaluationError(f"Unknown task '{missing[0]}'{hint}")


def _of_the_harness() -> list[Path]:
    spec = importlib.util.find_spec("lm_eval")
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place) / "tasks" for place in places or ()]


def _texts(folders: Iterable[Path]) -> Iterator[bytes]:
    """Task files and what they include: ``.yaml``, ``_default_yaml`` or a name without a suffix."""
    for folder in folders:
        for path in folder.rglob("*"):
            if (path.name.endswith("yaml") or not path.suffix) and path.is_file():
                yield path.read_bytes()


def _stands_in(name: str, text: bytes) -> bool:
    wanted = name.encode()
    return wanted in text and bool(
        re.search(rb"(?<![\w-])" + re.escape(wanted) + rb"(?![\w-])", text)
    )
