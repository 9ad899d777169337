"""Sizes of rows that a run solves for: those of a target, and those between rows of a Pareto front.

What lies between two neighbours on a front is known only to lie in the rectangle that they span,
no cheaper than the one and no better than the other. The search takes the largest of these, halves
it by a size of one of its recipes, and looks again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from streamline_bench.compression.pipeline import content_key
from streamline_bench.compression.recipes import SIZE_KEYS, load_recipe, resized
from streamline_bench.compression.target import Solver, Target, solved
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import StreamlineBenchError
from streamline_bench.methods.base import Size
from streamline_bench.modeling.loading import SourceModel
from streamline_bench.report.fronts import Front, FrontPlace
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.runs.planning.plan import Plan, PlanRow
from streamline_bench.runs.planning.request import AXES
from streamline_bench.runs.planning.rows import Row

log = logging.getLogger(__name__)


def solved_row(
    row: Row, source: SourceModel, run: Path | None, there: Plan | None, device: str, dtype: str
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a row as it is computed on a device, and the keys that give its size.

    There are such keys if the row was solved for a target.

    A size that measured latencies gave stays as it was when the run was begun: its own speed, once
    measured, must not turn the row into another one.

    Raises:
        StreamlineBenchError: naming the row, if its target cannot be solved.
    """
    if row.target is None:
        return row.recipe.computed_on(device, dtype), {}
    asked = row.target.model_dump(exclude_none=True)
    timed = row.target.latency is not None or row.target.ttft is not None
    for old in _rows(there) if timed else ():
        if old.label == row.label and old.target == asked and old.size:
            recipe = load_recipe(row.name, {**row.given, **old.size}).computed_on(device, dtype)
            if recipe.content_hash() == Recipe.model_validate(old.recipe).content_hash():
                return recipe, dict(old.size)
    try:
        recipe, size = solved(row.name, row.given, row.target, source, run=run)
    except StreamlineBenchError as error:
        raise type(error)(f"Row '{row.label}': {error}") from None
    return recipe.computed_on(device, dtype), dict(size.given)


def added_before(
    there: Plan | None,
    rows: Sequence[PlanRow],
    source: SourceModel,
    *,
    search: int,
    device: str,
    dtype: str | None,
) -> tuple[PlanRow, ...]:
    """Return the rows that a search in this folder added, of the first ``search`` sizes.

    Args:
        there: the plan of the folder.
        rows: of this command; what was added for a recipe that it leaves out is left out, too.
        source: the dense model.
    """
    groups, labels = {_group(row) for row in rows}, {row.label for row in rows}
    kept: list[PlanRow] = []
    for row in _rows(there):
        if not row.searched or row.label in labels or row.group not in groups:
            continue
        if _new_size(row, kept) and _sizes_of(kept) >= search:
            continue
        recipe = Recipe.model_validate(row.recipe)
        key = content_key(source, recipe, device=device, dtype=dtype)
        kept.append(row.model_copy(update={"key": key, "folder": None}))
    return tuple(kept)


def more_rows(plan: Plan, board: Leaderboard, source: SourceModel, most: int) -> list[PlanRow]:
    """Return the rows of the next sizes of a search; none when it is at its end.

    Args:
        board: of the run so far.
        source: the plan's model.
        most: sizes at a time.
    """
    left = min(most, plan.search - _sizes_of([row for row in plan.rows if row.searched]))
    front = _chosen_front(plan, board)
    found: list[PlanRow] = []
    for one, two in _gaps(front) if front is not None and left > 0 else ():
        if _sizes_of(found) < left:
            found += _between(plan, board, source, one, two)
    return found


def _rows(plan: Plan | None) -> Iterator[PlanRow]:
    yield from () if plan is None else (*plan.rows, *plan.others)


def _group(row: PlanRow) -> str:
    return row.group or row.label


def _new_size(row: PlanRow, rows: Sequence[PlanRow]) -> bool:
    return not any((row.group, row.size) == (each.group, each.size) for each in rows)


def _sizes_of(rows: Sequence[PlanRow]) -> int:
    """How many sizes some rows have; rows of several seeds share one."""
    return sum(_new_size(row, rows[:place]) for place, row in enumerate(rows))


def _chosen_front(plan: Plan, board: Leaderboard) -> Front | None:
    """The front of what the target limits, else of the bytes, else the first there is."""
    limits = Target.model_validate(plan.target).limits if plan.target else {}
    names = {"memory": "memory", "latency": "time", "ttft": "time", "bytes": "bytes"}
    wanted = [*(names[limit] for limit in limits), "bytes"]
    fronts: dict[str, Front] = {front.measure: front for front in board.fronts}
    known = [fronts[name] for name in wanted if name in fronts]
    return next(iter([*known, *board.fronts]), None)


