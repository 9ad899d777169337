"""Instruction data: prompts, masks, and the loss on the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.core.training.batch import make_batch
from streamline_bench.core.training.loop import LmObjective
from streamline_bench.errors import CalibrationError
from streamline_bench.methods.recovery.instruction_data import alpaca_prompt, load_instructions

RECORDS = [
    {"instruction": "w1 w2", "input": "w9", "output": "w3 w4 w5"},
    {"instruction": "w6", "input": "", "output": "w7"},
    {"instruction": "w8 w9 w10", "output": "w11 w12"},
]


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    """Three records; one has no input, one not even the field."""
    path = tmp_path / "instructions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def _spec(path: Path, **changes: Any) -> CalibrationSpec:
    settings = {"source": str(path), "form": "instruction", "sequence_length": 128, **changes}
    return CalibrationSpec.model_validate(settings)


def test_prompt_is_that_of_alpaca() -> None:
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert "Input" not in alpaca_prompt("Add.")
    assert alpaca_prompt("Add.").startswith("Below is an instruction that describes a task. Write")


def test_targets_are_the_answers(instructions: Path, word_tokenizer: Any) -> None:
    tokens = load_instructions(_spec(instructions), word_tokenizer, progress=False)
    assert tokens.target_mask is not None
    found = {
        word_tokenizer.decode(ids[targets])
        for ids, targets in zip(tokens.input_ids, tokens.target_mask, strict=True)
    }
    assert found == {f"{record['output']} </s>" for record in RECORDS}
    assert tokens.num_tokens == int(tokens.attention_mask.sum())
    everything = load_instructions(
        _spec(instructions), word_tokenizer, train_on_inputs=True, progress=False
    )
    assert everything.target_mask is None
    assert torch.equal(everything.input_ids, tokens.input_ids)
    assert everything.sha256 != tokens.sha256


def test_nulls_are_counted_also_when_enough_records_are_there(
    tmp_path: Path, word_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "nulls.jsonl"
    lines = [{"instruction": "w1", "output": None}] * 20 + RECORDS * 20
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level("WARNING", "streamline_bench"):
        tokens = load_instructions(_spec(path, samples=30), word_tokenizer, progress=False)
    assert len(tokens) == 30
    assert "null" in caplog.text
    path.write_text('{"prompt": "w1"}\n')
    with pytest.raises(CalibrationError, match=r"it has prompt; .*instruction and output"):
        load_instructions(_spec(path), word_tokenizer, progress=False)


def test_a_split_keeps_rows_and_targets_together(instructions: Path, word_tokenizer: Any) -> None:
    tokens = load_instructions(_spec(instructions), word_tokenizer, progress=False)
    for part in tokens.split(0.4, seed=1):
        assert part.target_mask is not None
        for ids, targets in zip(part.input_ids, part.target_mask, strict=True):
            row = next(i for i, other in enumerate(tokens.input_ids) if torch.equal(other, ids))
            assert torch.equal(tokens.target_mask[row], targets)  # type: ignore[index]


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_loss_equals_that_of_transformers_with_masked_labels(
    instructions: Path, tiny_llama: Path, word_tokenizer: Any, train_on_inputs: bool
) -> None:
    """Labels made here from the texts; the loss computed by the stock model, row by row."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    total, terms = 0.0, 0
    for record in RECORDS:
        prompt = alpaca_prompt(record["instruction"], record.get("input", ""))
        before, answer = (
            word_tokenizer(text)["input_ids"] for text in (prompt, record["output"] + " </s>")
        )
        hidden = before if train_on_inputs else [-100] * len(before)
        ids, labels = torch.tensor([before + answer]), torch.tensor([hidden + answer])
        count = len(answer) + (len(before) - 1 if train_on_inputs else 0)
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * count
        terms += count
    tokens = load_instructions(
        _spec(instructions), word_tokenizer, train_on_inputs=train_on_inputs, progress=False
    )
    objective = LmObjective(model)
    batch = make_batch(tokens, torch.arange(3), torch.device("cpu"))
    with torch.no_grad():
        loss = float(objective.loss_sum(batch, None))
    assert loss == pytest.approx(total, rel=1e-5)
    assert objective.terms(tokens.attention_mask, tokens.target_mask) == terms


def test_rows_are_cut_and_empty_ones_left_out(instructions: Path, word_tokenizer: Any) -> None:
    lengths = [len(word_tokenizer(alpaca_prompt("w6"))["input_ids"]) + 1]
    short = load_instructions(
        _spec(instructions, sequence_length=lengths[0]), word_tokenizer, progress=False
    )
    assert (len(short), short.input_ids.shape[1]) == (1, lengths[0])
    assert short.target_mask is not None
    assert int(short.target_mask.sum()) == 1
    one = load_instructions(_spec(instructions, samples=1), word_tokenizer, progress=False)
    assert len(one) == 1


def test_recovery_on_instructions(
    tiny_llama: Path, make_recipe: Callable[..., Any], instructions: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        "last_layers",
        **{
            "recovery": "last_layers",
            "recovery.last_layers": 1,
            "recovery.training.data.source": str(instructions),
            "recovery.training.lr": 3e-3,
            "recovery.training.warmup_steps": 0,
            "recovery.training.min_steps": 4,
            "recovery.training.autocast": "none",
        },
    )
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    facts = json.loads((out / "streamline.json").read_text())["training"]["recovery"]
    assert facts["data"]["sequences"] == 3
    assert (facts["steps"], facts["final_lr"]) == (4, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 4}, "raise sequence_length"),
        ({"tokens": 10}, "give samples instead"),
        ({"source": "slimpajama"}, "not instructions"),
        ({"source": "missing.jsonl"}, "does not exist"),
    ],
)
def test_wrong_data_is_refused(
    instructions: Path, word_tokenizer: Any, changes: Any, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_instructions(_spec(instructions, **changes), word_tokenizer, progress=False)


def test_texts_are_refused_as_instructions(text_file: Path, word_tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="no field 'instruction'"):
        load_instructions(_spec(text_file), word_tokenizer, progress=False)
