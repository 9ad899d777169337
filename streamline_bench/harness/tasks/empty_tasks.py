"""Tasks without documents, at which the harness ends: told apart, so that the others are scored."""

from __future__ import annotations

import glob
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from streamline_bench.errors import EvaluationError
from streamline_bench.harness.tasks.asked_tasks import Part, parts_of

EMPTY = "it yielded no documents"
"""Why a task is left out."""


def without_empty(manager: Any, names: Sequence[Any]) -> tuple[list[Any], dict[str, str]]:
    """Load tasks one by one; return what can be scored, and task -> why it is left out.

    A group with an empty task is replaced by its other tasks, so that it has no number of its own.

    Args:
        manager: see :func:`~streamline_bench.harness.tasks.asked_tasks.open_index`.
        names: what ``TaskManager.load`` takes.

    Raises:
        EvaluationError: a task cannot be loaded for another reason, or all are empty.
    """
    kept: list[Any] = []
    left_out: dict[str, str] = {}
    for name in names:
        parts = [Part(None, name)] if isinstance(name, Mapping) else list(parts_of(manager, name))
        tasks = [part for part in parts if part.task is not None or isinstance(name, Mapping)]
        empty = [part for part in tasks if _is_empty(manager, part)]
        if not empty:
            kept.append(name)
            continue
        if len(tasks) > len(empty) and not all(part in tasks or _is_plain(part) for part in parts):
            raise EvaluationError(
                f"The task '{_title(empty[0])}' of '{name}' has no documents, and '{name}' changes "
                "its tasks, so that they cannot be scored by their own names; mend its data."
            )
        kept += [part.task for part in tasks if part not in empty]
        left_out |= {_title(part): EMPTY for part in empty}
    if not kept:
        raise EvaluationError(_sentence(next(iter(left_out)), EMPTY))
    return kept, left_out


def _is_empty(manager: Any, part: Part) -> bool:
    try:
        loaded = manager.load([part.task or part.config])
        documents = [task.eval_docs for task in loaded["tasks"].values()]
    except Exception as error:
        if _saw_none(error) or _has_blank_file(part.config):
            return True
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise EvaluationError(_sentence(_title(part), said)) from error
    return any(hasattr(each, "__len__") and len(each) == 0 for each in documents)


def _sentence(task: str, said: str) -> str:
    return (
        f"The harness cannot load the task '{task}' ({said}); check that its data is there and "
        "not empty."
    )


def _title(part: Part) -> str:
    return str(part.config.get("task") or part.task)


def _saw_none(error: BaseException) -> bool:
    """Whether a task was looking at its first document and had none."""
    from lm_eval.api.task import Task

    for frame, _ in traceback.walk_tb(error.__traceback__):
        task = frame.f_locals.get("self")
        documents: Any = getattr(task, "task_docs", None) if isinstance(task, Task) else None
        if hasattr(documents, "__len__") and not len(documents):
            return True
    return False


def _has_blank_file(config: Mapping[str, Any]) -> bool:
    """Whether nothing is in the files of the split that is scored; ``datasets`` ends at them."""
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(named, Mapping):
        named = named.get(config.get("test_split") or config.get("validation_split"))
    patterns = [named] if isinstance(named, str) else named
    if not isinstance(patterns, list):
        return False
    found = [glob.glob(str(pattern)) for pattern in patterns]  # noqa: PTH207 - most are absolute
    paths = [Path(path) for each in found for path in each]
    return bool(paths) and not any(path.read_bytes()[:4096].strip() for path in paths)


def _is_plain(part: Part) -> bool:
    """Whether a group only names its tasks."""
    from lm_eval.config.group import GroupConfig

    members = part.config.get("task")
    own = {field.name for field in fields(GroupConfig)}
    return (
        isinstance(members, list)
        and all(isinstance(member, str) for member in members)
        and part.config.keys() <= own
    )