def _gaps(front: Front) -> list[tuple[FrontPlace, FrontPlace]]:
    """Neighbours on the front, those that leave most open between them first."""
    on = [place for place in front.places if place.on]
    pairs = list(pairwise(on))
    return sorted(pairs, key=lambda p: -(p[1].cost - p[0].cost) * (p[1].accuracy - p[0].accuracy))


def _between(
    plan: Plan, board: Leaderboard, source: SourceModel, one: FrontPlace, two: FrontPlace
) -> list[PlanRow]:
    """The rows of a new size between two neighbours; of the surer one's recipe, if it has one."""
    shown = board.shown_as
    members = {fold.label: fold.members for fold in board.folded}
    ends = []
    for place in (one, two):
        row = shown.get(next(iter(members.get(place.label, [place.label]))))
        if row is None or not row.parameters:
            return []
        ends.append(row.parameters)
    low, high = sorted(ends)
    for place in sorted((one, two), key=lambda place: -place.share):
        labels = members.get(place.label, [place.label])
        base = [row for row in plan.rows if row.label in labels and row.made_here]
        usable = [row for row in base if row.model is None]
        size = _halfway(plan, board, source, usable[0], low, high) if usable else None
        if size is not None:
            return [_resized_row(row, size, source, plan) for row in usable]
    return []


def _halfway(
    plan: Plan, board: Leaderboard, source: SourceModel, base: PlanRow, low: int, high: int
) -> Size | None:
    """The size of a row's recipe that is nearest to the middle and not in the run yet."""
    recipe, shown = Recipe.model_validate(base.recipe), board.shown_as
    same = [row for row in plan.rows if row.made_here and _kind(row) == _kind(base)]
    taken = {_given(row) for row in same}
    made = {shown[row.label].parameters for row in same if row.label in shown}
    sizes = [
        size
        for size in Solver(recipe, Target(bytes=1), source).sizes()
        if low < size.parameters < high
        and size.parameters not in made
        and tuple(sorted(size.given.items())) not in taken
    ]
    return min(sizes, key=lambda size: abs(2 * size.parameters - low - high), default=None)


def _kind(row: PlanRow) -> str:
    """What a row is but for its size and seed."""
    payload = Recipe.model_validate({**row.recipe, "sparsity": None, "n_layers": None})
    parameters = {k: v for k, v in payload.parameters.items() if f"parameters.{k}" not in SIZE_KEYS}
    return payload.model_copy(update={"parameters": parameters, "seed": 0}).content_hash()


def _given(row: PlanRow) -> tuple[tuple[str, Any], ...]:
    """The size that a row was given, as the sizes of methods are."""
    recipe = row.recipe
    given = {**recipe, **{f"parameters.{k}": v for k, v in recipe["parameters"].items()}}
    return tuple(sorted((key, given[key]) for key in SIZE_KEYS if given.get(key) is not None))


def _resized_row(base: PlanRow, size: Size, source: SourceModel, plan: Plan) -> PlanRow:
    recipe = resized(Recipe.model_validate(base.recipe), size.given)
    axes = {key: value for key, value in base.axes.items() if key not in ("sparsity", "n_layers")}
    axes |= {key: value for key, value in size.given.items() if key in AXES}
    value = "-".join(f"{each:g}" for each in size.given.values())
    others = [f"{k}{v}" if k == "seed" else f"{v}" for k, v in axes.items() if k not in size.given]
    label = "-".join([_group(base), value, *(_plain(part) for part in others)])
    log.info("search: %s, %s", label, ", ".join(f"{k} {v}" for k, v in size.given.items()))
    return base.model_copy(
        update={
            "label": label,
            "recipe": recipe.model_dump(mode="json"),
            "key": content_key(source, recipe, device=plan.device, dtype=plan.dtype),
            "folder": None, "size": dict(size.given), "target": {}, "searched": True,
            "group": _group(base), "axes": axes, "published": (),
        }
    )  # fmt: skip


def _plain(text: str) -> str:
    """The text as a part of a label: the name of a file without its folder and ending."""
    name = Path(text).name.partition(".")[0] if "/" in text or "\\" in text else text
    return "".join(letter if letter.isalnum() or letter in "._+" else "-" for letter in name)
