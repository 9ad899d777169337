"""The rows of a request: names and groups of recipes, values of axes, checkpoints made elsewhere.

Each row has a label that can be a folder's name.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.compression.recipes import (
    SIZE_KEYS,
    applicable,
    load_recipe,
    recipe_groups,
    refuse_sizes,
    refuse_unknown_key,
    refuse_unread,
    unread_keys,
)
from streamline_bench.core.machine.environment import a_few
from streamline_bench.core.recipe.schema import CalibrationSpec, PublishedResult, Recipe
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import RecipeError
from streamline_bench.runs.folder import is_row_name
from streamline_bench.runs.planning.request import AXES, Request, RowRequest

log = logging.getLogger(__name__)

TARGET = "target"
"""The key that stands for a size among the overrides of a row, as in a plan."""

GROUPS: tuple[str, ...] = (
    *("all", "no-training", "calibrated", "recovered"),
    *("experts", "paper-settings", "hub-data"),
)
"""Groups of recipes, see :func:`.recipe_groups`; with a minus before it, a group is taken away."""


@dataclass(frozen=True)
class Row:
    """A label and its complete recipe.

    Attributes:
        recipe: that of the dense model for a checkpoint made elsewhere.
        checkpoint: what was asked for, if the row was made elsewhere.
        model: number of the dense model that it is or comes from.
        group: its label before axes spanned it; None where none did.
        axes: axis -> value.
        reference: label of the dense row that it is compared with; None: that of its model.
        target: what it must fit, still to be solved; None where its size is given.
        name, given: what the recipe was loaded by.
    """

    label: str
    recipe: Recipe
    checkpoint: RowRequest | None = None
    model: int = 0
    group: str | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    published: tuple[PublishedResult, ...] = ()
    target: Any = None
    name: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Nothing is compressed: the model itself is scored."""
        dense = self.recipe.method == "dense" and self.recipe.recovery is None
        return dense and self.checkpoint is None


def refuse_unknown_names(request: Request) -> None:
    """Refuse unknown recipes and keys (RecipeError) before a method imports torch."""
    asked = _expanded(request.recipes)
    for each in asked:
        if each.recipe is not None:
            load_recipe(each.recipe, check=False)
    for key in (*request.overrides, *(key for row in asked for key in row.overrides)):
        if key != TARGET:
            refuse_unknown_key(key)


def resolve_rows(request: Request, asked: Collection[str] = ()) -> list[Row]:
    """Return the rows of a request in its order; the dense model is put first if it is missing.

    Args:
        asked: those of the keys for every row that somebody gave for this comparison, and that
            therefore decide something in at least one row. Those of a plan may fit other rows.

    RecipeError: an unknown recipe or key, a value or an axis that no row reads, a label that is
    taken or cannot name a folder.
    """
    names = dict(enumerate(_model_names(request.models)))
    common = _common(request)
    rows: list[Row] = []
    for each in _expanded(request.recipes):
        if each.checkpoint:
            rows.append(_checkpoint(each))
        else:
            own = _own_model(each, request.models)
            rows += _spanned(each, common, own or names)
    _require_used(common, [row for row in rows if row.checkpoint is None], asked)
    for number, name in reversed(names.items()):
        if not any(row.is_dense and row.model == number for row in rows):
            axes = {"model": name} if name else {}
            label, group = ("dense", None) if not name else (f"dense-{name}", "dense")
            dense = Row(label, load_recipe("dense"), model=number, group=group, axes=axes)
            rows.insert(0, dense)
    _check_labels(rows)
    _say_overridden(rows)
    return rows


def _common(request: Request) -> dict[str, Any]:
    """The keys for every row, a target among them (RecipeError: it stands beside a size)."""
    common = dict(request.overrides)
    if request.target is not None:
        common[TARGET] = request.target
    if TARGET in common:
        refuse_sizes(common)
    return common


