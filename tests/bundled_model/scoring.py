"""Accuracy of a model on freshly drawn held-out documents, skill by skill.

A quick check for use during training; published figures come from the lm-eval tasks.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from bundled_model.language import Document, draw
from bundled_model.skills import BUILDERS
from bundled_model.stream import encode
from bundled_model.vocabulary import BOS, PAD, tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def held_out(skill: str, count: int, seed: int = 1) -> list[Document]:
    """``count`` held-out documents of a skill."""
    rng = random.Random(f"streamline-demo/scoring/{skill}/{seed}")
    return [draw(BUILDERS[skill], rng, "eval") for _ in range(count)]


def _rows(documents: list[Document]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Padded ids ``[choices of all documents, seq]`` and the span of each choice."""
    import torch

    vocabulary = tokens()
    rows, spans = [], []
    for document in documents:
        question = document.questions[0]
        context = [vocabulary.index(BOS), *encode(f"{document.story} {question.prompt}")]
        for choice in question.choices:
            rows.append(context + encode(choice))
            spans.append((len(context), len(rows[-1])))
    width = max(map(len, rows))
    padded = [row + [vocabulary.index(PAD)] * (width - len(row)) for row in rows]
    return torch.tensor(padded), spans


def accuracy(model: PreTrainedModel, documents: list[Document]) -> float:
    """Share of first questions answered right.

    By the highest loglikelihood among the choices; a question with one choice counts when
    greedy decoding would produce it.
    """
    import torch

    ids, spans = _rows(documents)
    ids = ids.to(model.device)
    with torch.no_grad():
        scores = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    right, row = 0, 0
    for document in documents:
        question = document.questions[0]
        totals, greedy = [], False
        for start, end in spans[row : row + len(question.choices)]:
            target, at = ids[row, start:end], scores[row, start - 1 : end - 1]
            totals.append(at.gather(-1, target[:, None]).sum().item())
            greedy = bool((at.argmax(-1) == target).all())
            row += 1
        single = len(totals) == 1
        right += greedy if single else totals.index(max(totals)) == question.gold
    return right / len(documents)


def accuracies(model: PreTrainedModel, count: int = 40) -> dict[str, float]:
    """Accuracy of every skill on ``count`` held-out documents each."""
    training = model.training
    model.eval()
    result = {skill: accuracy(model, held_out(skill, count)) for skill in BUILDERS}
    model.train(training)
    return result
