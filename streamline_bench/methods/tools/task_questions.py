"""Questions with choices, from tasks of the harness, by which a search may choose layers.

They are asked as the harness asks them, without examples, and which choices are right is what the
harness says. They come from a split that the harness does not score; a question that stands in the
scored split as well is left out. The harness's hashes of their documents go with the checkpoint,
so that whoever scores them all the same can tell (:data:`SEARCHED_FILE`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamline_bench.core.machine.environment import bundled_model, resource
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import CalibrationError, library_errors

Split = Literal["validation", "train"]
Metric = Literal["acc", "acc_norm"]
"""``acc``: the likeliest choice counts; ``acc_norm``: the likeliest per character."""

SEARCHED_FILE = "searched_documents.json"
"""File of a checkpoint: the documents by which its layers were chosen, by the harness's hash."""

_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Question:
    """A document of a task with its choices.

    Attributes:
        requests: for each choice, the context and the continuation whose likelihood counts.
        lengths: characters of each choice.
        right: numbers of the choices that the harness counts as right.
        doc_hash: the harness's SHA-256 of the document, as in its files of samples.
    """

    task: str
    requests: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    right: frozenset[int]
    doc_hash: str


def named_tasks(names: Sequence[str], model: Path) -> list[str]:
    """Put tasks in the place of ``auto``: the bundled ones for the bundled model, else ARC-easy.

    Args:
        model: folder of the model whose layers are chosen.
    """
    own = "streamline_demo" if model.resolve() == bundled_model().resolve() else "arc_easy"
    return [own if name == "auto" else name for name in names]


def held_out_questions(
    names: Sequence[str], metric: Metric, most: int, *, split: Split | None = None, seed: int = 0
) -> tuple[list[Question], dict[str, Any]]:
    """Return questions of a split that is not scored, and facts about them by task.

    Args:
        names: of tasks or groups, or YAML files of tasks.
        most: questions of each task, drawn at random.
        split: None: ``validation``, or ``train`` where ``validation`` is scored or missing.

    Raises:
        CalibrationError: a task cannot be loaded, asks no choices, has no other split than the one
            that is scored, or no question in it that is not scored.
    """
    found: list[Question] = []
    facts: dict[str, Any] = {}
    for name in names:
        for task in _tasks(name):
            label = str(task.task_name)
            with library_errors(f"Task '{label}' cannot be read", kind=CalibrationError):
                chosen, fact = _of_task(task, label, metric, most, split, seed)
            found += chosen
            facts[label] = fact
    return found, facts


def local_files(names: Iterable[str]) -> list[Path]:
    """Return the files among the names of tasks, and the local data files that they name."""
    found: list[Path] = []
    for path in (Path(name) for name in names if name.endswith(_YAML)):
        if path.is_file():
            arguments = _config(path, resolve_func=False).get("dataset_kwargs")
            found.append(path)
            found += (place for named in _strings(arguments) if (place := Path(named)).is_file())
    return found


def doc_hash(document: Any) -> str:
    """Return the hash that the harness writes into samples for a document (SHA-256, hex)."""
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


