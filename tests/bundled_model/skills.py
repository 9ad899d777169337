"""The registry of skills: a name, its builder, its share of the training stream."""

from __future__ import annotations

from bundled_model import facts, stories
from bundled_model.language import Builder

BUILDERS: dict[str, Builder] = {
    "agreement": stories.agreement,
    "arithmetic": facts.arithmetic,
    "attributes": facts.attributes,
    "carry": stories.carry,
    "compare": facts.compare,
    "counting": facts.counting,
    "echo": facts.echo,
    "location": stories.location,
    "numbers": facts.numbers,
    "order": facts.order,
    "pairs": facts.pairs,
    "places": stories.places,
    "recall": facts.recall,
    "same": facts.same,
    "story": stories.story,
    "transitive": facts.transitive,
    "verify": facts.verify,
}
TRAINING_ONLY: tuple[str, ...] = ("carry", "echo", "location", "places", "same", "transitive")
"""Skills without a task.

``echo`` teaches to copy; without it and ``pairs`` the others take far longer. The rest are not
learned in a training this short (FIGURES.md has the numbers).
"""
EVALUATED: tuple[str, ...] = tuple(skill for skill in BUILDERS if skill not in TRAINING_ONLY)

_STAGES: tuple[tuple[int, dict[str, float]], ...] = (
    (
        0,
        {
            "echo": 3.0,
            "pairs": 4.0,
            "attributes": 2.0,
            "numbers": 0.0,
            "places": 0.0,
            "verify": 0.0,
        },
    ),
    (800, {"echo": 0.3, "pairs": 0.5, "numbers": 0.0, "places": 0.0, "verify": 0.0}),
    (
        4000,
        {
            "agreement": 0.3,
            "arithmetic": 0.6,
            "attributes": 1.5,
            "compare": 1.5,
            "echo": 0.1,
            "location": 2.0,
            "pairs": 0.2,
            "places": 0.0,
            "recall": 0.8,
            "same": 0.0,
            "story": 0.6,
            "transitive": 0.0,
            "verify": 1.5,
        },
    ),
    (
        6200,
        {
            "agreement": 0.2,
            "arithmetic": 0.3,
            "attributes": 2.0,
            "carry": 0.3,
            "compare": 0.4,
            "echo": 0.1,
            "location": 1.5,
            "numbers": 0.1,
            "order": 0.4,
            "pairs": 0.1,
            "places": 3.0,
            "recall": 0.5,
            "same": 0.0,
            "story": 0.6,
            "transitive": 0.0,
            "verify": 1.5,
        },
    ),
    (
        8100,
        {
            "agreement": 0.3,
            "arithmetic": 0.5,
            "attributes": 3.0,
            "carry": 0.0,
            "compare": 0.5,
            "counting": 2.0,
            "echo": 0.1,
            "location": 0.0,
            "numbers": 0.2,
            "order": 0.5,
            "pairs": 0.2,
            "places": 0.0,
            "same": 0.0,
            "transitive": 0.0,
            "verify": 2.5,
        },
    ),
)
"""(first step, shares that differ from 1): copying and looking up first, what is slow last."""


def weights_at(step: int) -> dict[str, float]:
    """Shares of the skills at a training step."""
    shares = next(shares for first, shares in reversed(_STAGES) if step >= first)
    return dict.fromkeys(BUILDERS, 1.0) | shares
