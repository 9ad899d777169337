"""What every recipe of ``baselines/`` makes is a folder that our OpenCompass class scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress, list_recipes
from streamline_bench.core.recipe.schema import Recipe
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
    _answers_as_transformers_does(recipe_checkpoint(name))


@pytest.mark.parametrize("name", ["streamline", "streamline_ffn_res", "linear_patch"])
def test_a_patch_at_two_cuts_is_scored_at_both(
    name: str, recipe_source: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    layers = [1, 2, 4, 5] if name == "streamline" else [1, 4]
    selection = {"method": "given_layers", "parameters": {"layers": layers}}
    recipe = make_recipe(name, **{"parameters.selection": selection})
    _answers_as_transformers_does(compress(recipe_source, recipe, tmp_path / "out", progress=False))


def _answers_as_transformers_does(folder: Path) -> None:
    from streamline_bench.opencompass import StreamlineModel

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
