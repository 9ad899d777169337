"""Blocks: each starts the process of every model anew, in random order, and measures every point.

What a process gets at its start stays with it, so that more rounds do not show it; more starts do.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamline_bench.throughput.sweep import Measured, RunningModel, sweep
from streamline_bench.throughput.workload import MOST_BLOCKS, Workload

IN_A_ROW = 3
"""So many blocks in a row must have the precision asked for.

A narrow interval of few blocks is often luck: where the first one ends the measurement, 95 %
intervals cover 90 to 94 %; after three in a row, 93 to 94 %, for two to three blocks more
(``tests/benchmarks/coverage_of_blocks.py``; one ratio, processes of 0.5 to 3 %).
"""


@dataclass
class Blocks:
    """What was measured.

    Attributes:
        points: of each model, by label, with the rounds of all blocks.
        done: number of blocks.
        stopped: why there are fewer than asked for, or less precision; None if all was reached.
    """

    points: dict[str, list[Measured]] = field(default_factory=dict)
    done: int = 0
    stopped: str | None = None


def measure_blocks(
    models: Sequence[RunningModel],
    workload: Workload,
    *,
    one_at_a_time: bool,
    half_width: Callable[[dict[str, list[Measured]]], float],
    advance: Callable[[], object],
) -> Blocks:
    """Measure block after block, until there are enough or time is up.

    A model that fails is left out of the later blocks.

    Args:
        one_at_a_time: each model is ended before the next is started.
        half_width: of the widest interval of any ratio, as a share of it.
        advance: called when a model was started, and after every round of every model.
    """
    found = Blocks({model.contender.label: [] for model in models})

    def block(number: int) -> None:
        found.done = number
        _block(found, models, workload, one_at_a_time, advance)

    found.done, found.stopped = repeat_blocks(
        block,
        workload,
        half_width=lambda: half_width(found.points),
        alive=lambda: any(model.contender.alive for model in models),
    )
    return found


def repeat_blocks(
    block: Callable[[int], None],
    workload: Workload,
    *,
    half_width: Callable[[], float],
    alive: Callable[[], bool],
) -> tuple[int, str | None]:
    """Call ``block`` with 0, 1, … until there are enough or time is up.

    Args:
        half_width: of the widest interval of any ratio so far, as a share of it.
        alive: whether any model can still be measured.

    Returns:
        How many blocks were measured, and why there are fewer than asked for, or less precision.
    """
    started, longest, precise, done, width = time.monotonic(), 0.0, 0, 0, math.inf
    while True:
        begun = time.monotonic()
        block(done)
        done += 1
        now = time.monotonic()
        longest = max(longest, now - begun)
        if workload.until_precision is not None:
            width = half_width()
            precise = precise + 1 if width < workload.until_precision else 0
        if _enough(done, precise, workload):
            return done, None
        if not alive():
            return done, f"no model could be measured after block {done}"
        if workload.until_precision is not None and done >= MOST_BLOCKS:
            return done, (
                f"the half width of an interval is {width:.3g} after {done} blocks, the most "
                f"that are measured; {workload.until_precision:g} was asked for"
            )
        if workload.minutes is not None and now - started + longest > 60 * workload.minutes:
            return done, (
                f"another block would not have ended within {workload.minutes:g} minutes; "
                f"{done} of {_asked(workload)} were measured"
            )


def _enough(done: int, precise: int, workload: Workload) -> bool:
    if done < workload.blocks:
        return False
    return workload.until_precision is None or precise >= IN_A_ROW


def _asked(workload: Workload) -> str:
    if workload.until_precision is None:
        return f"{workload.blocks} blocks"
    return f"the blocks that a precision of {workload.until_precision:g} needs"


def _block(
    found: Blocks,
    models: Sequence[RunningModel],
    workload: Workload,
    one_at_a_time: bool,
    advance: Callable[[], object],
) -> None:
    """Measure one more block."""
    shown = [model for model in models if found.done == 0 or model.contender.alive]
    random.Random(f"{workload.seed} {found.done}").shuffle(shown)
    for group in [[model] for model in shown] if one_at_a_time else [shown]:
        for label, points in sweep(group, workload, advance, _held(found, group)).items():
            earlier = found.points[label]
            if not earlier:
                earlier += points
            for point, new in zip(earlier, points, strict=True):
                if new is not point:
                    _add(point, new, found.done)


def _held(found: Blocks, models: Sequence[RunningModel]) -> dict[int, int]:
    """Return requested batch -> the largest that all of these models held in earlier blocks."""
    held: dict[int, int] = {}
    for model in models:
        for point in found.points[model.contender.label]:
            requested, size = point.batch_requested, point.batch_size
            held[requested] = min(size, held.get(requested, size))
    return held


def _add(point: Measured, new: Measured, block: int) -> None:
    """Add what a later block measured; a batch that became smaller makes the earlier ones void."""
    if new.batch_size != point.batch_size and new.reason is None:
        point.notes.append(
            f"blocks before block {block + 1} had a batch of {point.batch_size} and do not count"
        )
        point.rounds, point.batch_size = [], new.batch_size
    point.rounds += [found.model_copy(update={"block": block}) for found in new.rounds]
    point.notes = list(dict.fromkeys([*point.notes, *new.notes]))
    point.reason = point.reason or new.reason
    peaks = [peak for peak in (point.peak_memory_bytes, new.peak_memory_bytes) if peak is not None]
    point.peak_memory_bytes = max(peaks, default=None)
