"""The committed model: small, stock, offline, and clearly better than guessing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundled_model.scoring import accuracies, held_out
from bundled_model.skills import EVALUATED
from bundled_model.tasks import GENERATION_SKILLS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import streamline_bench.demo

FOLDER = Path(streamline_bench.demo.__file__).parent / "model"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_folder_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= sizes.keys()
    assert sum(sizes.values()) < 8 * MEGABYTE


def test_it_is_a_stock_llama_deep_enough_to_prune(model: PreTrainedModel) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers >= 12
    assert model.config.max_position_embeddings >= 512


def test_it_is_clearly_above_chance(model: PreTrainedModel) -> None:
    measured = accuracies(model, count=20)
    guesses = {}
    for skill in EVALUATED:
        choices = len(held_out(skill, 1)[0].questions[0].choices)
        guesses[skill] = 0.0 if skill in GENERATION_SKILLS else 1 / choices
    gain = sum(measured[skill] - guesses[skill] for skill in EVALUATED) / len(EVALUATED)
    assert gain > 0.3, measured


def test_it_answers_in_words(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = tokenizer("list: Tom park, Anna barn, Ben forest. Anna?")
    ids = torch.tensor([prompt["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == "barn."
