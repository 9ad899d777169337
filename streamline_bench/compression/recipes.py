"""Finds recipes: by name in ``baselines/`` and in other packages, by path; with overrides."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from streamline_bench.core.files import read_yaml_mapping
from streamline_bench.core.machine.environment import resource
from streamline_bench.core.recipe.presets import preset_values
from streamline_bench.core.recipe.schema import Recipe, parse_recipe
from streamline_bench.core.recipe.validation import suggest, suggest_or_list
from streamline_bench.errors import RecipeError, first_line
from streamline_bench.methods.base import ENTRY_POINTS as METHOD_ENTRY_POINTS
from streamline_bench.methods.base import (
    METHODS,
    check_parameters,
    get_method,
    offered,
    unread_parts,
)

log = logging.getLogger(__name__)

ENTRY_POINTS = "streamline_bench.recipes"
"""Entry-point group in which other packages name a folder of theirs with recipes, as a module:
``any_name = "package.recipes"``."""

SHORT_KEYS: Mapping[str, tuple[str, ...]] = {
    "replacement": ("replacement.kind",),
    "replacement_layers": ("replacement.layers",),
    "calibration": ("calibration.source", "training.data.source"),
    "calibration_samples": ("calibration.samples",),
    "calibration_tokens": ("calibration.tokens",),
    "training_samples": ("training.data.samples",),
    "training_tokens": ("training.data.tokens",),
    "sequence_length": ("calibration.sequence_length", "training.data.sequence_length"),
    "objective": ("training.objective",),
    "preset": ("training.preset",),
    "epochs": ("training.epochs",),
    "lr": ("training.lr",),
    "recovery": ("recovery.preset",),
}
"""Short spellings for ``--model_args`` and the command line -> dotted keys of the schema."""

_PRESET_KEYS = ("preset", "training.preset")

SIZE_KEYS = (
    "sparsity", "n_layers", "parameters.ratio", "parameters.slicing", "parameters.sublayers",
)  # fmt: skip
"""Each says how much is removed, so that a given one replaces the recipe's."""

_OF_REPLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "replacement.layers": ("layer",),
    "replacement.intermediate_size": ("ffn", "swiglu", "ffn_res", "swiglu_res"),
}
_OF_RECOVERIES: Mapping[str, str] = {
    "recovery.rank": "lora",
    "recovery.alpha": "lora",
    "recovery.dropout": "lora",
    "recovery.targets": "lora",
    "recovery.last_layers": "partial",
}
"""Keys that only some kinds of a replacement or a recovery read."""

OWN_KEYS = ("sparsity", "n_layers", "seed", "reference_quirks")


def list_recipes(*, built_in: bool = False) -> dict[str, Path]:
    """Return the recipes that have a name: name -> file, sorted by name.

    Those of ``baselines/`` come first; other packages offer theirs in :data:`ENTRY_POINTS`.

    Args:
        built_in: only those of ``baselines/``.
    """
    own = {path.stem: path for path in resource("baselines").glob("*.yaml")}
    others = {} if built_in else {name: files[0][1] for name, files in _offered_recipes().items()}
    return dict(sorted({**others, **own}.items()))


def recipe_groups() -> dict[str, tuple[str, ...]]:
    """Return group -> names of its recipes, from the files alone; no method is imported.

    ``all`` for any model, and by cost ``no-training``, ``calibrated`` and ``recovered``;
    ``experts``: for mixtures alone, in none of those; ``paper-settings``: a paper's own size, data
    and steps; ``hub-data``: text that has to come from the hub.
    """
    from streamline_bench.core.data.corpora import SELF

    groups: dict[str, tuple[str, ...]] = {}
    for recipe in listed_recipes():
        of = ["experts"] if recipe.mixtures_only else ["all", recipe.cost.replace(" ", "-")]
        of += ["paper-settings"] * recipe.paper_settings
        of += ["hub-data"] * any(
            source not in ("auto", SELF) and not Path(source).expanduser().exists()
            for source in recipe.data_sources
        )
        for group in of:
            groups[group] = (*groups.get(group, ()), recipe.name)
    return groups


def listed_recipes() -> list[Recipe]:
    """Return the recipes that have a name, for a list: without the values of training presets.

    Raises:
        RecipeError: a file is not a recipe.
    """
    found = []
    for name, path in list_recipes().items():
        payload = _read(path)
        if isinstance(payload.get("training"), dict):
            payload["training"].pop("preset", None)
        found.append(parse_recipe({**payload, "name": name}, origin=f"Recipe '{name}'"))
    return found


