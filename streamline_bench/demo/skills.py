"""The registry of skills: a name, its builder, its share of the training stream."""

from __future__ import annotations

from streamline_bench.demo import facts, stories
from streamline_bench.demo.language import Builder

BUILDERS: dict[str, Builder] = {
    "agreement": stories.agreement,
    "arithmetic": facts.arithmetic,
    "attributes": facts.attributes,
    "carry": stories.carry,
    "compare": facts.compare,
    "counting": facts.counting,
    "echo": facts.echo,
    "location": stories.location,
    "order": facts.order,
    "recall": facts.recall,
    "same": facts.same,
    "story": stories.story,
    "transitive": facts.transitive,
}
TRAINING_ONLY: tuple[str, ...] = ("echo",)
ECHO_STEPS = 800
EVALUATED: tuple[str, ...] = tuple(skill for skill in BUILDERS if skill not in TRAINING_ONLY)


def weights_at(step: int) -> dict[str, float]:
    """Shares of the skills at a training step: copying first, which speeds up all the others."""
    return dict.fromkeys(BUILDERS, 1.0) | {"echo": 3.0 if step < ECHO_STEPS else 0.3}
