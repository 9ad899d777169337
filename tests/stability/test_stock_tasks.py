"""Tasks of the stock harness, with its own metric code, on made-up documents of a tiny model.

Nothing is downloaded: each task includes the harness's YAML and reads a file of ours. Packages that
a task imports and does not use for these documents are stood for.
"""

from __future__ import annotations

import json
import random
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lm_eval.tasks
import pytest

from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Comparison
from streamline_bench.stability.readers.load import load_samples
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings

STOCK = Path(lm_eval.tasks.__file__).parent
DRAW = random.Random(3)
SUBJECTS = {"mmlu_stem": ["algebra", "physics"], "mmlu_other": ["nutrition"]}
EVERY_SUBJECT = [subject for subjects in SUBJECTS.values() for subject in subjects]


def words(count: int) -> str:
    return " ".join(f"w{DRAW.randrange(96)}" for _ in range(count))


def ifeval(number: int) -> dict[str, Any]:
    rules = ["length_constraints:number_words", "keywords:existence"][: 1 + number % 2]
    kwargs = [{"num_words": 3, "relation": "at least"}, {"keywords": [f"w{number}"]}]
    return {"key": number, "prompt": words(4), "instruction_id_list": rules,
            "kwargs": kwargs[: len(rules)]}  # fmt: skip


def ruler(lengths: tuple[int, ...]) -> Callable[[int], dict[str, Any]]:
    def make(number: int) -> dict[str, Any]:
        needles = words(2).split()
        return {"input": f"{needles[0]} {words(3)}", "outputs": needles, "gen_prefix": "w1",
                "max_length": lengths[number % len(lengths)]}  # fmt: skip

    return make


def drop(number: int) -> dict[str, Any]:
    answer = words(3)
    return {"passage": words(5), "question": words(2), "answer": [answer], "answers": [[answer]]}


def mmlu(number: int) -> dict[str, Any]:
    return {"question": words(4), "choices": words(4).split(), "answer": number % 4}


