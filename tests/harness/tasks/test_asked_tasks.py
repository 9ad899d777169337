"""Names of tasks: looked up before anything runs, and what is empty told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from streamline_bench.errors import EvaluationError
from streamline_bench.harness.tasks.asked_tasks import (
    EMPTY,
    _shares_tags,
    asked_tasks,
    open_index,
    parts_of,
    quick_index,
    task_folders,
    without_empty,
)

CODE = """
import datasets

def load(**_):
    return datasets.DatasetDict({"test": datasets.Dataset.from_list([])})

def none(documents):
    return documents.filter(lambda document: False)

def fail(documents):
    raise IndexError("a mistake in the task")
"""


@pytest.fixture
def own(tmp_path: Path, choice_task: Callable[[str, Path], str]) -> Path:
    """A folder with tasks that have a document, none, or a mistake; and groups of them."""
    document = {"question": "w1 w2", "choices": ["w5", "w9"], "gold": 0}
    (tmp_path / "full.jsonl").write_text(json.dumps(document) + "\n", encoding="utf-8")
    (tmp_path / "blank.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    for name, file, more in (
        ("full", "full", "tag: my_tag\n"),
        ("other", "full", "tag: my_tag\n"),
        ("blank", "blank", ""),
        ("filtered", "full", "process_docs: !function code.none\n"),
        ("coded", "full", "custom_dataset: !function code.load\n"),
        ("broken", "full", "process_docs: !function code.fail\n"),
        ("streamline_demo_pairs", "full", ""),
    ):
        text = choice_task(name, tmp_path / f"{file}.jsonl")
        (tmp_path / f"{name}.yaml").write_text(text + more, encoding="utf-8")
    for name, members in (
        ("some", "[full, coded]"),
        ("changed", "[{task: full, num_fewshot: 1}, coded]"),
        ("hollow", "[full, not_there]"),
    ):
        text = f"group: {name}\ntask: {members}\n"
        (tmp_path / f"_{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def _tasks(own: Path | None, *names: str) -> list[str | None]:
    manager = open_index(names, own)
    return [part.task for name in names for part in parts_of(manager, name) if part.task]


def test_what_names_stand_for(own: Path) -> None:
    assert _tasks(own, "full", "streamline_demo_story") == ["full", "streamline_demo_story"]
    assert _tasks(own, "some") == ["full", "coded"]
    assert _tasks(own, "changed") == ["full", "coded"]
    assert _tasks(own, "my_tag") == ["full", "other"]
    path = str(own / "full.yaml")
    assert _tasks(own, path) == [path]
    assert len(_tasks(None, "streamline_demo")) == 10


def test_what_the_harness_would_refuse_to_score_twice(own: Path) -> None:
    for names in (["some", "full"], ["changed", "some"]):
        with pytest.raises(EvaluationError, match=r"'full' is asked for by '.*' and by '.*'"):
            open_index(names, own)
        with pytest.raises(ValueError, match="Duplicate task 'full'"):
            (own / "coded.yaml").write_text(
                (own / "other.yaml").read_text().replace("other", "coded")
            )
            open_index(["other"], own).load(names)
    for names in (["my_tag", "full"], ["full", "full"], ["some", "other"]):
        assert open_index(names, own).load(names)["tasks"]


def test_of_equal_names_the_users_counts(own: Path) -> None:
    manager = open_index(["streamline_demo_pairs"], own)
    (part,) = parts_of(manager, "streamline_demo_pairs")
    assert part.config["dataset_path"] == "json"
    assert task_folders(own)[-1] == str(own)


def test_the_harness_s_own_tasks_are_indexed_only_where_they_are_asked_for(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    from lm_eval.tasks.manager import TaskIndex

    real = TaskIndex.build

    def build(paths: list[Path]) -> object:
        seen.append([str(path) for path in paths])
        return real([path for path in paths if "lm_eval/tasks" not in str(path)])

    monkeypatch.setattr(TaskIndex, "build", staticmethod(build))
    _tasks(own, "some", "streamline_demo")
    assert seen == [task_folders(own)]
    for names, value, folders in (
        (["full", "othr"], "'othr'.*'other'", 2),  # refused from the text of the files
        (["hollow"], "'hollow'.*'not_there'", 3),
        ([str(own / "no.yaml")], "no.yaml", 3),
        (["fulll*"], "'fulll", 3),
    ):
        with pytest.raises(EvaluationError, match=value):
            open_index(names, own)
        assert len(seen[-1]) == folders


@pytest.mark.parametrize(
    "names",
    [["full", "some"], ["my_tag"], ["full", "o*r"], ["FOLDER/*ll.yaml", "full"], ["FOLDER"]],
)
def test_what_is_loaded_is_what_the_harness_would_load(
    own: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager

    for path in own.glob("_*.yaml"):  # of which the harness takes no folder
        if names == ["FOLDER"]:
            path.unlink()
    names = [name.replace("FOLDER", str(own)) for name in names]
    own_only = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_only)
    config = EvaluatorConfig(tasks=names, include_path=str(own))  # type: ignore[arg-type]
    config.process_tasks()
    manager = own_only(include_path=task_folders(own))
    found = asked_tasks(manager, names)
    assert len(found) > 0
    assert repr(found) == repr(config.tasks)


def test_a_tag_of_both_is_looked_up_in_both(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own / "harness"
    folder.mkdir()
    monkeypatch.setattr(
        "streamline_bench.harness.tasks.asked_tasks._folders_of_the_harness", lambda: [folder]
    )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(own), include_defaults=False)
    (own / "_tagged.yaml").write_text("group: tagged\ntask: [my_tag]\n", encoding="utf-8")
    tagged = TaskManager(include_path=str(own), include_defaults=False)
    assert not _shares_tags(manager, ["my_tag"])
    (folder / "a.yaml").write_text("task: a\ntag: my_tag\n", encoding="utf-8")
    assert _shares_tags(manager, ["my_tag"])
    assert _shares_tags(tagged, ["tagged"])
    assert not _shares_tags(tagged, ["full", "some"])


def test_what_has_no_documents_is_left_out(own: Path) -> None:
    names = ["blank", "filtered", "some", str(own / "other.yaml")]
    kept, left_out = without_empty(open_index(names, own), names)
    assert kept == ["full", str(own / "other.yaml")]
    assert left_out == dict.fromkeys(("blank", "filtered", "coded"), EMPTY)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["coded", "blank"], r"cannot load the task 'coded' \(it yielded no documents\)"),
        (["full", "broken"], r"'broken' \(IndexError a mistake in the task\)"),
        (["changed"], "'coded' of 'changed' has no documents, and 'changed' changes"),
    ],
)
def test_what_cannot_be_left_out(own: Path, names: list[str], sentence: str) -> None:
    with pytest.raises(EvaluationError, match=sentence):
        without_empty(open_index(names, own), names)


def test_the_harness_skips_its_own_tasks_only_inside_and_only_where_it_may(own: Path) -> None:
    import lm_eval.tasks

    stock = lm_eval.tasks.TaskManager
    with quick_index(["full", "some"], own):
        manager = lm_eval.tasks.TaskManager(include_path=task_folders(own))
        assert "full" in manager.all_tasks and "hellaswag" not in manager.all_tasks
    assert lm_eval.tasks.TaskManager is stock
    for names in (["hellaswag", "full"], ["f*"], ["hollow"]):
        with quick_index(names, own):
            assert lm_eval.tasks.TaskManager is stock
