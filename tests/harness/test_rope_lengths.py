"""Rotary frequencies that depend on the longest sequence of a batch, against the stock class."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.architecture import ANY_LENGTHS, RopeGroups, rope_groups, sequence_limit
from streamline_bench.harness.lm import StreamlineLM

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 8.0, 24.0, 40.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

MODELS: dict[str, dict[str, Any]] = {
    "longrope": {
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"max_position_embeddings": 32, "rope_parameters": DYNAMIC},
    "by kind of layer": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "max_position_embeddings": 32,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
    },
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest, make_tiny_model: Callable[..., Path]) -> Path:
    """Weights so wide that other frequencies change every score."""
    folder = make_tiny_model(initializer_range=0.3, **MODELS[request.param])
    # What the file is read as, not what was written, decides.
    assert rope_groups(AutoConfig.from_pretrained(folder)).limit == 32
    return folder


def ids_of_many_lengths() -> list[list[int]]:
    """Below the limit, at it, above it, in no order; some begin alike."""
    draw = random.Random(0)
    shared = [draw.randrange(4, 100) for _ in range(20)]
    new = (9, 12, 13, 30, 2, 11, 25, 12)
    alone = (60, 10, 33, 32, 52, 31)
    rows = [[*shared, *(draw.randrange(4, 100) for _ in range(n))] for n in new]
    return rows + [[draw.randrange(4, 100) for _ in range(n + 1)] for n in alone]


def alone(folder: Path, rows: list[list[int]], answer: int = 2) -> list[float]:
    """Log-probabilities of the last tokens, each by a model that has read nothing before."""
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for ids in rows:
        with torch.no_grad():
            logits = copy.deepcopy(loaded)(torch.tensor([ids[:-1]])).logits[0].double()
        at = torch.tensor(ids[-answer:])[:, None]
        found.append(float(logits.log_softmax(-1)[-answer:].gather(-1, at).sum()))
    return found


def test_scores_of_many_lengths_are_those_of_a_model_alone(model: Path) -> None:
    rows = ids_of_many_lengths()
    lm = StreamlineLM(pretrained=str(model), device="cpu", dtype="float32", max_length=128)
    asked = [(None, ids[:-2], ids[-2:]) for ids in rows]
    expected = alone(model, rows)
    for order in (range(len(rows)), [*range(7, len(rows)), *range(7)]):  # what was asked before
        found = lm._loglikelihood_tokens([asked[i] for i in order], disable_tqdm=True)
        scores = {i: score for i, (score, _) in zip(order, found, strict=True)}
        assert [scores[i] for i in range(len(rows))] == pytest.approx(expected, abs=1e-3)


def test_scores_of_opencompass_are_those_of_a_model_alone(model: Path) -> None:
    from streamline_bench.opencompass.engine import GenerationSettings, ScoredText
    from streamline_bench.opencompass.prompts import load_prompt_tokenizer
    from streamline_bench.opencompass.source import entry_source
    from streamline_bench.opencompass.transformers_engine import (
        TransformersEngine,
        load_causal_model,
    )

    loaded = load_causal_model(entry_source(str(model), device="cpu", dtype="float32"))
    engine = TransformersEngine(loaded, load_prompt_tokenizer(str(model)), 128)
    rows = ids_of_many_lengths()
    texts = [ScoredText(ids, ((len(ids) - 2, len(ids)),), divisor=1) for ids in rows]
    assert engine.logprob_sums(texts) == pytest.approx(alone(model, rows), abs=1e-3)
    settings = GenerationSettings(most=4)
    together = engine.generate(rows, settings)
    assert together == [engine.generate([ids], settings)[0] for ids in reversed(rows)][::-1]


def test_scores_are_those_of_the_stock_class_one_by_one(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = " ".join(f"w{i}" for i in range(28))
    choices = [" w5 w6", " " + " ".join(f"w{i % 90}" for i in range(7, 40)), " w9 w2 w3"]
    options: dict[str, Any] = {
        "pretrained": str(model), "device": "cpu", "dtype": "float32", "max_length": 128,
    }  # fmt: skip

    def scores(kind: Any, size: int, order: list[int]) -> dict[int, float]:
        lm = kind(batch_size=size, **options)
        asked = [
            Instance("loglikelihood", {}, (context, choices[i]), i, metadata=("t", i, 1))
            for i in order
        ]
        found = lm.loglikelihood(asked, disable_tqdm=True)
        return {i: score for i, (score, _) in zip(order, found, strict=True)}

    stock = {i: scores(HFLM, 1, [i])[i] for i in range(3)}
    with caplog.at_level("WARNING", "streamline_bench"):
        for size in (1, 8):
            assert scores(StreamlineLM, size, [0, 1, 2]) == pytest.approx(stock, abs=1e-3)
    assert "32 tokens" in caplog.text
    together = scores(HFLM, 3, [0, 1, 2])
    assert max(abs(together[i] - stock[i]) for i in range(3)) > 0.01  # the limit is crossed


def test_where_the_limit_is_read() -> None:
    plain = AutoConfig.for_model("llama", max_position_embeddings=64)
    assert rope_groups(plain) == ANY_LENGTHS
    assert sequence_limit(plain) == 64
    raw = {"model_type": "llama", "max_position_embeddings": 64}
    for key in ("rope_scaling", "rope_parameters"):
        settings = {"type": "dynamic", "factor": 2.0}
        assert rope_groups({**raw, key: settings}) == RopeGroups(64, by_length=True)
        settings = {"rope_type": "longrope", "original_max_position_embeddings": 16}
        assert rope_groups({**raw, key: settings}) == RopeGroups(16)
        assert sequence_limit({**raw, key: settings}) == 16
        assert rope_groups({**raw, key: {"full_attention": settings}}) == RopeGroups(16)
        older = {"type": "su", "long_factor": [2.0], "original_max_position_embeddings": 16}
        assert rope_groups({**raw, key: older}) == RopeGroups(16)
        several = {"full_attention": settings, "sliding_attention": {"type": "dynamic"}}
        assert rope_groups({**raw, key: several}) == RopeGroups(16, by_length=True)
    assert [RopeGroups(4)(n) for n in (1, 4, 5, 9)] == [0, 0, 1, 1]
    assert [RopeGroups(8).growing(n, 3) for n in (1, 5, 6, 8, 9, 20)] == [0, 0, -6, -8, 1, 1]
    assert [RopeGroups(8, by_length=True).growing(n, 3) for n in (5, 6, 9)] == [0, -6, 9]
    assert ANY_LENGTHS.growing(9, 9) == 0
    assert [RopeGroups(4, by_length=True)(n) for n in (4, 5, 9)] == [0, 5, 9]


def test_the_model_itself_depends_on_the_batch(model: Path) -> None:
    """Otherwise these tests would show nothing."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        short = loaded(ids[:, :10]).logits[0, -1]
        padded = loaded(ids).logits[0, 9]
    assert float((short - padded).abs().max()) > 1e-3