def _check_labels(rows: Sequence[Row]) -> None:
    seen: set[str] = set()
    dense = [row.label for row in rows if row.is_dense]
    for row in rows:
        if not is_row_name(row.label):
            raise RecipeError(
                f"The row label '{row.label}' cannot name a folder here; use letters, digits, '.', "
                "'_', '+' and '-', and no name of the run's own files, such as jobs, noise or "
                "run.json."
            )
        if row.label.lower() in seen:
            raise RecipeError(
                f"Two rows are called '{row.label}'; give one of them another label (--row "
                "LABEL=RECIPE)."
            )
        seen.add(row.label.lower())
        if row.reference is not None and row.reference not in dense:
            raise RecipeError(
                f"Row '{row.label}' is to be compared with '{row.reference}', which is not a dense "
                f"row; there are: {', '.join(dense)}."
            )


def _model_names(models: Sequence[str]) -> list[str]:
    """What the rows of each model are told apart by; nothing where there is one model."""
    if len(models) == 1:
        return [""]
    names = [_part(Path(name).name) for name in models]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise RecipeError(
            f"Two models are called '{twice[0]}'; give them by paths that end in different names."
        )
    return names


def _own_model(request: RowRequest, models: Sequence[str]) -> dict[int, str] | None:
    """The number of the only model of a row, which its label need not name; None: each has it."""
    if request.model is None:
        return None
    if request.model not in models:
        raise RecipeError(
            f"Row '{request.label or request.recipe}' names the model {request.model}, which is "
            f"not one of the plan's: {', '.join(models)}."
        )
    return {models.index(request.model): ""}


def _part(text: str) -> str:
    """The text as a part of a label."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.") or "model"


def _expanded(recipes: Sequence[str | RowRequest]) -> list[RowRequest]:
    """Replace groups by their recipes, and take away what has a minus before it (RecipeError).

    A recipe that a group repeats is taken once.
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
                known = [*GROUPS, *(str(row.recipe) for row in found)]
                raise RecipeError(f"'{each}' takes nothing away{suggest_or_list(name, known)}")
            found = kept
        elif each in GROUPS:
            known_rows = {row.recipe for row in found if row.label is None}
            names = sorted(groups.get(each, ()), key=lambda name: (name != "dense", name))
            found += [RowRequest(recipe=name) for name in names if name not in known_rows]
        else:
            found.append(RowRequest(recipe=each))
    return found


def _checkpoint(request: RowRequest) -> Row:
    name = str(request.checkpoint)
    return Row(
        request.label or _part(Path(name).name),
        load_recipe("dense"),
        checkpoint=request,
        reference=request.reference,
        published=request.published,
    )


def _spanned(
    request: RowRequest, common: Mapping[str, Any], models: Mapping[int, str]
) -> Iterator[Row]:
    """The rows that a recipe gives: one for each model and each value of the axes it reads."""
    axes = _axes(request, common)
    first = _with(request, common, {axis: values[0] for axis, values in axes.items()})
    written = _row(*first)
    read = {
        axis: values for axis, values in axes.items() if not unread_keys(written.recipe, [axis])
    }
    names = {axis: _value_names(axis, values) for axis, values in read.items()}
    for number, model in models.items():
        for places in itertools.product(*(range(len(values)) for values in read.values())):
            at = dict(zip(read, places, strict=True))
            row = _row(*_with(request, common, {axis: read[axis][n] for axis, n in at.items()}))
            parts = [model, *(names[axis][n] for axis, n in at.items() if len(read[axis]) > 1)]
            label = "-".join([row.label, *filter(None, parts)])
            spanned = {axis: read[axis][n] for axis, n in at.items()}
            yield Row(
                label,
                row.recipe,
                model=number,
                group=row.label if label != row.label else None,
                axes={**({"model": model} if model else {}), **spanned},
                reference=request.reference,
                published=request.published,
                target=row.target,
                name=row.name,
                given=row.given,
            )


