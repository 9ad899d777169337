"""From names and groups of recipes to rows, each with a label that can be a folder's name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from streamline_bench.compression.recipes import SIZE_KEYS, applicable, list_recipes, load_recipe
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import RecipeError
from streamline_bench.runs.folder import is_row_name
from streamline_bench.runs.planning.request import Request, RowRequest

__all__ = ["GROUPS", "Row", "resolve_rows"]

log = logging.getLogger(__name__)

_SHOWN = {"name", "title", "paper", "link", "reproduces", "published", "cost", *SIZE_KEYS}
"""Keys of a recipe that decide no result, and sizes, of which one replaces the other."""

GROUPS: tuple[str, ...] = ("all", "no-training", "calibrated", "recovered")
"""Groups of the recipes that come with the package: all of them, or by what they cost."""


@dataclass(frozen=True)
class Row:
    """A label and its complete recipe."""

    label: str
    recipe: Recipe

    @property
    def is_dense(self) -> bool:
        """Nothing is compressed: the model itself is scored."""
        return self.recipe.method == "dense" and self.recipe.recovery is None


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


def _expanded(recipes: Iterable[str | RowRequest]) -> list[RowRequest]:
    """Replace groups by their recipes; a recipe that a group repeats is taken once."""
    found: list[RowRequest] = []
    for each in recipes:
        if isinstance(each, RowRequest):
            found.append(each)
        elif each in GROUPS:
            known = {row.recipe for row in found if row.label is None}
            found += [RowRequest(recipe=name) for name in _group(each) if name not in known]
        else:
            found.append(RowRequest(recipe=each))
    return found


def _group(name: str) -> list[str]:
    recipes = {each: load_recipe(each) for each in list_recipes()}
    cost = name.replace("-", " ")
    chosen = [each for each, recipe in recipes.items() if name == "all" or recipe.cost == cost]
    return sorted(chosen, key=lambda each: (recipes[each].method != "dense", each))


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
    for key, (before, after) in _replaced(written, recipe).items():
        log.info("%s: %s is %s, the recipe's own is %s", label, key, after, before)
    return Row(label, recipe)


def _replaced(written: BaseModel, given: BaseModel, within: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> values that a recipe itself gives and that were replaced, before and after."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(written.model_fields_set - _SHOWN):
        before, after = getattr(written, name), getattr(given, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found |= _replaced(before, after, f"{within}{name}.")
        elif before != after and before is not None:
            found[f"{within}{name}"] = (before, after)
    return found


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
