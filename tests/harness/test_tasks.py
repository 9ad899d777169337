"""Every task file that this package adds to the harness (the bundled ones have their own tests)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from jinja2 import Environment, meta
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from streamline_bench.core.machine.environment import resource
from streamline_bench.errors import SamplesError
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.methods.tools.task_questions import doc_hash, held_out_questions

ROOT = resource("tasks") / "lm_eval"
FILES = sorted(path for kind in ("paper", "local") for path in (ROOT / kind).rglob("*.yaml"))
HARNESS_NAMES = "hellaswag piqa wsc commonsense_qa boolq mmlu cmmlu gsm8k".split()


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(ROOT))


def members(manager: TaskManager, name: str) -> list[str]:
    """The tasks of a group, groups inside it opened."""
    entry = manager.task_index[name]
    listed = (entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)).get("task")
    if not isinstance(listed, list):
        return [name]
    names = [each if isinstance(each, str) else each["task"] for each in listed]
    return [task for each in names for task in members(manager, each)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_a_task_or_group_under_its_own_name(path: Path, manager: TaskManager) -> None:
    config = load_yaml(path, resolve_func=True)
    name = config.get("group") or config["task"]
    assert name == path.stem.removeprefix("_")
    assert Path(str(manager.task_index[name].yaml_path)) == path
    assert config["metadata"]["version"]


def test_the_papers_groups_name_tasks_that_exist(manager: TaskManager) -> None:
    classification = load_yaml(ROOT / "paper" / "_streamline_classification.yaml")["task"]
    generation = load_yaml(ROOT / "paper" / "_streamline_generation.yaml")["task"]
    assert len(classification) == 12
    assert len(generation) == 3
    assert set(HARNESS_NAMES) <= {*classification, *generation}
    assert {*classification, *generation} <= set(manager.all_tasks)


def test_our_names_hide_none_of_the_harness() -> None:
    """A later folder replaces names of an earlier one: ours would be in place of the harness's."""
    ours = {path for path in FILES if not path.name.startswith("_")}
    stock = Path(lm_eval.tasks.__file__).parent
    hidden = {load_yaml(path, resolve_func=False)["task"] for path in ours} & {
        path.stem for path in stock.rglob("*.yaml")
    }
    assert not hidden


