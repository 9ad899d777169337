"""Finds recipes: those of ``baselines/`` by name, a user's own by path, with overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_bench.core.recipe import Recipe, parse_recipe
from streamline_bench.core.suggestions import suggest
from streamline_bench.core.yaml_file import read_yaml_mapping
from streamline_bench.errors import RecipeError
from streamline_bench.methods.registry import check_parameters
from streamline_bench.resources import resource

__all__ = ["SIZE_KEYS", "list_recipes", "load_recipe"]

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

SIZE_KEYS = ("sparsity", "n_layers", "parameters.ratio", "parameters.slicing")
"""Each says how much goes, so that one that is given takes the place of the recipe's."""

OWN_KEYS = ("sparsity", "n_layers", "seed", "reference_quirks")


def list_recipes() -> dict[str, Path]:
    """Return the recipes of ``baselines/``: name -> file, sorted by name."""
    return {path.stem: path for path in sorted(resource("baselines").glob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe, with overrides applied, validated.

    Args:
        name_or_path: a name from ``baselines/`` or the path of a YAML file.
        overrides: short keys (``sparsity``, ``n_layers``, ``replacement``, ``calibration``, …) or
            dotted ones (``training.lr``); ``None`` values are ignored.

    Raises:
        RecipeError: unknown name, unreadable file, unknown key or wrong value.
    """
    path = _recipe_path(str(name_or_path))
    payload = read_yaml_mapping(path, "a recipe: it must hold a mapping with the key 'method'")
    payload.setdefault("name", path.stem)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    sizes = [key for key in SIZE_KEYS if key in given]
    if len(sizes) > 1:
        raise RecipeError(f"Give {sizes[0]} or {sizes[1]}, not both.")
    # A preset stands for a whole way of training: it replaces the recipe's own, and the caller's
    # other keys are laid over it.
    for key in sorted(given, key=lambda key: key not in (*_PRESET_KEYS, "recovery")):
        if key in _PRESET_KEYS:
            training = payload.get("training") or {}
            payload["training"] = {k: v for k, v in training.items() if k == "data"}
        _override(payload, key, given[key])
    _expand_preset(payload)
    if payload.get("recovery"):
        payload["cost"] = "recovered"
    recipe = parse_recipe(payload, origin=f"Recipe '{payload['name']}'")
    check_parameters(recipe)
    return recipe


def _expand_preset(payload: dict[str, Any]) -> None:
    """Put the values of ``training.preset`` in place; keys written beside it win."""
    training = payload.get("training")
    if not isinstance(training, dict) or "preset" not in training:
        return
    from streamline_bench.core.distill.presets import preset_values

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
            f"Unknown recipe '{name}'{suggest(name, known) or ';'} "
            f"known recipes: {', '.join(known)} (or give the path of a .yaml file)."
        )
    return known[name]


def _override(payload: dict[str, Any], key: str, value: Any) -> None:
    if key not in SHORT_KEYS and key not in OWN_KEYS and "." not in key:
        known = [*OWN_KEYS, *SHORT_KEYS]
        raise RecipeError(f"Unknown recipe key '{key}'{suggest(key, known)}")
    if key == "recovery":
        # A preset stands for a whole recovery; none leaves the result as the method made it.
        payload["recovery"] = None if value == "none" else {"preset": value}
        return
    if key in SIZE_KEYS:
        _drop_sizes(payload)
    for dotted in SHORT_KEYS.get(key, (key,)):
        *parents, leaf = dotted.split(".")
        target = payload
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise RecipeError(f"Recipe key '{dotted}' cannot be set: '{parent}' is no mapping.")
        target[leaf] = _plain(value)


def _drop_sizes(payload: dict[str, Any]) -> None:
    for key in SIZE_KEYS:
        *parents, leaf = key.split(".")
        holder: Any = payload
        for parent in parents:
            holder = holder.get(parent)
        if isinstance(holder, dict):
            holder.pop(leaf, None)


def _plain(value: Any) -> Any:
    """Read ``"1e-3"`` as a number: YAML and the harness leave such strings as they are."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
