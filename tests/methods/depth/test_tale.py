"""tale: the search by brute force; what is searched is never scored; bad input."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress, load_recipe
from streamline_bench.compression.cache import cache_root
from streamline_bench.compression.pipeline import content_key
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.machine.environment import bundled_model
from streamline_bench.errors import (
    CalibrationError,
    EvaluationError,
    SparsityError,
)
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.methods.depth import tale
from streamline_bench.methods.tools.task_questions import (
    SEARCHED_FILE,
    held_out_questions,
    named_tasks,
)
from streamline_bench.modeling.loading import SourceModel


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", initializer_range=0.3, seed=4, num_hidden_layers=5)


@pytest.fixture
def asked(make_recipe: Callable[..., Any], held_out_task: Path) -> Callable[..., Any]:
    def make(name: str = "tale", **changes: Any) -> Any:
        own = {"parameters.tasks": str(held_out_task)} if name == "tale" else {}
        return make_recipe(name, **{**own, **changes})

    return make


def _accuracy(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> float:
    """Of each question, choice by choice, token by token; per character of the choice."""
    right = 0
    for question in questions:
        scores = []
        for choice in question["choices"]:
            start = len(tokenizer.encode(question["context"]))
            ids = tokenizer.encode(f"{question['context']} {choice}")
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            score = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
            scores.append(score / len(choice))
        right += scores.index(max(scores)) == question["gold"]
    return right / len(questions)


def _questions(held_out_task: Path) -> list[dict[str, Any]]:
    """Those of ``validation`` that are not in ``test``."""
    lines = (held_out_task.parent / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][4:]


def test_steps_equal_a_search_over_separate_models(
    folder: Path,
    held_out_task: Path,
    asked: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions, removed, reached = _questions(held_out_task), list[int](), []
    for step in range(3):
        found = {}
        for layer in range(5) if step else (None,):  # the first time, the dense model
            if layer not in removed:
                pruned = copy.deepcopy(model)
                keep_layers(pruned, [i for i in range(5) if i not in (*removed, layer)])
                found[layer] = _accuracy(pruned, tokenizer, questions)
        best = max(found, key=lambda layer: found[layer])
        removed += [] if best is None else [best]
        reached.append(found[best])
    recipe = asked(**{"parameters.metric": "acc_norm", "parameters.documents": 20})
    out = compress(folder, recipe, tmp_path / "out", placement="resident", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    chosen = manifest.chosen
    assert chosen["order"] == removed
    assert [chosen["accuracy_dense"], *chosen["accuracy_after_step"]] == pytest.approx(reached)
    assert len(set(reached)) > 1
    same_as_surgery(out, folder, removed)
    shutil.rmtree(cache_root() / "scans")
    again = compress(folder, recipe, tmp_path / "streamed", placement="streamed", progress=False)
    streamed = read_manifest(again)
    assert streamed is not None and streamed.chosen == chosen


def test_a_larger_size_continues_the_search_of_a_smaller(
    folder: Path, asked: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[list[int]] = []
    measured = tale.measured_without

    def seen(*given: Any, removed: Any = None, **rest: Any) -> Any:
        if removed is not None:  # else it is the dense model
            searched.append(list(removed))
        return measured(*given, **({} if removed is None else {"removed": removed}), **rest)

    monkeypatch.setattr(tale, "measured_without", seen)
    orders = []
    for n_layers in (1, 3):
        out = compress(folder, asked(n_layers=n_layers), tmp_path / f"{n_layers}", progress=False)
        manifest = read_manifest(out)
        assert manifest is not None
        orders.append(manifest.chosen["order"])
    assert searched == [orders[1][:count] for count in range(3)]
    assert orders[0] == orders[1][:1]


def _scored(model: Any, task: Path, split: str) -> Any:
    config = {**load_yaml(task, resolve_func=True), "test_split": split}
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(model=model, tasks=[config], task_manager=manager, bootstrap_iters=0)


def test_what_chose_the_layers_is_not_scored(
    folder: Path, held_out_task: Path, asked: Callable[..., Any], tmp_path: Path
) -> None:
    out = compress(folder, asked(), tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    facts = {"split": "validation", "scored": "test", "documents": 20, "shared": 4}
    assert manifest.chosen["tasks"] == {"tiny_choices": facts}
    lm = StreamlineLM(str(out), device="cpu", dtype="float32")
    scored = _scored(lm, held_out_task, "test")
    assert scored["results"]["tiny_choices"]["sample_len"] == 9
    with pytest.raises(
        EvaluationError, match=r"Document \d+ of task 'tiny_choices' .* score a split"
    ):
        _scored(lm, held_out_task, "validation")
    # The hashes are those of the harness, and the dense model's accuracy is the stock class's.
    whole = _scored(HFLM(str(folder), device="cpu", dtype="float32"), held_out_task, "validation")
    samples = whole["samples"]["tiny_choices"][4:]
    written = json.loads((out / SEARCHED_FILE).read_text(encoding="utf-8"))
    assert written["doc_hashes"] == sorted(sample["doc_hash"] for sample in samples)
    found = sum(sample["acc"] for sample in samples) / len(samples)
    assert manifest.chosen["accuracy_dense"] == pytest.approx(found)


def test_as_a_selection_it_leaves_the_documents_with_the_checkpoint(
    folder: Path, held_out_task: Path, asked: Callable[..., Any], tmp_path: Path
) -> None:
    selection = {"method": "tale", "parameters": {"tasks": [str(held_out_task)], "documents": 8}}
    recipe = asked("prune_comp", **{"parameters.selection": selection})
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    written = json.loads((out / SEARCHED_FILE).read_text(encoding="utf-8"))
    assert len(written["doc_hashes"]) == 8


def test_the_content_of_a_task_file_is_part_of_the_key(
    folder: Path, held_out_task: Path, asked: Callable[..., Any], tmp_path: Path
) -> None:
    own, data = tmp_path / "own.yaml", tmp_path / "validation.jsonl"
    text = held_out_task.read_text(encoding="utf-8")
    own.write_text(text.replace(f"{held_out_task.parent}/validation", f"{tmp_path}/validation"))
    keys = []
    for line in ("a", "b", "a"):
        data.write_text(line)
        recipe = asked(**{"parameters.tasks": str(own)})
        keys.append(content_key(SourceModel(folder), recipe))
    assert keys[0] == keys[2] != keys[1]


def test_the_bundled_model_is_asked_what_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def questions(names: Any, *_: object, **__: object) -> Any:
        asked.append(names)
        raise CalibrationError("no questions")

    monkeypatch.setattr(tale, "held_out_questions", questions)
    with pytest.raises(CalibrationError, match="no questions"):
        compress("bundled", load_recipe("tale"), tmp_path / "out", progress=False)
    assert asked == [["streamline_demo"]]
    (tmp_path / "link").symlink_to(bundled_model())
    assert named_tasks(["auto", "piqa"], tmp_path / "link") == ["streamline_demo", "piqa"]
    assert named_tasks(["auto", "piqa"], tmp_path) == ["arc_easy", "piqa"]


def test_questions_that_cannot_be_had_are_refused_with_the_parameter(
    held_out_task: Path, tmp_path: Path
) -> None:
    path = tmp_path / "task.yaml"
    text = held_out_task.read_text(encoding="utf-8")
    path.write_text(text.replace("dataset_path: json", "dataset_path: /nowhere/at-all"))
    with pytest.raises(CalibrationError, match=r"parameters\.tasks"):
        held_out_questions([str(path)], "acc", 8)


def test_a_limit_of_accuracy_names_the_size_within_it(
    folder: Path, asked: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = {5: 0.9}  # the dense model
    monkeypatch.setattr(tale.Exam, "accuracy", lambda self, layer, values: falling.get(layer, 0.7))
    recipe = asked(**{"parameters.epsilon": 0.1})
    match = (
        r"epsilon 0\.1 removes 0 layers of the 2 .* from 0\.9000 to 0\.7000; remove fewer, raise"
    )
    with pytest.raises(SparsityError, match=match):
        compress(folder, recipe, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("old", "new", "split", "message"),
    [
        ("", "", "train", r"scored on its split 'test' and has no split 'train'.*validation"),
        ("test_split: test", "", None, "scored on its split 'validation' and has no other split"),
        ("test_split: test", "test_split: validation", None, "All 24 questions in split"),
        ("{metric: acc},", "", None, "no metric acc; it has acc_norm"),
        ("multiple_choice", "loglikelihood", None, "type loglikelihood.*multiple_choice"),
    ],
)
def test_tasks_that_cannot_be_searched_on(
    old: str, new: str, split: Any, message: str, held_out_task: Path, tmp_path: Path
) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(held_out_task.read_text(encoding="utf-8").replace(old, new))
    with pytest.raises(CalibrationError, match=message):
        held_out_questions([str(path)], "acc", 8, split=split)
