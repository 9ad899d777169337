"""The tokenizer: exact boundaries, readable text back, unknown words survive."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from bundled_model.language import draw
from bundled_model.skills import BUILDERS
from bundled_model.stream import encode
from bundled_model.tokenizer import save_tokenizer
from bundled_model.vocabulary import SPECIAL_TOKENS, tokens
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(tokens()) == list(range(len(tokens())))
    special = (
        tokenizer.pad_token,
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.unk_token,
    )
    assert special == SPECIAL_TOKENS


@pytest.mark.parametrize("skill", BUILDERS)
def test_round_trip_of_documents(tokenizer: PreTrainedTokenizerBase, skill: str) -> None:
    rng = random.Random(6)
    for document in (draw(BUILDERS[skill], rng, "train") for _ in range(20)):
        ids = tokenizer.encode(document.text)
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1:] == encode(document.text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text


def test_a_continuation_never_changes_the_tokens_of_its_context(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rng = random.Random(7)
    for skill in BUILDERS:
        document = draw(BUILDERS[skill], rng, "eval")
        question = document.questions[0]
        context = f"{document.story} {question.prompt}".strip()
        whole = tokenizer.encode(f"{context} {question.answer}")
        assert whole == tokenizer.encode(context) + encode(question.answer)


def test_unknown_words_become_unk(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("Tom has a spaceship.", add_special_tokens=False)
    assert ids[3] == tokenizer.unk_token_id
    assert len(ids) == 5
