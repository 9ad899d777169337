"""Where a tokenizer puts BOS in front of a text, every window and packed row begins with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from streamline_bench.core.data.calibration import blocks_of, leading_bos, load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.divergence import token_divergence
from streamline_bench.errors import CalibrationError

TEXTS = [" ".join(f"w{(7 * i + j) % 96}" for j in range(3 + 5 * i)) for i in range(8)]


@pytest.fixture(scope="module")
def with_bos(word_tokenizer: Any) -> PreTrainedTokenizerFast:
    """The word tokenizer, putting <s> (id 1) in front as Llama's and Gemma's do."""
    from tokenizers import Tokenizer, processors

    inner = Tokenizer.from_str(word_tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., CalibrationSpec]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return lambda **more: CalibrationSpec(source=str(path), **more)


def test_which_tokenizers_put_one(word_tokenizer: Any, with_bos: Any) -> None:
    assert leading_bos(word_tokenizer) is None
    assert leading_bos(with_bos) == 1


@given(st.lists(st.integers(1, 5), max_size=40), st.integers(2, 9))
def test_blocks_lose_nothing_and_begin_with_bos_once(ids: list[int], length: int) -> None:
    blocks = [block.tolist() for block in blocks_of(ids, length, 1)]
    assert all(block[0] == 1 and len(block) <= length for block in blocks)
    assert all(len(block) == length for block in blocks[:-1])
    rest = list(ids)
    for block in blocks:
        taken = block if rest[0] == 1 else block[1:]
        assert rest[: len(taken)] == taken
        rest = rest[len(taken) :]
    assert rest == []
    assert [b for block in blocks_of(ids, length, None) for b in block] == ids


@pytest.mark.parametrize("bound", [{}, {"samples": 3}, {"tokens": 33}])
def test_every_packed_row_begins_with_bos(
    with_bos: Any, spec: Callable[..., CalibrationSpec], bound: dict[str, int]
) -> None:
    tokens = load_calibration(spec(sequence_length=10, **bound), with_bos, progress=False)
    assert (tokens.input_ids[:, 0] == 1).all()
    assert tokens.summary()["begins_with"] == "<s>"
    assert tokens.num_tokens == bound.get("tokens", tokens.input_ids.numel())
    assert len(tokens) == bound.get("samples", len(tokens))


def test_the_plain_cut_stays_as_a_named_option(
    with_bos: Any, word_tokenizer: Any, spec: Callable[..., CalibrationSpec]
) -> None:
    stream = load_calibration(spec(sequence_length=10, packing="stream"), with_bos, progress=False)
    ids = [with_bos(text)["input_ids"] for text in TEXTS]
    total = sum(map(len, ids))
    assert stream.input_ids.shape == (total // 10, 10)
    assert not (stream.input_ids[:, 0] == 1).all()
    assert stream.summary()["begins_with"] == "text"
    # Without BOS of the tokenizer's own, both are the same.
    kinds = [
        load_calibration(spec(sequence_length=10, packing=p), word_tokenizer, progress=False)
        for p in ("bos", "stream")
    ]
    assert kinds[0].sha256 == kinds[1].sha256
    assert kinds[0].begins_with == "text"


@pytest.mark.parametrize("window", [6, 4096])
def test_perplexity_is_that_of_all_tokens_after_bos(
    tiny_llama: Path, with_bos: Any, tmp_path: Path, window: int
) -> None:
    """Every token of the text is a target, once, whatever the window: by hand in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path)
    with_bos.save_pretrained(tmp_path)
    found = token_divergence(tmp_path, tmp_path, TEXTS, window=window, progress=False)
    size = min(window, 128)
    losses = []
    for text in TEXTS:
        ids = with_bos(text, add_special_tokens=False)["input_ids"]
        for begin in range(0, len(ids), size - 1):
            part = torch.tensor([[1, *ids[begin : begin + size - 1]]])
            with torch.no_grad():
                shares = model.double()(part).logits[0, :-1].log_softmax(-1)
            losses += shares.gather(1, part[0, 1:, None]).flatten().tolist()
    assert found.tokens == len(losses) == sum(len(text.split()) for text in TEXTS)
    assert found.dense_perplexity == pytest.approx(math.exp(-np.mean(losses)), rel=1e-4)
    assert found.begins_with == "<s>"


def test_a_token_without_an_embedding_is_named(
    word_tokenizer: Any, spec: Callable[..., CalibrationSpec], tiny_llama: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"'w\d+' \(id \d+\).* 50 tokens"):
        load_calibration(spec(sequence_length=8), word_tokenizer, vocabulary=50, progress=False)
