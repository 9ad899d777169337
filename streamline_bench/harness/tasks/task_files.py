"""One hash for everything that decides what tasks ask, as far as files here say it."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from streamline_bench.core.checkpoint.folder import file_sha256, update_digest
from streamline_bench.errors import EvaluationError

_VARIABLE = "STREAMLINE_BENCH_DATA"
"""Names the folder in which the local tasks of this package look for their data."""

_TASK_NAME = 255 - len("samples__2026-01-01T00-00-00.000000.jsonl")
"""Bytes of a task's name with which the harness can still name a file of samples."""

_HASHED_UP_TO = 64 << 20
"""Larger files of a task folder count by their size, unless a task's configuration names them."""


def tasks_sha256(
    folders: Iterable[Path],
    configs: Iterable[Mapping[str, Any]],
    environment: Mapping[str, str],
    files: Iterable[str] = (),
) -> str:
    """SHA-256 (hex) of the task folders' files and of the data that tasks read elsewhere.

    Where a folder or a data file lies changes nothing; its name and its content do.

    Args:
        folders: of task files.
        configs: of the tasks that are asked.
        environment: variables of the jobs.
        files: YAML files, patterns or folders of them, that are asked for by their paths.
    """
    sums = hashlib.sha256()
    folders = [folder.resolve() for folder in folders]
    for folder in folders:
        for path in _visible_files(folder):
            sums.update(path.relative_to(folder).as_posix().encode() + b"\0")
            if path.stat().st_size > _HASHED_UP_TO:
                sums.update(f"{path.stat().st_size}\0".encode())
            else:
                update_digest(sums, path)
    data = data_files(configs, environment)
    for each in files:
        data |= _files_at(each)
    beside = {path: name for path, name in data.items() if not _is_hashed(path, folders)}
    shown = tqdm(beside.items(), desc="Task data", unit="file", delay=2, leave=False, disable=None)
    for line in sorted(f"{name}\0{file_sha256(path)}\0" for path, name in shown):
        sums.update(line.encode())
    return sums.hexdigest()


def task_sha256(
    folders: Iterable[Path],
    configs: Iterable[Mapping[str, Any]],
    environment: Mapping[str, str],
    files: Iterable[str] = (),
) -> str:
    """SHA-256 (hex) of what one task is made of: configurations, the data they name, and code.

    Other than :func:`tasks_sha256`, it does not change when another task is added to the folders;
    their Python files count, because a configuration may call them.
    """
    configs = list(configs)
    data = data_files(configs, environment)
    for each in files:
        data |= _files_at(each)
    for folder in folders:
        code = (path for path in _visible_files(folder.resolve()) if path.suffix == ".py")
        data |= {path: path.relative_to(folder.resolve()).as_posix() for path in code}
    lines = sorted(f"{name}\0{file_sha256(path)}" for path, name in data.items())
    asked = sorted(_without_places(config, folders) for config in configs)
    return hashlib.sha256("\0".join([*asked, *lines]).encode()).hexdigest()


def _without_places(config: Mapping[str, Any], folders: Iterable[Path]) -> str:
    """A configuration as text that is the same wherever its folder lies."""
    text = json.dumps(config, sort_keys=True, default=_named_function)
    for named in _named(config):
        text = text.replace(json.dumps(named)[1:-1], Path(named).name)
    for folder in folders:
        text = text.replace(str(folder.resolve()), "").replace(str(folder), "")
    return text


def _named_function(value: object) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def data_files(
    configs: Iterable[Mapping[str, Any]], environment: Mapping[str, str]
) -> dict[Path, str]:
    """Return the local files that configurations of tasks name, and what to call each.

    These are ``dataset_path`` where it is a folder or file, ``data_files`` and ``data_dir``, and
    for a ``custom_dataset`` every argument that looks like a path.
    """
    found: dict[Path, str] = {}
    for config in configs:
        for named in _named(config):
            for place in _places(named, environment):
                found |= _files_at(place)
    return found


