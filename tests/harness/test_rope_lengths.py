"""Rotary frequencies that depend on the longest sequence of a batch, against the stock class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.architecture import ANY_LENGTHS, RopeGroups, rope_groups, sequence_limit
from streamline_bench.harness.lm import StreamlineLM

LONG = [1.0, 8.0, 24.0, 40.0]
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": LONG,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
}


@pytest.fixture(params=ROPES)
def model(request: pytest.FixtureRequest, make_tiny_model: Callable[..., Path]) -> Path:
    """Weights so wide that other frequencies change every score."""
    longrope = request.param == "longrope"
    extra = {"original_max_position_embeddings": 32} if longrope else {}
    folder = make_tiny_model(
        "phi3" if longrope else "llama",
        num_key_value_heads=4,
        max_position_embeddings=128 if longrope else 32,
        rope_parameters=ROPES[request.param],
        initializer_range=0.3,
        **extra,
    )
    # What the file is read as, not what was written, decides.
    assert rope_groups(AutoConfig.from_pretrained(folder)).limit == 32
    return folder


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
    assert [RopeGroups(4)(n) for n in (1, 4, 5, 9)] == [0, 0, 1, 1]
    assert [RopeGroups(8).growing(n, 3) for n in (1, 5, 6, 8, 9, 20)] == [0, 0, -6, -8, 1, 1]
    assert [RopeGroups(8, by_length=True).growing(n, 3) for n in (5, 6, 9)] == [0, -6, 9]
    assert ANY_LENGTHS.growing(9, 9) == 0
    assert [RopeGroups(4, by_length=True)(n) for n in (4, 5, 9)] == [0, 5, 9]


def test_the_model_itself_depends_on_the_batch(model: Path) -> None:
    """Otherwise these tests would show nothing."""
    import torch

    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        short = loaded(ids[:, :10]).logits[0, -1]
        padded = loaded(ids).logits[0, 9]
    assert float((short - padded).abs().max()) > 1e-3
