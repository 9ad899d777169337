"""Tokens of generated answers: counted by hand, and against transformers' own generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamline_bench.harness.answer_tokens import AnswerCounter, count_answer
from streamline_bench.stability.readers.answer_tokens import (
    ANSWER_TOKENS,
    AnswerTokens,
    noted_tokens,
    request_key,
)

WORDS = ["<end>", "<think>", "a", "b", "\n", "c", "."]


def decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens if token)


def counted(text: Sequence[int], think: int | str | None = None) -> tuple[float, ...]:
    return tuple(count_answer(text, ends=[0], stop=["\n", ".c"], think_end=think, decode=decode))


@pytest.mark.parametrize(
    ("tokens", "think", "expected"),
    [
        ([2, 3, 0, 0, 0], None, (3, 0, 0)),  # its end, then padding
        ([2, 3, 4, 2, 2], None, (3, 0, 0)),  # others of the batch went on
        ([2, 6, 5, 2], None, (3, 0, 0)),  # a stop of two tokens
        ([2, 3, 5, 6], None, (4, 0, 1)),  # the limit
        ([2, 2, 1, 3, 0], 1, (5, 3, 0)),
        ([2, 1, 2, 1, 3, 6], "<think>", (6, 4, 1)),
        ([2, 3, 0], "<think>", (3, 0, 0)),
        ([], None, (0, 0, 1)),
    ],
)
def test_by_hand(tokens: list[int], think: int | str | None, expected: tuple[float, ...]) -> None:
    assert counted(tokens, think) == expected


def test_answers_are_known_by_prompt_and_text() -> None:
    """Engines hand on arguments of their own; two answers to one prompt keep their numbers."""
    handed = []
    hook = SimpleNamespace(add_partial=lambda *given: handed.append(given))
    counter = AnswerCounter(hook)
    answers = [("q", "x"), ("p", "y"), ("q", "z")]
    counter.waiting.extend(AnswerTokens(count, 0, 0.0) for count in (1, 2, 3))
    for prompt, text in answers:
        counter.add_partial("generate_until", (prompt, {"as": "an engine has it"}), text)
    assert len(handed) == 3
    asked = {"until": ["."]}
    requests = [SimpleNamespace(args=(prompt, asked)) for prompt in ("p", "q", "q", "new")]
    noted = counter.of_requests(requests, ["y", "x", "z", "from the cache"])
    assert noted == {request_key("p", asked): [(2, 0, 0)],
                     request_key("q", asked): [(1, 0, 0), (3, 0, 0)]}  # fmt: skip


def test_answers_of_a_document_are_averaged() -> None:
    arguments = {"until": ["\n"], "max_gen_toks": 4}
    noted = {request_key("q", arguments): [[3, 1, 0], [4, 2, 1]]}
    assert noted_tokens(noted, [("q", dict(reversed(arguments.items())))]) == (3.5, 1.5, 0.5)
    assert noted_tokens(noted, [("q", {})]) is None


@pytest.fixture(scope="module")
def generated(tiny_llama: Path, trunk_tasks: Path) -> dict[str, list[int]]:
    """Prompt -> up to 12 greedy tokens, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    lines = (trunk_tasks / "choice.jsonl").read_text("utf-8").splitlines()
    found = {}
    for prompt in (json.loads(line)["query"] for line in lines):
        given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            whole = model.generate(**given, max_new_tokens=12, do_sample=False)[0]
        found[prompt] = whole[given["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.parametrize("thinks", [False, True])
def test_of_a_run_against_generation_one_by_one(
    thinks: bool,
    tiny_llama: Path,
    trunk_tasks: Path,
    generated: dict[str, list[int]],
    tmp_path: Path,
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from streamline_bench.harness.lm import StreamlineLM
    from streamline_bench.stability.readers.load import load_samples

    decode = AutoTokenizer.from_pretrained(tiny_llama).decode
    first = next(iter(generated.values()))
    stop, marker = decode(first[-1:]), decode(first[3:4]) if thinks else None
    tracker = EvaluationTracker(output_path=str(tmp_path))
    lm = StreamlineLM(
        pretrained=str(tiny_llama), device="cpu", batch_size=4, think_end_token=marker
    )
    found: Any = simple_evaluate(
        model=lm, tasks=["trunk_generation"], log_samples=True, evaluation_tracker=tracker,
        task_manager=TaskManager(include_path=str(trunk_tasks), include_defaults=False),
        gen_kwargs=f"max_gen_toks=12,until={stop}", bootstrap_iters=0,
    )  # fmt: skip
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    tracker.save_results_samples("trunk_generation", samples["trunk_generation"])
    assert len(found["config"][ANSWER_TOKENS]) == 9

    table = load_samples(tmp_path, progress=False)
    assert ANSWER_TOKENS not in table.info.config
    for _, row in table.frame.iterrows():
        tokens = generated[row["prompt"]]
        texts = [decode(tokens[:count]) for count in range(len(tokens) + 1)]
        ended = [count for count, text in enumerate(texts) if stop in text or "</s>" in text]
        count = ended[0] if ended else len(tokens)
        assert (row["tokens"], row["unfinished"]) == (count, not ended)
        seen = [text.count(marker) if marker else 0 for text in texts[: count + 1]]
        marks = [place for place in range(1, count + 1) if seen[place] > seen[place - 1]]
        assert row["thinking"] == (marks[-1] if marks else 0)
    assert table.frame["thinking"].any() == thinks
