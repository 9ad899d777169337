"""Scores and answers through vLLM are those of the transformers engine."""

from __future__ import annotations

import os
from typing import Any

import pytest

from streamline_bench.demo import model
from streamline_bench.opencompass.engine import GenerationSettings, ScoredText
from streamline_bench.opencompass.prompts import load_prompt_tokenizer
from streamline_bench.opencompass.source import entry_source

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

CONTEXTS = [
    "Dan is taller than Nina. Leo is taller than Vera. Vera is taller than Dan. "
    "who is the tallest?",
    "Leo has a yellow ball and a red key. Kate has a pink box and a brown doll. "
    "list the things of Kate:",
]


@pytest.fixture(scope="module")
def engines() -> tuple[Any, Any]:
    pytest.importorskip("vllm", reason="vLLM is not installed (tox -e vllm installs it)")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from streamline_bench.opencompass.engine import VLLMEngine
    from streamline_bench.opencompass.transformers_engine import (
        TransformersEngine,
        load_causal_model,
    )

    folder = str(model())
    tokenizer = load_prompt_tokenizer(folder)
    plain = entry_source(folder, dtype="float32", device="cpu")
    memory = {"enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20, "max_num_seqs": 8}
    served = entry_source(folder, dtype="float32", model_kwargs=memory, for_vllm=True)
    return (
        VLLMEngine(served, tokenizer, 128),
        TransformersEngine(load_causal_model(plain), tokenizer, 128),
    )


def test_ppl_is_the_same(engines: tuple[Any, Any]) -> None:
    served, plain = engines
    rows = [served.tokenizer(text)["input_ids"] for text in CONTEXTS]
    texts = [ScoredText.whole(ids, masked=masked) for ids in rows for masked in (0, 1, 5)]
    texts.append(ScoredText(rows[0], ((2, 4), (9, 11)), 4))
    for text, theirs, ours in zip(
        texts, plain.logprob_sums(texts), served.logprob_sums(texts), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4 * text.divisor)


def test_a_text_as_long_as_it_gets(engines: tuple[Any, Any]) -> None:
    served, plain = engines
    ids = (served.tokenizer(" ".join(CONTEXTS * 4))["input_ids"])[: served.max_length]
    text = ScoredText.whole(ids)
    assert len(ids) == 127
    assert served.logprob_sums([text]) == pytest.approx(plain.logprob_sums([text]), abs=1e-2)


def test_answers_are_the_same(engines: tuple[Any, Any]) -> None:
    served, plain = engines
    rows = [served.tokenizer(text)["input_ids"] for text in CONTEXTS]
    settings = GenerationSettings(most=12, stop_words=(".",))
    answers = served.generate(rows, settings)
    assert answers == plain.generate(rows, settings)
    assert "pink box" in answers[1]
    several = GenerationSettings(most=3, options={"num_return_sequences": 2, "temperature": 1.0})
    assert len(served.generate(rows, several)) == 4
