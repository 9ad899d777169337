"""A pass entered in the middle, with layers left out, equals the pruned model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.forward import PartialForward

IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 11], [3, 8, 2, 60, 0, 0, 0]])
MASK = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]]).bool()
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {
        "sliding_window": 3,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma2": {"sliding_window": 3, "head_dim": 8},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"logits_scaling": 3.0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_with_those_layers_removed(
    family: str, make_tiny_model: Callable[..., Path]
) -> None:
    folder = make_tiny_model(family, initializer_range=0.2, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = {}
    with torch.no_grad():
        for removed in ((), (1,), (1, 3), (5,)):
            pruned = copy.deepcopy(model)
            if removed:
                keep_layers(pruned, [i for i in range(6) if i not in removed])
            expected[removed] = pruned(IDS, attention_mask=MASK.long(), use_cache=False).logits
    assert not torch.allclose(expected[()], expected[(1,)])
    with PartialForward(model) as forward:
        assert torch.equal(forward.logits(IDS, MASK, record=True), expected[()])
        dense = dict(forward.states)
        for removed in ((1,), (5,)):
            where = {"start": removed[0] + 1, "state": dense[removed[0]]}
            assert torch.equal(forward.logits(IDS, MASK, **where), expected[removed])
        forward.hidden(IDS, MASK, skip={1}, record=True)
        where = {"start": 4, "state": forward.states[3], "skip": {1}}
        assert torch.equal(forward.logits(IDS, MASK, **where), expected[(1, 3)])
    assert len(dense) == 7


def test_the_model_is_left_as_it_was(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).train()
    with pytest.raises(KeyError), PartialForward(model) as forward:
        forward.logits(IDS, MASK, skip={0, 1, 2})
        raise KeyError
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(tiny_llama)(IDS).logits)


def test_a_start_needs_a_state(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with PartialForward(model) as forward, pytest.raises(ValueError, match="needs a state"):
        forward.logits(IDS, MASK, start=2)
