"""What names of tasks stand for in the harness's index, before anything is loaded or run."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamline_bench.core.machine.environment import resource
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import EvaluationError
from streamline_bench.harness.tasks.task_names import refuse_unknown

_PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class Part:
    """Something that a name stands for.

    Attributes:
        task: what the harness loads: a task's name; None for a group, or for what a group changes
            in one of its tasks.
        config: as its YAML file says, ``include`` resolved, functions not.
        unknown: the name of a task or group that no file defines.
    """

    task: str | None
    config: Mapping[str, Any]
    unknown: str | None = None


def task_folders(own: str | Path | None) -> list[str]:
    """Return the folders of task files beside the harness's: ours, and the user's, which wins."""
    folders = [str(resource("tasks") / "lm_eval")]
    return folders if own is None else [*folders, str(own)]


def open_index(names: Sequence[str], own: str | Path | None) -> Any:
    """Return a ``TaskManager`` that knows all of these.

    The harness's own thousands of tasks take seconds and are left out where none is asked for.

    Args:
        names: of tasks, groups or tags, patterns of them, or paths of YAML files.
        own: the user's folder of task files.

    Raises:
        EvaluationError: a name stands for nothing (the nearest one is named), or two groups have a
            task in common, which the harness refuses.
    """
    refuse_unknown(names, task_folders(own))
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_folders(own), include_defaults=False)
    if any(_PATTERN & set(name) for name in names) or _unknown(manager, names):
        manager = TaskManager(include_path=task_folders(own))
    unknown = _unknown(manager, names)
    if unknown is not None:
        name, asked = unknown
        what = f"Unknown task '{name}'"
        what = what if name == asked else f"'{asked}' has an unknown task '{name}'"
        hint = (
            suggest(name, manager.all_tasks) or "; see: lm_eval ls tasks, streamline-bench tasks."
        )
        raise EvaluationError(f"{what}{hint}")
    _refuse_twice(manager, names)
    return manager


def parts_of(manager: Any, name: str | Mapping[str, Any]) -> Iterator[Part]:
    """Yield everything that a name stands for, groups before what is in them.

    Args:
        name: as in :func:`open_index`, or the configuration that a YAML file holds.
    """
    if isinstance(name, Mapping):
        yield from _member(manager, name, frozenset())
    elif name.endswith(".yaml"):
        yield from _files(manager, name)
    else:
        matches = manager.match_tasks([name])
        if not matches:
            yield Part(None, {}, unknown=name)
        for each in matches:
            yield from _member(manager, each, frozenset())


def _unknown(manager: Any, names: Sequence[str]) -> tuple[str, str] | None:
    """Return the first name that stands for nothing, and the one that was asked for."""
    for name in names:
        if len(names) == 1 and Path(name).is_dir() and not manager.match_tasks([name]):
            continue  # a folder of YAML files, which the harness takes too
        for part in parts_of(manager, name):
            if part.unknown is not None:
                return part.unknown, name
    return None


def _refuse_twice(manager: Any, names: Sequence[str]) -> None:
    owners: dict[str, str] = {}
    for name in names:
        for each in [name] if name.endswith(".yaml") else manager.match_tasks([name]):
            parts = list(parts_of(manager, each))
            for task in [part.task for part in parts if part.task is not None]:
                # The harness takes the tasks of a tag as if each were named.
                owner = each if parts[0].task is None else task
                if owners.setdefault(task, owner) != owner:
                    raise EvaluationError(
                        f"The task '{task}' is asked for by '{owners[task]}' and by '{owner}', "
                        "which the harness refuses; leave one of them out."
                    )


def _files(manager: Any, pattern: str) -> Iterator[Part]:
    from lm_eval.tasks._yaml_loader import load_yaml

    paths = sorted(glob.glob(str(Path(pattern).absolute())))  # noqa: PTH207 - it may be absolute
    if not paths:
        yield Part(None, {}, unknown=pattern)
    for path in paths:
        config = load_yaml(path, resolve_func=False)
        if isinstance(config.get("task"), list):
            yield from _group(manager, config, frozenset())
        else:
            yield Part(path, config)


def _member(manager: Any, item: Any, above: frozenset[str]) -> Iterator[Part]:
    """A name in the index, or a mapping in a group: a name with changes, or all of a task."""
    if isinstance(item, Mapping):
        name = item.get("group") or item.get("task")
        if isinstance(name, str) and name in manager.task_index and name not in above:
            yield Part(None, item)
            yield from _member(manager, name, above)
        elif isinstance(item.get("task"), list):
            yield from _group(manager, item, above)
        else:
            yield Part(name if isinstance(name, str) else None, item)
        return
    entry = manager.task_index.get(item)
    if entry is None:
        yield Part(None, {}, unknown=str(item))
    elif entry.cfg is None:  # a tag
        for name in sorted(entry.tags):
            yield from _member(manager, name, above)
    elif isinstance(entry.cfg.get("task"), list):
        if item not in above:
            yield from _group(manager, entry.cfg, above | {item})
    else:
        yield Part(str(item), entry.cfg)


def _group(manager: Any, config: Mapping[str, Any], above: frozenset[str]) -> Iterator[Part]:
    yield Part(None, config)
    for member in config["task"]:
        yield from _member(manager, member, above)