@cache
def _offered_recipes() -> dict[str, list[tuple[str, Path]]]:
    """Return what other packages bring: recipe name -> (package, file) of each that has it."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for entry in (each for entries in offered(ENTRY_POINTS).values() for each in entries):
        owner = entry.dist.name if entry.dist else entry.name
        try:
            spec = importlib.util.find_spec(entry.value)
        # A stranger's package may raise anything while it is imported.
        except Exception as error:
            log.warning("The recipes of %s cannot be read: %s", owner, first_line(error))
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in Path(folder).glob("*.yaml"):
                found.setdefault(path.stem, []).append((owner, path))
    return found


def load_recipe(
    name_or_path: str | Path, overrides: Mapping[str, Any] | None = None, *, check: bool = True
) -> Recipe:
    """Return a recipe, with overrides applied, validated; ``overridden`` says what they changed.

    Args:
        name_or_path: a name of :func:`list_recipes` or the path of a YAML file.
        overrides: short keys (``sparsity``, ``n_layers``, ``replacement``, ``calibration``, …) or
            dotted ones (``training.lr``); ``None`` values are ignored. A short key that stands
            for several sets those that the method reads.
        check: that the method reads what is given, which imports it (and torch, seconds).

    Raises:
        RecipeError: unknown name, unreadable file, unknown key, wrong value, or a part that the
            method does not read.
    """
    path = _recipe_path(str(name_or_path))
    payload = _read(path)
    written = copy.deepcopy(payload)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    sizes = [key for key in SIZE_KEYS if key in given]
    if len(sizes) > 1:
        raise RecipeError(f"Give {sizes[0]} or {sizes[1]}, not both.")
    # A preset stands for a whole way of training: it replaces the recipe's own. The caller's other
    # keys then change it.
    for key in sorted(given, key=lambda key: key not in (*_PRESET_KEYS, "recovery")):
        if key in _PRESET_KEYS:
            training = payload.get("training") or {}
            payload["training"] = {k: v for k, v in training.items() if k == "data"}
        _override(payload, key, given[key])
    _require_recovery(payload, given)
    _restate(payload, written)
    recipe = _parsed(payload)
    if not check:
        return recipe
    check_parameters(recipe)
    _require_own_method(recipe, path)
    if not given:
        return recipe
    now = recipe.decisive()
    try:
        changed = _differences(_parsed(written).decisive(), now)
    except RecipeError:  # a file that only what is given makes complete
        changed = _differences(written, payload)
    changed = {key: pair for key, pair in changed.items() if key.partition(".")[0] in now}
    return recipe.model_copy(update={"overridden": changed})


def _read(path: Path) -> dict[str, Any]:
    payload = read_yaml_mapping(path, "a recipe: it must hold a mapping with the key 'method'")
    payload.setdefault("name", path.stem)
    payload.pop("overridden", None)  # of another loading, where a shown recipe was kept
    if "method" not in payload:
        raise RecipeError(f"Recipe '{payload['name']}' ({path}) names no method; add one.")
    return payload


def _parsed(payload: dict[str, Any]) -> Recipe:
    _expand_preset(payload)
    return parse_recipe(payload, origin=f"Recipe '{payload['name']}'")


def _differences(
    own: Mapping[str, Any], given: Mapping[str, Any], within: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (own value, given value) where they differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*own, *given)):
        before, after = own.get(key), given.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= _differences(before, after, f"{within}{key}.")
        elif before != after:
            found[within + key] = (_short(before), _short(after))
    return found


def _short(value: Any) -> Any:
    """Return the name of a part that is there on one side only, such as a recovery."""
    return value.get("preset") or value.get("kind") if isinstance(value, Mapping) else value


def _require_own_method(recipe: Recipe, path: Path) -> None:
    """Refuse a package's recipe whose method's name is that of one of ours: ours would run."""
    owners = {owner for owner, file in _offered_recipes().get(path.stem, ()) if file == path}
    for entry in offered(METHOD_ENTRY_POINTS).get(recipe.method, ()):
        if recipe.method in METHODS and entry.dist and entry.dist.name in owners:
            raise RecipeError(
                f"Recipe '{recipe.name}' of package {entry.dist.name} names the method "
                f"'{recipe.method}', which streamline-bench has as well and the package offers as "
                f"{entry.value}; rename it there, or write 'method: {entry.value}'."
            )


def applicable(overrides: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return those of the overrides meant for many recipes that this one has a use for.

    Left out are keys of parts that its method does not read, and keys within a recovery where
    there is none.
    """
    unread = unread_parts(recipe.method)
    recovers = recipe.recovery is not None or {"recovery", "recovery.kind"} & overrides.keys()
    return {
        key: value
        for key, value in overrides.items()
        if any(dotted.partition(".")[0] not in unread for dotted in SHORT_KEYS.get(key, (key,)))
        and (recovers or not key.startswith("recovery."))
    }


