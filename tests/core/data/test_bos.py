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

from streamline_bench.core.data.calibration import load_calibration
from streamline_bench.core.data.corpus_files import document_text
from streamline_bench.core.data.leading_tokens import blocks_of, leading_tokens
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.divergence import token_divergence
from streamline_bench.errors import CalibrationError

TEXTS = [" ".join(f"w{(7 * i + j) % 96}" for j in range(3 + 5 * i)) for i in range(8)]


@pytest.fixture(scope="module")
def make_tokenizer(word_tokenizer: Any) -> Callable[..., PreTrainedTokenizerFast]:
    """Return the word tokenizer with a template of special tokens around each text."""
    from tokenizers import Tokenizer, processors

    def make(template: str, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
        inner = Tokenizer.from_str(word_tokenizer.backend_tokenizer.to_str())
        special = [(name, inner.token_to_id(name)) for name in ("<s>", "</s>", "<unk>")]
        inner.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", bos_token=bos, eos_token="</s>",
            unk_token="<unk>",
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def with_bos(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The word tokenizer, putting <s> (id 1) in front as Llama's and Gemma's do."""
    return make_tokenizer("<s> $A")


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., CalibrationSpec]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return lambda **more: CalibrationSpec(source=str(path), **more)


@pytest.mark.parametrize(
    ("template", "bos", "leading"),
    [
        ("$A", "<s>", ()),
        ("<s> $A", "<s>", (1,)),
        ("<s> $A </s>", "<s>", (1,)),
        ("$A </s>", "<s>", ()),
        ("<s> $A", None, (1,)),  # the template alone knows of it
        ("</s> $A", "</s>", (2,)),  # one token for both
        ("</s> <s> $A", None, (2, 1)),  # as GLM-4 has two
    ],
)
def test_what_tokenizers_put_in_front(
    make_tokenizer: Callable[..., Any],
    spec: Callable[..., CalibrationSpec],
    template: str,
    bos: str | None,
    leading: tuple[int, ...],
) -> None:
    tokenizer = make_tokenizer(template, bos)
    assert leading_tokens(tokenizer) == leading
    tokens = load_calibration(spec(sequence_length=10), tokenizer, progress=False)
    assert all(tuple(row[: len(leading)]) == leading for row in tokens.input_ids.tolist())
    names = {0: "<pad>", 1: "<s>", 2: "</s>"}
    assert tokens.begins_with == ("".join(names[i] for i in leading) or "text")


def test_a_tokenizer_without_an_entry_for_letters_and_one_that_ignores_options() -> None:
    class Odd:
        bos_token_id = 1

        def __init__(self, *ids: int) -> None:
            self.ids = ids

        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            plain = options.get("add_special_tokens") is False
            return {"input_ids": [] if plain and len(self.ids) < 3 else list(self.ids)}

    assert leading_tokens(Odd(1)) == leading_tokens(Odd(1, 2)) == (1,)
    assert leading_tokens(Odd(1, 5, 6)) == (1,)
    assert leading_tokens(Odd(4, 5, 6)) == ()


@pytest.mark.parametrize("form", ["packed", "documents"])
def test_a_text_that_brings_its_own_bos_gets_no_second(
    with_bos: Any, tmp_path: Path, tiny_llama: Path, form: str
) -> None:
    plain, own = tmp_path / "plain.jsonl", tmp_path / "own.jsonl"
    for path, before in ((plain, ""), (own, "<s> ")):
        path.write_text("".join(json.dumps({"text": before + text}) + "\n" for text in TEXTS))
    first, second = (
        load_calibration(
            CalibrationSpec(source=str(path), form=form, sequence_length=10),
            with_bos,
            progress=False,
        )
        for path in (plain, own)
    )
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("template", ["<s> $A", "$A"])
def test_bos_of_a_chat_template_is_there_once(
    make_tokenizer: Callable[..., Any], template: str
) -> None:
    tokenizer = make_tokenizer(template)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    record = {"messages": [{"role": "user", "content": "w1"}, {"role": "x", "content": "w2"}]}
    text = document_text(record, "text", "a.jsonl", tokenizer)
    assert tokenizer(text)["input_ids"] == [1, *tokenizer.convert_tokens_to_ids(["w1", "w2"])]


@given(st.lists(st.integers(1, 5), max_size=40), st.integers(2, 9))
def test_blocks_lose_nothing_and_begin_with_bos_once(ids: list[int], length: int) -> None:
    blocks = [block.tolist() for block in blocks_of(ids, length, (1,))]
    assert all(block[0] == 1 and len(block) <= length for block in blocks)
    assert all(len(block) == length for block in blocks[:-1])
    rest = list(ids)
    for block in blocks:
        taken = block if rest[0] == 1 else block[1:]
        assert rest[: len(taken)] == taken
        rest = rest[len(taken) :]
    assert rest == []
    assert [b for block in blocks_of(ids, length, ()) for b in block] == ids


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


def test_a_block_without_room_for_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"2 tokens.* longer"):
        list(blocks_of([5, 6, 7], 2, (1, 2)))


@pytest.mark.parametrize(("window", "leading"), [(6, "<s>"), (4096, "<s>"), (7, "</s> <s>")])
def test_perplexity_is_that_of_all_tokens_after_bos(
    tiny_llama: Path,
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
    window: int,
    leading: str,
) -> None:
    """Every token of the text is a target, once, whatever the window: by hand in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer(f"{leading} $A")
    tokenizer.save_pretrained(tmp_path)
    first = tokenizer.convert_tokens_to_ids(leading.split())
    found = token_divergence(tmp_path, tmp_path, TEXTS, window=window, progress=False)
    size = min(window, 128)
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        step = size - len(first)
        for begin in range(0, len(ids), step):
            part = torch.tensor([[*first, *ids[begin : begin + step]]])
            with torch.no_grad():
                shares = model.double()(part).logits[0, len(first) - 1 : -1].log_softmax(-1)
            losses += shares.gather(1, part[0, len(first) :, None]).flatten().tolist()
    assert found.tokens == len(losses) == sum(len(text.split()) for text in TEXTS)
    assert found.dense_perplexity == pytest.approx(math.exp(-np.mean(losses)), rel=1e-4)
    assert found.begins_with == leading.replace(" ", "")


def test_a_token_without_an_embedding_is_named(
    word_tokenizer: Any, spec: Callable[..., CalibrationSpec], tiny_llama: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"'w\d+' \(id \d+\).* 50 tokens"):
        load_calibration(spec(sequence_length=8), word_tokenizer, vocabulary=50, progress=False)
