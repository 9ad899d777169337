"""The language: deterministic, split by story, one question per evaluated document."""

from __future__ import annotations

import random

import pytest
from bundled_model.language import Document, Split, draw, draw_mixed, split_of
from bundled_model.skills import BUILDERS, EVALUATED, weights_at

SAMPLES = 40


def _documents(skill: str, split: Split, count: int = SAMPLES, seed: int = 3) -> list[Document]:
    rng = random.Random(seed)
    return [draw(BUILDERS[skill], rng, split) for _ in range(count)]


@pytest.mark.parametrize("skill", BUILDERS)
def test_same_seed_gives_the_same_documents(skill: str) -> None:
    random.seed(1)
    first = _documents(skill, "train")
    random.seed(2)
    assert _documents(skill, "train") == first
    assert _documents(skill, "train", seed=4) != first


@pytest.mark.parametrize("skill", BUILDERS)
def test_training_and_evaluation_share_no_story(skill: str) -> None:
    train = {document.story for document in _documents(skill, "train", 150)}
    evaluated = {document.story for document in _documents(skill, "eval")}
    assert {split_of(story) for story in train} == {"train"}
    assert {split_of(story) for story in evaluated} == {"eval"}
    assert not train & evaluated


@pytest.mark.parametrize("skill", EVALUATED)
def test_choices_are_distinct_and_gold_is_balanced(skill: str) -> None:
    documents = _documents(skill, "eval", 120)
    questions = [document.questions[0] for document in documents]
    assert all(len(set(question.choices)) == len(question.choices) for question in questions)
    width = max(len(question.choices) for question in questions)
    if width > 1:
        most = max(sum(q.gold == index for q in questions) for index in range(width))
        assert most / len(questions) < 1 / width + 0.2


def test_every_evaluated_document_asks_one_question() -> None:
    for skill in EVALUATED:
        assert {len(document.questions) for document in _documents(skill, "eval")} == {1}


@pytest.mark.parametrize("step", [0, 2000, 6000, 7000, 9000])
def test_mixed_stream_draws_every_skill_that_has_a_share(step: int) -> None:
    rng = random.Random(5)
    shares = weights_at(step)
    drawn = {draw_mixed(BUILDERS, shares, rng, "train").skill for _ in range(1200)}
    assert drawn == {skill for skill, share in shares.items() if share}
