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
    "pairs": facts.pairs,
    "recall": facts.recall,
    "same": facts.same,
    "story": stories.story,
    "transitive": facts.transitive,
}
TRAINING_ONLY: tuple[str, ...] = ("echo", "pairs")
"""Skills that teach to copy and to look up; without them the others take far longer."""

FIRST_STEPS = 800
_FIRST = {"echo": 3.0, "pairs": 4.0, "attributes": 2.0}
_LATER = {"echo": 0.3, "pairs": 0.5}
EVALUATED: tuple[str, ...] = tuple(skill for skill in BUILDERS if skill not in TRAINING_ONLY)


def weights_at(step: int) -> dict[str, float]:
    """Shares of the skills at a training step: copying and looking up first."""
    return dict.fromkeys(BUILDERS, 1.0) | (_FIRST if step < FIRST_STEPS else _LATER)
