"""Prompts and conversations as OpenCompass hands them over; stop words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from streamline_bench.errors import CheckpointError, StreamlineBenchError
from streamline_bench.opencompass.engine import StopWords, cut_at
from streamline_bench.opencompass.prompts import PromptEncoder, chat_text, messages_of, plain_text

TALK = [
    {"role": "HUMAN", "prompt": "w1"},
    {"role": "HUMAN", "prompt": "w2"},
    {"role": "BOT", "prompt": ""},
    {"role": "BOT", "prompt": "w3"},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} | {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def test_plain_text_joins_the_parts() -> None:
    assert plain_text("w1 w2") == "w1 w2"
    assert plain_text(TALK) == "w1w2w3"


def test_neighbours_of_one_role_are_one_message() -> None:
    assert messages_of(TALK) == [
        {"role": "user", "content": "w1\nw2"},
        {"role": "assistant", "content": "w3"},
    ]
    messages = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    assert messages_of(messages) == messages
    assert plain_text(messages) == "w1w2"
    assert messages_of("w1") == [{"role": "user", "content": "w1"}]


def test_unknown_role_is_named() -> None:
    with pytest.raises(StreamlineBenchError, match="role 'TOOL'"):
        messages_of([{"role": "TOOL", "prompt": "x"}])


def test_chat_template(word_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    with pytest.raises(CheckpointError, match="no chat template; use StreamlineModel"):
        chat_text(tokenizer, "w1", answer_follows=True)
    tokenizer.chat_template = TEMPLATE
    assert chat_text(tokenizer, "w1", answer_follows=True) == "user : w1 | assistant :"
    assert chat_text(tokenizer, TALK, answer_follows=False) == "user : w1\nw2 | assistant : w3 | "
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(CheckpointError, match="refuses a conversation"):
        chat_text(tokenizer, "w1", answer_follows=True)


def test_stop_words_look_at_new_text_of_each_row(word_tokenizer: Any) -> None:
    prompt = [word_tokenizer.convert_tokens_to_ids(f"w{i}") for i in (7, 7)]
    rows = torch.tensor(
        [[*prompt, *word_tokenizer.convert_tokens_to_ids(words)] for words in (["w1"], ["w7"])]
    )
    stop = StopWords(["w7"], word_tokenizer, prompt_length=2)
    assert stop(rows, torch.zeros(())).tolist() == [False, True]


def test_text_ends_before_the_first_stop_word() -> None:
    assert cut_at("a. b! c", ["!", "."]) == "a"
    assert cut_at("a b", [".", "!"]) == "a b"
    assert cut_at("a b", []) == "a b"


def test_long_prompts_are_cut_from_the_left(word_tokenizer: Any, caplog: Any) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.truncation_side = "left"
    encoder = PromptEncoder(tokenizer)
    rows, lost = encoder.encode(["w1 w2 w3", "w4"], limit=2)
    assert tokenizer.batch_decode(rows) == ["w2 w3", "w4"]
    assert lost == [1, 0]
    assert "cut from the left" in caplog.text


def test_no_room_for_a_prompt(word_tokenizer: Any) -> None:
    with pytest.raises(StreamlineBenchError, match="max_out_len reaches max_seq_len"):
        PromptEncoder(word_tokenizer).encode(["w1"], limit=0)