def resized(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """Return a recipe with another size; it has the key of one that was loaded with it.

    Args:
        given: keys of :data:`SIZE_KEYS`.
    """
    before = recipe.model_dump(mode="json")
    payload = copy.deepcopy(before)
    for key, value in given.items():
        _override(payload, key, value)
    changed = {k: v for k, v in recipe.overridden.items() if k not in SIZE_KEYS}
    changed |= {key: (_value(before, key), value) for key, value in given.items()}
    found = parse_recipe({**payload, "overridden": changed}, f"Recipe '{recipe.name}'")
    check_parameters(found)
    return found


def refuse_unread(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuse overrides that change nothing in what a recipe makes.

    Raises:
        RecipeError: naming the first of them.
    """
    unread = unread_keys(recipe, [key for key, value in given.items() if value is not None])
    if unread:
        raise RecipeError(
            f"'{unread[0]}' has no effect: recipe '{recipe.name}' (method '{recipe.method}') does "
            "not read it; leave it out, or give a recipe that reads it."
        )


def refuse_sizes(given: Mapping[str, Any]) -> None:
    """Refuse a size that is given beside a target (RecipeError: naming it)."""
    size = next((key for key in SIZE_KEYS if given.get(key) is not None), None)
    if size is not None:
        raise RecipeError(f"Give a target or {size}, not both: a target is solved to a size.")


def unread_keys(recipe: Recipe, keys: Iterable[str]) -> list[str]:
    """Return those of the keys of overrides that decide nothing in what a recipe makes.

    Args:
        recipe: with the overrides in place.
    """
    return [
        key
        for key in keys
        if not any(_is_read(recipe, dotted) for dotted in SHORT_KEYS.get(key, (key,)))
    ]


def _is_read(recipe: Recipe, dotted: str) -> bool:
    part, _, field = dotted.partition(".")
    method, recovery = get_method(recipe.method), recipe.recovery
    replaced = "replacement" in method.reads and recipe.replacement.kind != "none"
    if part in unread_parts(recipe.method):
        return False
    if dotted in SIZE_KEYS:
        return recipe.method != "dense"
    if part == "seed":
        return method.reads_seed(recipe.parameters) or replaced or recovery is not None
    if part == "calibration":
        return method.reads_calibration(recipe.parameters) or (
            field == "source" and _borrows_calibration(recipe, replaced)
        )
    if part in ("training", "reference_quirks"):
        return replaced or "replacement" not in method.reads
    if dotted in _OF_REPLACEMENTS:
        return recipe.replacement.kind in _OF_REPLACEMENTS[dotted]
    if dotted in _OF_RECOVERIES and recovery is not None:
        return recovery.kind == _OF_RECOVERIES[dotted]
    return True


def _borrows_calibration(recipe: Recipe, replaced: bool) -> bool:
    """Whether a training reads what the calibration names, because it names nothing itself."""
    data = recipe.recovery.training.data if recipe.recovery is not None else None
    of_recovery = data is not None and data.source == "auto" and data.form != "instruction"
    return of_recovery or (replaced and recipe.training.data.source == "auto")


def read_overrides(name: str | Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the overrides meant for many recipes that decide something in this one.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    own = applicable(overrides, load_recipe(name))
    kinds = ("replacement", "replacement.kind", "recovery", "recovery.kind")
    recipe = load_recipe(name, {key: own[key] for key in kinds if key in own})
    unread = unread_keys(recipe, own)
    return {key: value for key, value in own.items() if key not in unread}


def _require_recovery(payload: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    recovery = payload.get("recovery")
    within = [key for key in given if key.startswith("recovery.")]
    if within and isinstance(recovery, dict) and not {"kind", "preset"} & recovery.keys():
        raise RecipeError(
            f"Recipe '{payload['name']}' has no recovery that '{within[0]}' could change; give "
            "recovery=PRESET or recovery.kind (lora, partial or full) as well."
        )


def _restate(payload: dict[str, Any], written: Mapping[str, Any]) -> None:
    """Correct what overrides changed: cost, title, and published results."""
    before, after = (str(_value(each, "replacement.kind") or "none") for each in (written, payload))
    changed = [f"replacement {after}"] if before != after else []
    if written.get("recovery") and not payload.get("recovery"):
        changed.append("no recovery")
    if payload.get("recovery") or after != "none":
        payload["cost"] = "recovered"
    elif changed:
        calibrated = get_method(str(payload.get("method"))).calibrated
        payload["cost"] = "calibrated" if calibrated else "no training"
    if any(_value(written, key) and not _value(payload, key) for key in SIZE_KEYS[2:]):
        changed += [f"{key} {payload[key]}" for key in SIZE_KEYS[:2] if payload.get(key)]
    if changed:
        payload["title"] = "; ".join(filter(None, (payload.get("title"), ", ".join(changed))))
        payload.pop("published", None)
        payload.pop("reproduces", None)


def _value(payload: Mapping[str, Any], dotted: str) -> Any:
    found: Any = payload
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _expand_preset(payload: dict[str, Any]) -> None:
    """Put the values of ``training.preset`` in place; other keys of the recipe win."""
    training = payload.get("training")
    if isinstance(training, dict) and "preset" in training:
        given = dict(training)
        payload["training"] = {**preset_values(str(given.pop("preset"))), **given}


def _recipe_path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"The recipe file {path} does not exist.")
        return path
    known = list_recipes()
    if name not in known:
        raise RecipeError(
            f"Unknown recipe '{name}'"
            f"{suggest(name, known) or '; streamline-bench recipes lists those that exist'} "
            "(or give the path of a .yaml file)."
        )
    offers = _offered_recipes().get(name, [])
    if known[name] in (file for _, file in offers) and len(offers) > 1:
        owners = " and ".join(f"{owner} ({file})" for owner, file in offers)
        raise RecipeError(
            f"Two packages offer a recipe '{name}': {owners}; give the path of one of them."
        )
    for owner, file in offers:
        if file != known[name]:
            log.warning(
                "Recipe '%s' is the built-in one; that of %s has to be named by its path, %s.",
                name, owner, file,
            )  # fmt: skip
    return known[name]


def refuse_unknown_key(key: str) -> None:
    """Refuse an unknown override without a dot; no method is imported.

    Raises:
        RecipeError: naming the key and the nearest that exists.
    """
    if key not in SHORT_KEYS and key not in OWN_KEYS and "." not in key:
        known = [*OWN_KEYS, *SHORT_KEYS]
        raise RecipeError(f"Unknown recipe key '{key}'{suggest_or_list(key, known)}")


def _override(payload: dict[str, Any], key: str, value: Any) -> None:
    refuse_unknown_key(key)
    if key == "recovery":
        # A preset stands for a whole recovery; none leaves the result as the method made it.
        payload["recovery"] = None if value == "none" else {"preset": value}
        return
    if key in SIZE_KEYS:
        _drop_sizes(payload)
    for dotted in _targets(key, str(payload.get("method"))):
        *parents, leaf = dotted.split(".")
        target = payload
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise RecipeError(
                    f"Recipe key '{dotted}' cannot be set: '{parent}' holds a single value."
                )
        target[leaf] = _plain(value)


def _targets(key: str, method: str) -> tuple[str, ...]:
    """Return the dotted keys that a key sets."""
    targets = SHORT_KEYS.get(key, (key,))
    unread = unread_parts(method)
    read = tuple(dotted for dotted in targets if dotted.partition(".")[0] not in unread)
    # What the method reads nothing of is set all the same: it is refused, not dropped.
    return read or targets


def _drop_sizes(payload: dict[str, Any]) -> None:
    for key in SIZE_KEYS:
        *parents, leaf = key.split(".")
        holder = _value(payload, parents[0]) if parents else payload
        if isinstance(holder, dict):
            holder.pop(leaf, None)


def _plain(value: Any) -> Any:
    """Read ``"1e-3"``, ``"null"`` and ``"[0.9, 0.95]"``, which the command line gives as text."""
    if isinstance(value, str):
        if value == "null" or (value.startswith("[") and value.endswith("]")):
            try:
                return yaml.safe_load(value)
            except yaml.YAMLError:
                return value
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
