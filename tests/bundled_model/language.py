"""A seeded generator of documents in a small language of our own.

A :class:`Document` is a story of facts followed by questions with their answers. Documents are
drawn from a ``random.Random`` that the caller owns; there is no global state, so the same seed
gives the same text everywhere.

Training and evaluation never share a story: the SHA-256 of the story's text modulo
:data:`SPLIT_MODULUS` decides where it belongs. ``train`` rejects remainder 0, ``eval`` accepts
only remainder 0, so an evaluated story cannot occur in the training stream, whatever questions
follow it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "eval"]
SPLIT_MODULUS = 16


@dataclass(frozen=True)
class Question:
    """A prompt, the choices of its answer, and the index of the right one.

    A question without wrong choices (``len(choices) == 1``) is to be answered by generation.
    """

    prompt: str
    choices: tuple[str, ...]
    gold: int

    @property
    def answer(self) -> str:
        """The right choice."""
        return self.choices[self.gold]


@dataclass(frozen=True)
class Document:
    """A story and questions about it; ``text`` is what a model is trained on."""

    skill: str
    story: str
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        """The story, then every question with its right answer."""
        exchanges = (f"{q.prompt} {q.answer}.".strip() for q in self.questions)
        return " ".join([self.story, *exchanges]).strip()


Builder = Callable[[random.Random, Split], Document]


def split_of(story: str) -> Split:
    """The split that owns a story, decided by the hash of its text."""
    digest = hashlib.sha256(story.encode()).digest()
    return "eval" if int.from_bytes(digest[:8], "big") % SPLIT_MODULUS == 0 else "train"


def draw(builder: Builder, rng: random.Random, split: Split) -> Document:
    """Draw documents from ``builder`` until one belongs to ``split``."""
    while True:
        document = builder(rng, split)
        if split_of(document.story) == split:
            return document


def draw_mixed(
    builders: Mapping[str, Builder], weights: Mapping[str, float], rng: random.Random, split: Split
) -> Document:
    """Draw one document of a skill chosen by weight."""
    names = list(builders)
    name = rng.choices(names, [weights[name] for name in names])[0]
    return draw(builders[name], rng, split)


def choose(rng: random.Random, prompt: str, right: str, wrong: list[str]) -> Question:
    """A question whose choices are ``right`` and ``wrong`` in random order."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Question(prompt, tuple(choices), choices.index(right))


def yes_no(prompt: str, truth: bool) -> Question:
    """A question answered by yes or no."""
    return Question(prompt, ("yes", "no"), 0 if truth else 1)
