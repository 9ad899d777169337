"""What every recipe of ``baselines/`` makes is a folder that our OpenCompass class scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import list_recipes
from streamline_bench.modeling import register

pytestmark = [
    pytest.mark.opencompass,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("opencompass"),
]

TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8", "w30 w31 w32 w50"]


@pytest.mark.parametrize("name", list(list_recipes()))
def test_ppl_and_answers_are_those_of_transformers(
    name: str, recipe_checkpoint: Callable[[str], Path]
) -> None:
    from streamline_bench.opencompass import StreamlineModel

    folder = recipe_checkpoint(name)
    ours = StreamlineModel(path=str(folder), device="cpu", dtype="float32")
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text, ppl in zip(TEXTS, ours.get_ppl(TEXTS), strict=True):
        ids = torch.tensor([ours.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        losses = -logits.gather(-1, ids[0, 1:, None])
        # OpenCompass divides by the number of all tokens, the first included.
        assert ppl == pytest.approx(float(losses.sum()) / ids.shape[1], abs=1e-4)
    ids = torch.tensor([ours.tokenizer(TEXTS[0])["input_ids"]])
    mask = torch.ones_like(ids)
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    expected = ours.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert ours.generate(TEXTS[:1], max_out_len=5) == [expected]
