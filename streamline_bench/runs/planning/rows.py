"""From names and groups of recipes to rows, each with a label that can be a folder's name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamline_bench.compression.recipes import (
    SIZE_KEYS,
    applicable,
    load_recipe,
    recipe_groups,
    refuse_unknown_key,
)
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import RecipeError
from streamline_bench.runs.folder import is_row_name
from streamline_bench.runs.planning.request import Request, RowRequest

log = logging.getLogger(__name__)

GROUPS: tuple[str, ...] = (
    *("all", "no-training", "calibrated", "recovered"),
    *("paper-settings", "hub-data"),
)
"""Groups of recipes, see :func:`.recipe_groups`; with a minus before it, a group is taken away."""


@dataclass(frozen=True)
class Row:
    """A label and its complete recipe."""

    label: str
    recipe: Recipe

    @property
    def is_dense(self) -> bool:
        """Nothing is compressed: the model itself is scored."""
        return self.recipe.method == "dense" and self.recipe.recovery is None


def refuse_unknown_names(request: Request) -> None:
    """Refuse unknown recipes and short keys before a method, and torch with it, is imported.

    Raises:
        RecipeError: naming the first of them.
    """
    asked = _expanded(request.recipes)
    for each in asked:
        load_recipe(each.recipe, check=False)
    for key in (*request.overrides, *(key for row in asked for key in row.overrides)):
        refuse_unknown_key(key)


def resolve_rows(request: Request) -> list[Row]:
    """Return the rows of a request in its order; the dense model is put first if it is missing.

    Raises:
        RecipeError: an unknown recipe or key, a label that is taken or cannot name a folder.
    """
    rows = [_row(each, request.overrides) for each in _expanded(request.recipes)]
    _require_used(request.overrides, [row for row in rows if row.recipe.method != "dense"])
    if not any(row.is_dense for row in rows):
        rows.insert(0, Row("dense", load_recipe("dense")))
    seen: set[str] = set()
    for row in rows:
        _check_label(row.label, seen)
        seen.add(row.label.lower())
    return rows


def _expanded(recipes: Sequence[str | RowRequest]) -> list[RowRequest]:
    """Replace groups by their recipes, and take away what has a minus before it.

    A recipe that a group repeats is taken once.

    Raises:
        RecipeError: nothing that was named before has the name after a minus.
    """
    wanted = {each.removeprefix("-") for each in recipes if isinstance(each, str)}
    groups = recipe_groups() if wanted & {*GROUPS} else {}
    found: list[RowRequest] = []
    for each in recipes:
        if isinstance(each, RowRequest):
            found.append(each)
        elif each.startswith("-"):
            name = each.removeprefix("-")
            gone = groups.get(name, (name,))
            kept = [row for row in found if row.recipe not in gone]
            if len(kept) == len(found):
                known = [*GROUPS, *(row.recipe for row in found)]
                raise RecipeError(f"'{each}' takes nothing away{suggest_or_list(name, known)}")
            found = kept
        elif each in GROUPS:
            known_rows = {row.recipe for row in found if row.label is None}
            names = sorted(groups.get(each, ()), key=lambda name: (name != "dense", name))
            found += [RowRequest(recipe=name) for name in names if name not in known_rows]
        else:
            found.append(RowRequest(recipe=each))
    return found


def _row(request: RowRequest, common: Mapping[str, Any]) -> Row:
    own = request.overrides
    sizes = set(SIZE_KEYS)
    shared = {
        key: value
        for key, value in common.items()
        # A row that names its own size is not given the other one as well.
        if not (key in sizes and sizes & own.keys())
    }
    written = load_recipe(request.recipe)
    label = request.label or written.name
    given = {**applicable(shared, written), **own} if written.method != "dense" else own
    recipe = load_recipe(request.recipe, given)
    for key, (before, after) in recipe.overridden.items():
        if key not in SIZE_KEYS and before is not None:
            log.info("%s: %s is %s, the recipe's own is %s", label, key, after, before)
    return Row(label, recipe)


def _require_used(common: Mapping[str, Any], rows: Sequence[Row]) -> None:
    used = [applicable(common, row.recipe).keys() for row in rows]
    unused = sorted(common.keys() - set().union(*used)) if used else []
    if unused:
        labels = ", ".join(row.label for row in rows)
        raise RecipeError(
            f"'{unused[0]}' has no effect, because none of the rows ({labels}) reads it; leave it "
            "out, or add a row that reads it."
        )


def _check_label(label: str, seen: set[str]) -> None:
    if not is_row_name(label):
        raise RecipeError(
            f"The row label '{label}' cannot name a folder here; use letters, digits, '.', '_', "
            "'+' and '-', and no name of the run's own files, such as jobs, noise or run.json."
        )
    if label.lower() in seen:
        raise RecipeError(
            f"Two rows are called '{label}'; give one of them another label (--row LABEL=RECIPE)."
        )