def test_a_text_of_digits_is_asked_as_it_is() -> None:
    """The harness takes a template that comes out as digits for the number of a choice."""
    seen, wrong = 0, []
    for path in sorted(ROOT.rglob("*.yaml")):
        config = load_yaml(path, resolve_func=False)
        if not config.get("doc_to_text") or not config.get("doc_to_choice"):
            continue
        text = config["doc_to_text"]
        fields = meta.find_undeclared_variables(Environment().parse(text)) or {text}
        settings = SimpleNamespace(doc_to_text=text, doc_to_choice=config["doc_to_choice"])
        task = SimpleNamespace(prompt=None, config=settings, _config=settings, features=fields)
        asked = ConfigurableTask.doc_to_text(task, dict.fromkeys(fields, "12"))
        seen += 1
        wrong += [] if isinstance(asked, str) and asked.strip() else [path.name]
    assert wrong == []
    assert seen >= 25


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamlineLM:
    """A tiny random model that reads bytes, so that any language can be asked."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    inner.decoder = ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return StreamlineLM(pretrained=str(folder), device="cpu", batch_size=4)


def test_local_tasks_answer_a_few_documents(
    manager: TaskManager,
    model: StreamlineLM,
    shared_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(shared_folder))
    names = [task for task in members(manager, "streamline_local") if "blimp" not in task]
    names += members(manager, "local_blimp")[:2]
    names += members(manager, "streamline_local_generation")
    results = simple_evaluate(
        model=model, tasks=names, limit=3, task_manager=manager, bootstrap_iters=0
    )
    assert results is not None
    assert set(results["samples"]) == set(names)
    for name, samples in results["samples"].items():
        assert len({sample["doc_id"] for sample in samples}) == 3, name
    chid = results["samples"]["local_chid"][0]
    text = chid["doc"]["before"] + chid["doc"]["choices"][chid["doc"]["answer"]]
    assert text == chid["doc"]["content"].replace(
        "#idiom#", chid["doc"]["candidates"][chid["doc"]["answer"]]
    )


def test_local_gold_answers_are_among_the_choices(
    manager: TaskManager, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(shared_folder))
    for name in ("local_rte", "local_c3", "local_mmlu", "local_commonsense_qa"):
        task = manager.load([name])["tasks"][name]
        golds = {task.doc_to_target(doc) for doc in list(task.test_docs())[:200]}
        assert golds <= set(range(len(task.doc_to_choice(task.test_docs()[0]))))
        assert len(golds) > 1


def local_module() -> Any:
    return load_yaml(ROOT / "local" / "local_piqa.yaml", resolve_func=True)["custom_dataset"]


def test_unset_variable_and_missing_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = local_module()
    monkeypatch.delenv("STREAMLINE_BENCH_DATA", raising=False)
    with pytest.raises(SamplesError, match="environment variable STREAMLINE_BENCH_DATA"):
        load(file="eval/piqa_val.jsonl")
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    with pytest.raises(SamplesError, match=r"there is no eval/piqa_val\.jsonl"):
        load(file="eval/piqa_val.jsonl")


@pytest.mark.parametrize("below", ["", "data"])
def test_files_are_found_with_and_without_the_data_folder(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / below / "eval"
    folder.mkdir(parents=True)
    documents = [{"query": "a\u2028b", "gold": 1}, {"query": "c", "gold": 0}]
    lines = [json.dumps(each, ensure_ascii=False) for each in documents]
    (folder / "x.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    assert local_module()(file="eval/x.jsonl", metadata={})["test"].to_list() == documents


@pytest.mark.parametrize(
    ("lines", "held"), [(1000, 0), (1003, 0), (1004, 1), (1221, 55), (2376, 256), (14042, 256)]
)
def test_held_out_lines_lie_evenly_behind_the_first_thousand(
    lines: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(lines)))
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(tmp_path))
    whole = local_module()(file="x.jsonl")
    found = local_module()(file="x.jsonl", hold_out=True)
    apart = list(found["validation"]["n"]) if held else []
    assert len(apart) == held
    scored = list(found["test"]["n"])
    assert sorted([*scored, *apart]) == list(whole["test"]["n"]) == list(range(lines))
    assert scored[:1000] == list(range(1000))
    gaps = {after - before for before, after in pairwise(apart)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def _searched_and_scored(task: str, manager: TaskManager) -> tuple[set[str], set[str]]:
    """The hashes of the documents that choose layers, and of those that the harness scores."""
    found, _ = held_out_questions([task], "acc", 10_000)
    loaded = manager.load([task])["tasks"]
    scored = {doc_hash(document) for each in loaded.values() for document in each.eval_docs}
    return {question.doc_hash for question in found}, scored


def test_no_bundled_document_is_searched_and_scored(manager: TaskManager) -> None:
    searched, scored = _searched_and_scored("streamline_demo_arithmetic", manager)
    assert (len(searched), len(scored)) == (64, 250)
    assert searched.isdisjoint(scored)


@pytest.mark.parametrize(
    ("task", "held", "scored"),
    [("local_arc_easy", 256, 2120), ("local_chid", 250, 1752)],
)
def test_no_local_document_is_searched_and_scored(
    task: str,
    held: int,
    scored: int,
    manager: TaskManager,
    shared_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STREAMLINE_BENCH_DATA", str(shared_folder))
    documents, of_the_board = _searched_and_scored(task, manager)
    assert held - 3 <= len(documents) <= held  # a question that is scored as well is left out
    assert scored - 3 <= len(of_the_board) <= scored
    assert documents.isdisjoint(of_the_board)


def test_one_chid_document_per_gap() -> None:
    split = load_yaml(ROOT / "paper" / "streamline_chid.yaml", resolve_func=True)["process_docs"]
    document = {
        "content": ["a#idiom000001#b#idiom000002#c", "d#idiom000003#"],
        "candidates": ["P", "Q", "R", "S"],
        "answers": {"text": ["Q", "S", "P"], "candidate_id": [1, 3, 0]},
    }
    rows = split(datasets.Dataset.from_list([document])).to_list()
    whole = [row["before"] + row["choices"][row["gold"]] for row in rows]
    assert whole == ["aQbSc", "aQbSc", "dP"]
    assert [row["before"] for row in rows] == ["a", "aQb", "d"]
    assert rows[0]["choices"] == ["PbSc", "QbSc", "RbSc", "SbSc"]


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("Because. So the answer is yes.", True, 1.0),
        ("So the answer is No", False, 1.0),
        ("So the answer is no.", True, 0.0),
        ("yes", True, 0.0),
    ],
)
def test_strategyqa_reads_the_verdict(text: str, answer: bool, score: float) -> None:
    config = load_yaml(ROOT / "paper" / "streamline_strategyqa.yaml", resolve_func=True)
    assert config["process_results"]({"answer": answer}, [text]) == {"exact_match": score}


def test_rouge_of_equal_texts_is_a_hundred() -> None:
    rouge = load_yaml(ROOT / "paper" / "streamline_xsum.yaml", resolve_func=True)["process_results"]
    assert rouge({"summary": "the cat sat"}, [" The cat sat "])["rougeL"] == pytest.approx(100)
    assert rouge({"summary": "the cat sat"}, ["dogs"])["rouge1"] == 0
