"""What the names of asked tasks stand for, and which of these tasks have no documents.

A typo costs no import of the harness: parsing its 14,000 files takes 18 seconds of CPU, reading
them half a second. Every name that the harness knows stands in one of them, so that a name that
stands nowhere is unknown. The harness ends at a task without documents; such tasks are set aside,
so that the others are scored.
"""

from __future__ import annotations

import glob
import importlib.util
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from streamline_bench.core.machine.environment import resource
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import EvaluationError

_DEFINED = re.compile(
    rb"""^["']?(?:task|group|tag)["']?:[ \t]*["']?([^\s:#"'\[]+)["']?[ \t]*$""", re.MULTILINE
)
_PATTERN = frozenset("*?[")

EMPTY = "it yielded no documents"
"""Why a task is left out."""


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


Folders = str | Path | Sequence[str | Path] | None
"""The user's folders of task files: none, one or several."""


def task_folders(own: Folders) -> list[str]:
    """Return the folders of task files beside the harness's: ours, and the user's, which win."""
    folders = [own] if isinstance(own, str | Path) else own or ()
    return [str(resource("tasks") / "lm_eval"), *map(str, folders)]


def include_folders(own: Folders) -> list[str]:
    """Return the folders that the harness is to be given: ours only where it does not find it."""
    folders = task_folders(own)
    return folders[1:] if _finds_ours() else folders


@cache
def _finds_ours() -> bool:
    """Whether the harness reads the entry points of tasks, and ours is installed."""
    managers = [folder / "manager.py" for folder in _folders_of_the_harness()]
    texts = [path.read_text(encoding="utf-8") for path in managers if path.is_file()]
    points = entry_points(group="lm_eval.tasks")
    return any("entry_points(" in text for text in texts) and any(
        point.value.startswith("streamline_bench.") for point in points
    )


def open_index(
    names: Sequence[str], own: Folders, metadata: Mapping[str, Any] | None = None
) -> Any:
    """Return a ``TaskManager`` that knows all of these.

    The harness's own thousands of tasks take seconds and are left out where none is asked for.

    Args:
        names: of tasks, groups or tags, patterns of them, or paths of YAML files.
        own: the user's folders of task files.
        metadata: what the harness adds to the metadata of every task that it loads.

    Raises:
        EvaluationError: a name stands for nothing (the nearest one is named), or two groups have a
            task in common, which the harness refuses.
    """
    refuse_unknown(names, task_folders(own))
    from lm_eval.tasks import TaskManager

    options: dict[str, Any] = {
        "include_path": include_folders(own),
        "metadata": None if metadata is None else dict(metadata),
    }
    manager = TaskManager(include_defaults=False, **options)
    if not _holds(manager, names):
        manager = TaskManager(**options)
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


@contextmanager
def quick_index(names: Sequence[str], own: Folders) -> Iterator[None]:
    """Let the harness leave its own tasks out of its index where none of them is asked for."""
    import lm_eval.tasks

    stock = lm_eval.tasks.TaskManager
    if _holds(stock(include_path=include_folders(own), include_defaults=False), names):
        lm_eval.tasks.TaskManager = partial(stock, include_defaults=False)
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = stock


def _holds(manager: Any, names: Sequence[str]) -> bool:
    """Whether an index without the harness's own tasks gives all that is asked for."""
    return not (
        any(_PATTERN & set(name) for name in names)
        or _unknown(manager, names)
        or _shares_tags(manager, names)
    )


def asked_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """Return what ``TaskManager.load`` takes, as ``EvaluatorConfig.process_tasks`` finds it.

    Args:
        manager: see :func:`open_index`.
        names: those that it was opened for.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if len(names) == 1 and Path(names[0]).is_dir() and not manager.match_tasks(list(names)):
        names = [str(Path(names[0]) / "*.yaml")]
    found: list[Any] = []
    for name in names:
        if name.endswith(".yaml"):
            paths = glob.glob(str(Path(name).absolute()))  # noqa: PTH207 - it may be absolute
            matches = [load_yaml(path, resolve_func=True) for path in paths]
        else:
            matches = manager.match_tasks([name])
        found += [each for each in matches if each not in found]
    return found


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


def _shares_tags(manager: Any, names: Sequence[str]) -> bool:
    """Whether a tag is asked for that tasks of the harness may have too."""
    parts = [part for name in names if not Path(name).is_dir() for part in parts_of(manager, name)]
    groups = [part.config["task"] for part in parts if isinstance(part.config.get("task"), list)]
    members = [name for group in groups for name in group if isinstance(name, str)]
    tags = set(manager.all_tags) & {*names, *members}
    return bool(tags) and any(
        _stands_in(tag, text) for text in _texts(_folders_of_the_harness()) for tag in tags
    )


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
    for text in _texts([*map(Path, folders), *_folders_of_the_harness()]):
        if not missing:
            return
        missing = [name for name in missing if not _stands_in(name, text)]
        known.update(_DEFINED.findall(text))
    if missing:
        found = [name.decode("utf-8", "replace") for name in known]
        hint = suggest(missing[0], found) or "; see: lm_eval ls tasks, streamline-bench tasks."
        raise EvaluationError(f"Unknown task '{missing[0]}'{hint}")


def _folders_of_the_harness() -> list[Path]:
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


def without_empty(manager: Any, names: Sequence[Any]) -> tuple[list[Any], dict[str, str]]:
    """Load tasks one by one; return what can be scored, and task -> why it is left out.

    A group with an empty task is replaced by its other tasks, so that it has no number of its own.

    Args:
        manager: see :func:`open_index`.
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
