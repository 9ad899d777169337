"""What every recipe of ``baselines/`` makes is served by vLLM, with the tokens of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import list_recipes

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPTS = [[1, 7, 23, 42], [1, *range(30, 50)]]
TOKENS = 8


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any], recipe_checkpoint: Callable[[str], Path]) -> dict[str, Any]:
    """Recipe -> answer of vLLM."""
    models = {
        name: {"model": str(recipe_checkpoint(name)), "skip_tokenizer_init": True}
        for name in list_recipes()
    }
    return dict(serve(models, PROMPTS, TOKENS))


@pytest.mark.parametrize("name", list(list_recipes()))
def test_greedy_tokens_are_those_of_transformers(
    name: str, served: dict[str, Any], recipe_checkpoint: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from streamline_bench.modeling import register

    register()
    folder = recipe_checkpoint(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    assert "error" not in served[name], served[name]["error"]
    attentions = [key for key in model.state_dict() if key.endswith("self_attn.k_proj.weight")]
    assert served[name]["caches"] == len(attentions)
    for prompt, answer in zip(PROMPTS, served[name]["tokens"], strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        written = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
        )
        assert answer == written[0, len(prompt) :].tolist()