def searched_documents(folder: Path) -> frozenset[str]:
    """Return the hashes of the documents by which a checkpoint's layers were chosen."""
    path = folder / SEARCHED_FILE
    if not path.is_file():
        return frozenset()
    return frozenset(json.loads(path.read_text(encoding="utf-8"))["doc_hashes"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)


def _config(path: Path, *, resolve_func: bool) -> Any:
    from lm_eval.tasks._yaml_loader import load_yaml

    with library_errors(f"Task file {path} cannot be read", kind=CalibrationError):
        return load_yaml(path, resolve_func=resolve_func)


def _tasks(name: str) -> list[Any]:
    """Load a task, or the tasks of a group."""
    from lm_eval.tasks import TaskManager

    ours = resource("tasks") / "lm_eval"
    with library_errors(
        f"Task '{name}' cannot be loaded",
        "check its name and, where its data is on the hub, the connection, or give others as "
        "parameters.tasks (streamline_demo needs no connection, nor do the local_* tasks)",
        CalibrationError,
    ):
        if name.endswith(_YAML):
            asked: Any = _config(Path(name), resolve_func=True)
            manager = TaskManager(include_defaults=False)
        elif any(ours.rglob(f"{name}.yaml")) or any(ours.rglob(f"_{name}.yaml")):
            asked, manager = name, TaskManager(include_path=str(ours), include_defaults=False)
        else:
            asked, manager = name, TaskManager()
            if name not in manager.all_tasks:
                hint = suggest(name, manager.all_tasks) or "; see: lm_eval ls tasks"
                raise CalibrationError(f"Unknown task '{name}'{hint}.")
        return list(manager.load([asked])["tasks"].values())


def _of_task(
    task: Any, label: str, metric: Metric, most: int, split: Split | None, seed: int
) -> tuple[list[Question], dict[str, Any]]:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise CalibrationError(
            f"Task '{label}' is of type {task.OUTPUT_TYPE}, and right choices are counted here; "
            "give a task of type multiple_choice."
        )
    scored = "test" if task.has_test_docs() else "validation"
    split = _split_of(task, label, scored, split)
    documents = task.validation_docs() if split == "validation" else task.training_docs()
    asked = {_asked(task, document) for document in task.eval_docs}
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    found: list[Question] = []
    left_out = 0
    for index in order:
        requests = _asked(task, documents[index])
        if requests in asked:
            left_out += 1
            continue
        found.append(_question(task, label, documents[index], requests, metric))
        if len(found) == most:
            break
    if not found:
        raise CalibrationError(
            f"All {left_out} questions in split '{split}' of task '{label}' are in split "
            f"'{scored}', too, which is scored; give a task with held-out questions."
        )
    return found, {"split": split, "scored": scored, "documents": len(found), "shared": left_out}


def _split_of(task: Any, label: str, scored: str, asked: Split | None) -> Split:
    """Return the split that is searched; it has documents and is not scored."""
    has = {"validation": task.has_validation_docs(), "train": task.has_training_docs()}
    free: list[Any] = [name for name in has if has[name] and name != scored]
    if asked is not None and asked in free:
        return asked
    if asked is None and free:
        return free[0]  # type: ignore[no-any-return]
    reason = f"no split '{asked}'" if asked is not None else "no other split"
    if asked == scored:
        reason = f"only split '{asked}' of this name"
    others = f"split {' or '.join(free)}" if free else "another task"
    raise CalibrationError(
        f"Task '{label}' is scored on its split '{scored}' and has {reason} to search on: the "
        f"documents that a board scores must not be those that chose the layers; give {others}."
    )


def _asked(task: Any, document: Any) -> tuple[tuple[str, str], ...]:
    """Return (context, continuation) of each choice."""
    context = task.fewshot_context(document, num_fewshot=0, gen_prefix=task.doc_to_prefix(document))
    made = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, 0, 1))
    # Behind the choices, some tasks ask for their likelihood without a context.
    count = len(task.doc_to_choice(document))
    return tuple((str(each.args[0]), str(each.args[1])) for each in made[:count])


def _question(
    task: Any, label: str, document: Any, requests: tuple[tuple[str, str], ...], metric: Metric
) -> Question:
    """Ask the harness which choices are right: those that count if they alone are likely."""
    choices = task.doc_to_choice(document)
    right = set()
    for number in range(len(choices)):
        answers = [(0.0 if each == number else -1e9, False) for each in range(len(choices))]
        results = task.process_results(document, answers)
        if metric not in results:
            raise CalibrationError(
                f"Task '{label}' has no metric {metric}; it has {', '.join(results)}: give "
                "another metric or task."
            )
        if results[metric]:
            right.add(number)
    lengths = tuple(len(choice) for choice in choices)
    return Question(label, requests, lengths, frozenset(right), doc_hash(document))
