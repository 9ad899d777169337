"""What every recipe of ``baselines/`` makes is a folder that transformers and lm-eval load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from streamline_bench.compression import list_recipes
from streamline_bench.core.checkpoint.manifest import read_manifest
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.modeling import register

NOT_STOCK = {
    "streamline_ffn", "streamline_ffn_res", "streamline_swiglu", "streamline_swiglu_res",
    "streamline_linear", "linear_patch", "ridge_map", "llm_pruner", "llm_pruner_lora",
    "llm_pruner_paper",
    "slicegpt", "slicegpt_lora", "slicegpt_paper",
}  # fmt: skip
"""Recipes whose result no stock class can express; all others must be stock Llamas."""


@pytest.fixture(params=list(list_recipes()))
def checkpoint(request: pytest.FixtureRequest, recipe_checkpoint: Callable[[str], Path]) -> Path:
    return recipe_checkpoint(request.param)


def test_the_checkpoint_is_stock_where_a_stock_class_can_express_it(
    checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["checkpoint"]
    register()
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == ("streamline" if name in NOT_STOCK else "llama")
    manifest = read_manifest(checkpoint)
    if name == "dense":
        assert manifest is None
    else:
        assert sum(p.numel() for p in model.parameters()) == manifest.parameters_after
        assert manifest.parameters_after < manifest.parameters_before


def test_cached_generation_equals_repeated_full_forwards(checkpoint: Path) -> None:
    register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 7, 23, 42, 11]])
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad():
        for _ in range(8):
            logits = model(ids, use_cache=False).logits[0, -1]
            logits[model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert cached.tolist() == ids.tolist()


def test_the_harness_scores_it_as_transformers_does(checkpoint: Path) -> None:
    lm = StreamlineLM(str(checkpoint), device="cpu", dtype="float32")
    pairs = [("w1 w2 w3", " w4"), ("w1 w2 w3", " w11 w12"), ("w9 w8", " w13 w14 w15")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (context, choice), (score, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        whole, start = lm.tok_encode(context + choice), len(lm.tok_encode(context))
        with torch.no_grad():
            logits = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert score == pytest.approx(expected, abs=1e-4)