def _axes(request: RowRequest, common: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Axis -> its values, of the keys that are given as a list."""
    own = request.overrides
    given = {**_of_others(own, common), **own}
    axes = {key: list(given[key]) for key in AXES if key in _lists(given)}
    for key, values in axes.items():
        twice = [value for value, count in Counter(map(str, values)).items() if count > 1]
        if twice or not values:
            what = f"has {twice[0]} twice" if twice else "has no value"
            raise RecipeError(f"'{key}' {what}; give each value once.")
    return axes


def _lists(given: Mapping[str, Any]) -> set[str]:
    """The axes that are given as a list."""
    return {key for key in AXES if isinstance(given.get(key), list | tuple)}


def _of_others(own: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The common values of a row; one that names its own size is not given another as well."""
    sizes = {*SIZE_KEYS, TARGET}
    return {k: v for k, v in common.items() if not (k in sizes and sizes & own.keys())}


def _with(
    request: RowRequest, common: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[RowRequest, dict[str, Any]]:
    """The request and the common values with one value of each axis; other axes are left out."""

    def single(given: Mapping[str, Any]) -> dict[str, Any]:
        lists = _lists(given)
        chosen = {key: values[key] for key in lists & values.keys()}
        return {key: value for key, value in given.items() if key not in lists} | chosen

    return request.model_copy(update={"overrides": single(request.overrides)}), single(common)


def read_texts(recipe: Recipe) -> Iterator[CalibrationSpec]:
    """What a recipe reads from: to look at the model, to train a replacement, to recover."""
    from streamline_bench.methods.base import get_method, unread_parts

    if get_method(recipe.method).reads_calibration(recipe.parameters):
        yield recipe.calibration
    if "training" not in unread_parts(recipe.method) and recipe.replacement.kind != "none":
        data = recipe.training.data
        own = data.source if data.source != "auto" else recipe.calibration.source
        yield data.model_copy(update={"source": own})
    if recipe.recovery_data is not None:
        yield recipe.recovery_data


def _value_names(axis: str, values: Sequence[Any]) -> list[str]:
    """What tells the values of an axis apart in labels."""
    if axis == "seed":
        return [f"seed{value}" for value in values]
    if axis == "calibration":
        stems = [_part(re.split(r"[/\\]", str(value))[-1].split(".")[0]) for value in values]
        return stems if len(set(stems)) == len(stems) else [f"text{n}" for n in range(len(values))]
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in values]


def _row(request: RowRequest, common: Mapping[str, Any]) -> Row:
    own, name = dict(request.overrides), str(request.recipe)
    shared = _of_others(own, common)
    asked = [given.pop(TARGET) for given in (own, shared) if TARGET in given]
    if TARGET in request.overrides:
        refuse_sizes(own)
    written = load_recipe(name)
    label = request.label or written.name
    given = {**applicable(shared, written), **own} if written.method != "dense" else own
    recipe = load_recipe(name, given)
    refuse_unread(recipe, own)
    # What decides nothing in a row must not make it another one: a text that it does not read.
    unread = set(unread_keys(recipe, given)) - own.keys()
    if unread:
        given = {key: given[key] for key in given if key not in unread}
        recipe = load_recipe(name, given)
    if not asked or written.method == "dense":
        return Row(label, recipe)
    from streamline_bench.compression.target import Target

    target = Target.parse(asked[0], f"Row '{label}': target")
    return Row(label, recipe, target=target, name=name, given=given)


def _say_overridden(rows: Sequence[Row]) -> None:
    """Say once what rows have in place of their recipes' own values."""
    changes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for key, (before, after) in row.recipe.overridden.items():
            if key not in SIZE_KEYS and before is not None:
                changes.setdefault((key, str(after), str(before)), []).append(row.label)
    for (key, after, before), labels in changes.items():
        log.info("%s: %s is %s, the recipe's own is %s", a_few(labels), key, after, before)


def _require_used(common: Mapping[str, Any], rows: Sequence[Row], asked: Collection[str]) -> None:
    lists = _lists(common)
    made = [row for row in rows if row.recipe.method != "dense"]
    used: set[str] = {TARGET} if any(row.target for row in made) else set()
    for row in made:
        plain = {key: value for key, value in common.items() if key != TARGET}
        used |= (applicable(plain, row.recipe).keys() - lists) | (row.axes.keys() & lists)
    unused = sorted(common.keys() - used) if made else []
    # Of a row's own size or value, the common one is not read.
    unused += [
        key
        for key in asked
        if key in common and key != TARGET and all(unread_keys(row.recipe, [key]) for row in rows)
    ]
    if unused:
        labels = a_few([row.label for row in rows])
        raise RecipeError(
            f"'{unused[0]}' has no effect, because none of the rows ({labels}) reads it; leave it "
            "out, or add a row that reads it."
        )
