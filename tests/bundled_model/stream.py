"""The training stream: packed batches that depend on nothing but the seed and the step.

Because a batch is a function of ``(seed, step)``, a resumed training sees exactly what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from bundled_model.language import Document, draw_mixed
from bundled_model.skills import BUILDERS, weights_at
from bundled_model.vocabulary import BOS, EOS, PAD, tokens

if TYPE_CHECKING:
    import torch

_WORDS = re.compile(r"\w+|[^\w\s]+")
# stop looking for a document that still fits after this many that did not
_PATIENCE = 3


@lru_cache(maxsize=1)
def _ids() -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens())}


def encode(text: str) -> list[int]:
    """The ids of a text of the language, without BOS; equals the tokenizer's."""
    ids = _ids()
    return [ids[word] for word in _WORDS.findall(text)]


def encode_document(document: Document, answer_weight: float) -> tuple[list[int], list[float]]:
    """BOS + text + EOS, and the loss weight of each token as a target."""
    ids = _ids()
    parts: list[tuple[str, float]] = [(document.story, 1.0)]
    for question in document.questions:
        parts += [(question.prompt, 1.0), (question.answer, answer_weight), (".", 1.0)]
    words, weights = [ids[BOS]], [0.0]
    for text, weight in parts:
        encoded = encode(text)
        words += encoded
        weights += [weight] * len(encoded)
    return [*words, ids[EOS]], [*weights, 1.0]


@dataclass(frozen=True)
class Batch:
    """Packed rows; every tensor is ``[batch, seq]``."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    target_weights: torch.Tensor


def _row(
    rng: random.Random, weights_of_skills: dict[str, float], length: int, answer_weight: float
) -> list[tuple[int, int, int, float]]:
    """One row of (token, position, document number, weight), padded at its end."""
    row: list[tuple[int, int, int, float]] = []
    number = misses = 0
    while misses < _PATIENCE:
        document = draw_mixed(BUILDERS, weights_of_skills, rng, "train")
        words, weights = encode_document(document, answer_weight)
        if len(row) + len(words) > length:
            misses += 1
            continue
        number += 1
        for at, (word, weight) in enumerate(zip(words, weights, strict=True)):
            row.append((word, at, number, weight))
    return row + [(_ids()[PAD], 0, 0, 0.0)] * (length - len(row))


def batch_at(seed: int, step: int, rows: int, length: int, answer_weight: float) -> Batch:
    """The batch of one training step."""
    import torch

    rng = random.Random(f"streamline-demo/{seed}/{step}")
    skills = weights_at(step)
    packed = [_row(rng, skills, length, answer_weight) for _ in range(rows)]
    token, position, document, weight = (
        torch.tensor([[cell[column] for cell in row] for row in packed]) for column in range(4)
    )
    return Batch(token, position, document, weight)