def check_tasks(tasks: Mapping[str, Mapping[str, Any]], environment: Mapping[str, str]) -> None:
    """Refuse tasks whose data is known to be missing, or whose name cannot name a file.

    Args:
        tasks: name -> configuration.
        environment: variables of the jobs.

    Raises:
        EvaluationError: naming the task, and what is missing.
    """
    known = {**os.environ, **environment}
    offline = known.get("HF_HUB_OFFLINE") == "1" or known.get("HF_DATASETS_OFFLINE") == "1"
    for task, config in tasks.items():
        too_many = len(task.encode()) - _TASK_NAME
        if too_many > 0:
            raise EvaluationError(
                f"The task name '{task}' is {too_many} bytes too long for the file that the "
                f"harness names after it; give the task a name of at most {_TASK_NAME} bytes."
            )
        path = str(config.get("dataset_path") or "")
        if offline and _is_hub_id(path) and not _is_cached(path, known):
            raise EvaluationError(
                f"The data of the task '{task}' is missing: the data set {path} is not in the "
                "cache, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set; unset it, or leave the "
                "task out."
            )
        ours = str(config.get("custom_dataset")).endswith("local_data.load")
        if not ours and not _is_builder(path):
            continue  # a file belongs to the data set, or only the task's own code knows where
        for named in _named(config):
            places = list(_places(named, environment))
            if places and not any(_files_at(place) for place in places):
                hint = f" ({_VARIABLE} is {known.get(_VARIABLE) or 'not set'})" if ours else ""
                raise EvaluationError(
                    f"The data of the task '{task}' is missing: there is no file {named}{hint}; "
                    "put it there, or leave the task out."
                )


def _is_hub_id(path: str) -> bool:
    local = Path(path).exists() or path.startswith((".", "/", "~")) or _is_builder(path)
    return bool(path) and "$" not in path and not local


def _is_cached(path: str, known: Mapping[str, str]) -> bool:
    """Whether ``datasets`` or the hub's client has kept something of a data set."""
    home = Path(known.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    made = Path(known.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    loaded = Path(known.get("HF_HUB_CACHE") or home / "hub").expanduser()
    name = path.split("/")[-1]
    return any(made.glob(f"*{name}*")) or any(loaded.glob(f"datasets--*{name}"))


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    arguments = config.get("dataset_kwargs")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    path = config.get("dataset_path")
    if isinstance(path, str) and not _is_builder(path):
        yield path
    if isinstance(arguments.get("data_dir"), str):
        yield arguments["data_dir"]
    yield from _strings(arguments.get("data_files"))
    if "custom_dataset" in config or "class" in config:
        metadata = config.get("metadata")
        # A name without a folder or a suffix is rather a subset's.
        for each in _strings([arguments, metadata]):
            if "/" in each or re.search(r"\.\w+$", each):
                yield each


def _is_builder(name: str) -> bool:
    """Whether ``load_dataset`` takes it for a format, whatever is called so here."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return name in _PACKAGED_DATASETS_MODULES


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _places(named: str, environment: Mapping[str, str]) -> Iterator[Path]:
    """The name as a path from here, and below the folder of data; variables in place."""
    if "://" in named or "\0" in named:
        return
    known = {**os.environ, **environment}
    path = Path(re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], found[0]), named))
    path = path.expanduser()
    yield path
    root = known.get(_VARIABLE)
    if root:
        yield from (Path(root).expanduser() / path, Path(root).expanduser() / "data" / path)


def _files_at(place: str | Path) -> dict[Path, str]:
    found: dict[Path, str] = {}
    matches = [place] if Path(place).exists() else glob.glob(str(place), recursive=True)  # noqa: PTH207
    for path in (Path(match).resolve() for match in matches):
        if path.is_file():
            found[path] = path.name
        elif path.is_dir():
            inside = _visible_files(path)
            found |= {each: each.relative_to(path).as_posix() for each in inside}
    return found


def _visible_files(folder: Path) -> list[Path]:
    """Files below a folder, sorted; not what is hidden, compiled, or made by a comparison."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        if here != folder and "plan.yaml" in names and "jobs" in folders:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not _is_left_out(name)]
        found += [here / name for name in names if not _is_left_out(name)]
    return sorted(path for path in found if path.is_file())


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__" or name.endswith(".pyc")


def _is_hashed(path: Path, folders: Iterable[Path]) -> bool:
    inside = any(path.is_relative_to(folder) for folder in folders)
    return inside and path.stat().st_size <= _HASHED_UP_TO
