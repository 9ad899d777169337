"""Scores and answers do not depend on the batch, and are those of a plain loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_bench.errors import CheckpointError
from streamline_bench.harness.scoring import scorer
from streamline_bench.opencompass.engine import GenerationSettings, ScoredText
from streamline_bench.opencompass.prompts import load_prompt_tokenizer
from streamline_bench.opencompass.source import entry_source
from streamline_bench.opencompass.transformers_engine import TransformersEngine, load_causal_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {"sliding_window": 16, "head_dim": 8, "final_logit_softcapping": 2.0},
}


def make_engine(folder: Path) -> TransformersEngine:
    source = entry_source(str(folder), device="cpu", dtype="float32")
    return TransformersEngine(load_causal_model(source), load_prompt_tokenizer(str(folder)), 128)


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: Any, make_tiny_model: Callable[..., Path]) -> TransformersEngine:
    return make_engine(
        make_tiny_model(request.param, num_hidden_layers=2, **FAMILIES[request.param])
    )


def texts_of_many_lengths(seed: int = 0) -> list[list[int]]:
    """Some begin alike, as few-shot prompts do; the lengths differ widely."""
    draw = random.Random(seed)
    shots = [draw.randrange(4, 100) for _ in range(20)]
    rows = []
    for number in range(16):
        own = [draw.randrange(4, 100) for _ in range(draw.choice([1, 2, 5, 30]))]
        rows.append([1, *(shots if number % 2 else []), *own])
    return rows


def loop(engine: TransformersEngine, text: ScoredText) -> float:
    """One text at a time, every token of every span, in float64."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([list(text.ids)])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return sum(
        float(logprobs[at - 1, text.ids[at]])
        for start, end in text.spans
        for at in range(start, end)
    )


def test_scores_are_those_of_a_loop(engine: TransformersEngine) -> None:
    texts = [ScoredText.whole(ids) for ids in texts_of_many_lengths()]
    expected = [loop(engine, text) for text in texts]
    assert engine.logprob_sums(texts) == pytest.approx(expected, abs=2e-4)


def test_scores_do_not_depend_on_the_batch(engine: TransformersEngine) -> None:
    texts = [ScoredText.whole(ids) for ids in texts_of_many_lengths(1)]
    together = engine.logprob_sums(texts)
    alone = [engine.logprob_sums([text])[0] for text in texts]
    pairs = [total for i in range(0, 16, 2) for total in engine.logprob_sums(texts[i : i + 2])]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together == pytest.approx(pairs, abs=1e-4)


def test_spans_and_masks(engine: TransformersEngine) -> None:
    ids = texts_of_many_lengths(2)[1]
    texts = [
        ScoredText.whole(ids, masked=3),
        ScoredText(ids, ((1, 2), (4, 6), (9, len(ids))), len(ids)),
        ScoredText(ids, (), 1),
        ScoredText.whole(ids, padding=ids[4]),
    ]
    expected = [loop(engine, text) for text in texts]
    assert expected[2] == 0.0
    assert engine.logprob_sums(texts) == pytest.approx(expected, abs=2e-4)


def test_a_model_whose_head_cannot_be_reached_is_scored_plainly(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "head_objection", lambda *_: "it is odd")
    plain = TransformersEngine(engine.model, engine.tokenizer, 128)
    texts = [ScoredText.whole(ids, masked=1) for ids in texts_of_many_lengths(3)[:4]]
    assert plain.logprob_sums(texts) == pytest.approx(engine.logprob_sums(texts), abs=1e-4)
    rows = [list(text.ids) for text in texts]
    torch.testing.assert_close(
        plain.last_logits(rows), engine.last_logits(rows), atol=1e-5, rtol=1e-4
    )


def test_last_logits_are_those_behind_each_prompt(engine: TransformersEngine) -> None:
    rows = texts_of_many_lengths(4)
    found = engine.last_logits(rows)
    assert found.shape == (len(rows), 1, 100)
    for ids, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            expected = engine.model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits[0], expected.float(), atol=1e-5, rtol=1e-4)


def test_answers_do_not_depend_on_the_batch(engine: TransformersEngine) -> None:
    rows = texts_of_many_lengths(5)
    settings = GenerationSettings(most=6)
    together = engine.generate(rows, settings)
    assert together == [engine.generate([ids], settings)[0] for ids in rows]
    assert len(set(together)) > 3


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_answers_do_not_cross_a_rope_limit_together(
    kind: str, make_tiny_model: Callable[..., Path]
) -> None:
    """transformers takes the frequencies of a whole batch from its longest sequence."""
    longrope = kind == "longrope"
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 8.0, 24.0, 40.0]}
    settings = {"rope_type": kind, "rope_theta": 10000.0}
    extra = {"original_max_position_embeddings": 32} if longrope else {}
    engine = make_engine(
        make_tiny_model(
            "phi3" if longrope else "llama",
            num_key_value_heads=4,
            max_position_embeddings=128 if longrope else 32,
            rope_parameters=settings | (factors | extra if longrope else {"factor": 8.0}),
            initializer_range=0.3,
            **extra,
        )
    )
    draw = random.Random(0)
    lengths = [10, 40, 12, 28, 28, 30, 45, 20, 8]  # 28 and 30 cross the limit while they grow
    prompts = [[1, *(draw.randrange(4, 100) for _ in range(n - 1))] for n in lengths]
    asked = GenerationSettings(most=8, least=8)
    alone = [engine.generate([prompt], asked)[0] for prompt in prompts]
    assert engine.generate(prompts, asked) == alone
    assert engine._generate(prompts, asked) != alone  # the limit matters here
    twice = GenerationSettings(most=8, options={"num_beams": 2, "num_return_sequences": 2})
    pairs = [text for prompt in prompts for text in engine.generate([prompt], twice)]
    assert engine.generate(prompts, twice) == pairs


def test_stop_words_and_lengths(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts_of_many_lengths(6)[:4]
    real, widths = engine.model.generate, []

    def measured(**arguments: Any) -> Any:
        outputs = real(**arguments)
        widths.append(outputs.shape[1] - arguments["input_ids"].shape[1])
        return outputs

    monkeypatch.setattr(engine.model, "generate", measured)
    free = engine.generate(rows, GenerationSettings(most=6, least=6))
    assert widths == [6]
    word = free[0].split()[1]
    stopped = engine.generate(rows, GenerationSettings(most=6, least=6, stop_words=(word,)))
    assert stopped == [text.split(word)[0] for text in free]


def test_several_answers_per_prompt(engine: TransformersEngine) -> None:
    options = {"do_sample": True, "num_return_sequences": 3}
    settings = GenerationSettings(most=4, options=options)
    assert len(engine.generate(texts_of_many_lengths(7)[:2], settings)) == 6


def test_out_of_memory_halves_the_batch(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = engine.model.generate

    def short_of_memory(**arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return real(**arguments)

    rows = texts_of_many_lengths(8)[:4]
    settings = GenerationSettings(most=3)
    expected = engine.generate(rows, settings)
    monkeypatch.setattr(engine.model, "generate", short_of_memory)
    assert engine.generate(rows, settings) == expected
    assert sizes == [4, 2, 2]


def test_a_damaged_checkpoint_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    source = entry_source(str(tiny_llama), device="cpu", dtype="float33")
    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        load_causal_model(source)
