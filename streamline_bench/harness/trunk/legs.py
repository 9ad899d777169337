"""Which models walk together, in which order, and where each sets out.

In the order of a depth-first walk through the trie of their steps, every model's longest beginning
in common with any model before it is the one in common with the model right before it. So a stack
of hidden states, one for each boundary where a later model sets out, is all there is to keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamline_bench.harness.trunk.stack import Stack, root_difference


@dataclass(frozen=True)
class Leg:
    """One model's part of a walk.

    Attributes:
        start: boundary it sets out from: that many of its steps were run by others.
        keep: boundaries above ``start`` where later models set out.
    """

    label: str
    start: int
    keep: frozenset[int]


def walks_of(stacks: Mapping[str, Stack]) -> list[list[str]]:
    """Group labels whose models have the same first step, each group in walking order.

    Groups come in the order of ``stacks``; a group of one shares nothing.
    """
    groups: dict[object, list[str]] = {}
    for label, stack in stacks.items():
        first = stack.steps[0].name if stack.steps else ""
        groups.setdefault((tuple(sorted(stack.root.items())), first), []).append(label)
    return [_walking_order(labels, stacks) for labels in groups.values()]


def legs_of(labels: Sequence[str], stacks: Mapping[str, Stack]) -> list[Leg]:
    """Return the legs of models in walking order (any part of one is in walking order, too)."""
    starts = [0]
    for before, label in itertools.pairwise(labels):
        starts.append(_in_common(stacks[before], stacks[label]))
    legs = []
    for number, label in enumerate(labels):
        lowest = len(stacks[label].steps)
        keep = set()
        for later in starts[number + 1 :]:
            if later <= lowest:
                lowest = later
                keep.add(later)
        legs.append(Leg(label, starts[number], frozenset(b for b in keep if b > starts[number])))
    return legs


def solo_reason(label: str, dense: str, stacks: Mapping[str, Stack]) -> str:
    """Say why a model shares no layer with another one, compared with the dense model."""
    if len(stacks) == 1:
        return "no other model has to be scored"
    if label == dense or dense not in stacks:
        return "no other model has the same first layer"
    difference = root_difference(stacks[label], stacks[dense]) or "its first layer differs"
    return f"it shares no layer with '{dense}': {difference}"


def _walking_order(labels: Sequence[str], stacks: Mapping[str, Stack]) -> list[str]:
    seen: dict[str, int] = {}
    for label in labels:
        for step in stacks[label].steps:
            seen.setdefault(step.name, len(seen))
    return sorted(labels, key=lambda label: [seen[step.name] for step in stacks[label].steps])


def _in_common(first: Stack, second: Stack) -> int:
    count = 0
    for one, other in zip(first.steps, second.steps, strict=False):
        if (one.name, one.layer, one.attachment) != (other.name, other.layer, other.attachment):
            break
        count += 1
    return count
