"""From names and groups of recipes to rows, each with a label that can be a folder's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streamline_bench.compression.recipes import SIZE_KEYS, applicable, list_recipes, load_recipe
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import RecipeError
from streamline_bench.runs.planning.plan import PLAN_FILE
from streamline_bench.runs.planning.request import Request, RowRequest

__all__ = [
    "FILES",
    "FOLDERS",
    "GROUPS",
    "PARTS_OF_A_ROW",
    "Row",
    "is_row_name",
    "parse_row",
    "resolve_rows",
]

GROUPS: tuple[str, ...] = ("all", "no-training", "calibrated", "recovered")
"""Groups of the recipes that come with the package: all of them, or by what they cost."""


FOLDERS = ("jobs", "noise", "throughput")
FILES = ("run.json", *(f"leaderboard.{kind}" for kind in ("html", "md", "csv", "json")))
PARTS_OF_A_ROW = ("checkpoint", "eval", "divergence.json")
_RESERVED = frozenset({*FOLDERS, *FILES, PLAN_FILE, "throughput.json", "report", "model-cards"})
"""Names beside the rows' folders, and those that commands are told to write there."""
_ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def is_row_name(label: str) -> bool:
    """Whether a row's folder may be called so; some file systems do not tell A from a."""
    name = label.lower()
    taken = name in _RESERVED or name.startswith("leaderboard.")
    return bool(_ROW_NAME.fullmatch(label)) and not taken


@dataclass(frozen=True)
class Row:
    """A label and its complete recipe."""

    label: str
    recipe: Recipe

    @property
    def is_dense(self) -> bool:
        """Nothing is compressed: the model itself is scored."""
        return self.recipe.method == "dense" and self.recipe.recovery is None


def parse_row(text: str) -> RowRequest:
    """Read ``LABEL=RECIPE`` or ``LABEL=RECIPE:KEY=VALUE,KEY=VALUE``.

    Raises:
        RecipeError: the text has another form.
    """
    label, equals, rest = text.partition("=")
    recipe, colon, assignments = rest.partition(":")
    overrides: dict[str, Any] = {}
    for each in assignments.split(",") if colon else []:
        key, separator, value = each.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"'{each}' in row '{text}' is not KEY=VALUE.")
        overrides[key.strip()] = value
    if not equals or not label or not recipe:
        raise RecipeError(f"'{text}' is not a row; write LABEL=RECIPE:KEY=VALUE,KEY=VALUE.")
    return RowRequest(recipe=recipe, label=label, overrides=overrides)


def resolve_rows(request: Request) -> list[Row]:
    """Return the rows of a request in its order; the dense model is put first if it is missing.

    Raises:
        RecipeError: an unknown recipe or key, a label that is taken or cannot name a folder.
    """
    rows = [_row(each, request.overrides) for each in _expanded(request.recipes)]
    _require_used(request.overrides, [row.recipe for row in rows if row.recipe.method != "dense"])
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
    recipe = load_recipe(request.recipe)
    if recipe.method != "dense":
        recipe = load_recipe(request.recipe, {**applicable(shared, recipe), **own})
    elif own:
        recipe = load_recipe(request.recipe, own)
    return Row(request.label or recipe.name, recipe)


def _require_used(common: Mapping[str, Any], recipes: Iterable[Recipe]) -> None:
    used = [applicable(common, recipe).keys() for recipe in recipes]
    unused = sorted(common.keys() - set().union(*used)) if used else []
    if unused:
        raise RecipeError(
            f"No recipe of this comparison reads '{unused[0]}'; leave it out, or add a recipe that "
            "does."
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