TASKS: dict[str, tuple[str, Callable[[int], dict[str, Any]], str]] = {
    "ifeval": ("ifeval/ifeval.yaml", ifeval, "test_split: test"),
    "humaneval": (
        "humaneval/humaneval.yaml",
        lambda number: {"prompt": words(3), "test": words(1), "entry_point": "f"},
        "repeats: 2",
    ),
    "mbpp": (
        "mbpp/mbpp.yaml",
        lambda number: {"text": words(3), "code": words(2), "test_list": words(3).split()},
        "num_fewshot: 0",
    ),
    "gsm8k": (
        "gsm8k/gsm8k.yaml",
        lambda number: {"question": words(4), "answer": f"so #### {DRAW.randrange(96)}"},
        "training_split: null\nfewshot_split: test\nnum_fewshot: 0",
    ),
    "ruler": ("ruler/niah_single_1.yaml", ruler((4096,)), "custom_dataset: null"),
    "ruler_long": ("ruler/niah_single_1.yaml", ruler((4096, 8192)), "custom_dataset: null"),
    "longbench": (
        "longbench/qasper.yaml",
        lambda number: {"context": words(3), "question": words(2), "answers": [words(4)]},
        "",
    ),
    "drop": (
        "drop/default.yaml",
        drop,
        "training_split: null\nvalidation_split: test\nprocess_docs: null",
    ),
    "lambada": ("lambada/lambada_openai.yaml", lambda number: {"text": words(6)}, ""),
    "wikitext": (
        "wikitext/wikitext.yaml",
        lambda number: {"page": words(8)},
        "training_split: null\nvalidation_split: null",
    ),
    "blimp": (
        "blimp/_template_yaml",
        lambda number: {"sentence_good": words(4), "sentence_bad": words(4)},
        "validation_split: test",
    ),
    **{
        subject: ("mmlu/default/_default_template_yaml", mmlu, "fewshot_split: test")
        for subjects in SUBJECTS.values()
        for subject in subjects
    },
}


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for name, (stock, make, more) in TASKS.items():
        lines = "".join(json.dumps(make(number)) + "\n" for number in range(14))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        drawn = "until: ['w9'], max_gen_toks: 6, do_sample: true, temperature: 1.0"
        kind = f"generation_kwargs: {{{drawn}}}"
        chosen = name in ("lambada", "wikitext", "blimp", *EVERY_SUBJECT)
        text = [
            f"include: {STOCK / stock}", f"task: stock_{name}", "dataset_path: json", "tag: null",
            "dataset_name: null",
            f"dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}",
            more, "" if chosen else kind,
        ]  # fmt: skip
        (folder / f"{name}.yaml").write_text("\n".join(text) + "\n", encoding="utf-8")
    for group, subjects in SUBJECTS.items():
        listed = ", ".join(f"stock_{subject}" for subject in subjects)
        (folder / f"{group}.yaml").write_text(
            f"group: stock_{group}\ntask: [{listed}]\n"
            "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
        )
    listed = ", ".join(f"stock_{group}" for group in SUBJECTS)
    (folder / "mmlu.yaml").write_text(
        f"group: stock_mmlu\ntask: [{listed}]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )


class CodeEval:
    """Stands for the metric that runs code: nothing is run, an answer with 'w1' passes."""

    def compute(self, references: Any, predictions: Any, k: Any) -> Any:
        passed = [["w1" in answer for answer in answers] for answers in predictions]
        return {"pass@1": sum(map(sum, passed)) / sum(map(len, passed))}, None


@pytest.fixture(scope="module")
def stood_for() -> Iterator[None]:
    import evaluate
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        for name in ("wonderwords", "langdetect", "jieba", "fuzzywuzzy", "rouge"):
            if name not in sys.modules:
                patch.setitem(sys.modules, name, MagicMock())
        frozen = MagicMock(immutabledict=dict)
        patch.setitem(sys.modules, "immutabledict", frozen)
        patch.setattr(nltk.data, "find", lambda *names: "")
        patch.setattr(evaluate, "load", lambda name: CodeEval())
        yield


@pytest.fixture(scope="module")
def folder(
    stood_for: None,
    make_tiny_model: Callable[..., Path],
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    work = tmp_path_factory.mktemp("stock")
    write_tasks(work / "tasks")
    shutil.copytree(make_tiny_model("llama", num_hidden_layers=2), work / "model")
    script = runpy.run_path(str(repository / "tests" / "stability" / "evaluate_toy.py"))
    script["add_noise"](work / "model", work / "noisy")
    names = [*(f"stock_{name}" for name in TASKS if name not in EVERY_SUBJECT),
             "stock_mmlu"]  # fmt: skip
    for side, model in (("dense", "model"), ("pruned", "noisy")):
        tracker = EvaluationTracker(output_path=str(work / side))
        found: Any = simple_evaluate(
            model="hf", model_args=f"pretrained={work / model}", tasks=names, device="cpu",
            batch_size=16, log_samples=True, evaluation_tracker=tracker, bootstrap_iters=0,
            confirm_run_unsafe_code=True,
            task_manager=TaskManager(include_path=str(work / "tasks"), include_defaults=False),
        )  # fmt: skip
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for name in found["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    return work


@pytest.fixture(scope="module")
def runs(folder: Path) -> tuple[Samples, Samples]:
    dense, pruned = (
        load_samples(folder / side, run=side, progress=False) for side in ("dense", "pruned")
    )
    return dense, pruned


@pytest.fixture(scope="module")
def result(runs: tuple[Samples, Samples]) -> Comparison:
    return compare_answers(*runs, settings=Settings(draws=200))


@pytest.mark.slow
def test_what_judges_each_task(result: Comparison) -> None:
    judged = {(task.task, task.filter): task.verdict for task in result.tasks}
    judged |= {(each.task, each.filter): each.metric for each in result.grades if each.decides}
    mmlu_tasks = {f"stock_{name}": "acc" for names in SUBJECTS.values() for name in names}
    assert judged == {
        ("stock_ifeval", "none"): "prompt_level_strict_acc",
        ("stock_humaneval", "create_test"): "pass@1",
        ("stock_mbpp", "none"): "pass_at_1",
        ("stock_gsm8k", "strict-match"): "exact_match",
        ("stock_gsm8k", "flexible-extract"): "exact_match",
        ("stock_ruler", "none"): "4096",
        ("stock_ruler_long", "none"): "4096 or 8192",
        ("stock_longbench", "none"): "score",
        ("stock_drop", "none"): "em",
        ("stock_lambada", "none"): "acc",
        ("stock_blimp", "none"): "acc",
        **{(task, "none"): metric for task, metric in mmlu_tasks.items()},
    }
    assert set(result.not_compared) == {"stock_wikitext"}
    units = {(found.task, found.unit) for found in result.perplexities}
    assert units == {("stock_wikitext", "word"), ("stock_wikitext", "byte"),
                     ("stock_lambada", "answer")}  # fmt: skip
    groups = {group.group: len(group.tasks) for group in result.groups}
    assert groups == {"stock_mmlu": 3, "stock_mmlu_stem": 2}
    assert "a list" in result.aggregate_only["stock_ifeval"]["inst_level_strict_acc"]


@pytest.mark.slow
def test_means_are_those_that_the_harness_prints(
    result: Comparison, runs: tuple[Samples, Samples]
) -> None:
    own = {(task.task, task.filter, task.verdict): task.pruned.value for task in result.tasks}
    own |= {
        (grade.task, grade.filter, grade.metric): grade.pruned.value * grade.scale
        for grade in result.grades
    }
    checked = 0
    for (task, name, metric), value in own.items():
        printed = runs[1].info.results[task].get(f"{metric},{name}")
        if printed is not None:
            assert value == pytest.approx(printed), (task, metric)
            checked += 1
    assert checked > 12
    long = runs[1].info.results["stock_ruler_long"]
    both = own["stock_ruler_long", "none", "4096 or 8192"]
    assert both == pytest.approx((long["4096,none"] + long["8192,none"]) / 2)


@pytest.mark.slow
def test_the_task_with_repeats_has_a_grade_for_each_document(
    runs: tuple[Samples, Samples],
) -> None:
    rows = runs[0].frame[runs[0].frame["task"] == "stock_humaneval"]
    assert runs[0].info.repeats["stock_humaneval"] == 2 and len(rows) == 14
    assert {found["pass@1"] for found in rows["metrics"]} <= {0.0, 0.5, 1.0}


@pytest.mark.slow
def test_code_is_not_run_without_the_harness_own_switch(folder: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    for task in ("stock_humaneval", "stock_mbpp"):
        with pytest.raises(ValueError, match=rf"{task}.*confirm_run_unsafe_code"):
            simple_evaluate(
                model="hf", model_args=f"pretrained={folder / 'model'}", device="cpu",
                tasks=[task], task_manager=manager,
            )  # fmt: skip
