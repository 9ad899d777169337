"""Method names and where their classes live; imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.recipe.validation import suggest, wrong_value
from streamline_bench.errors import RecipeError
from streamline_bench.methods.base import Method

__all__ = ["METHODS", "check_parameters", "get_method", "unread_parts"]

METHODS: Mapping[str, str] = {
    "dense": "dense:Dense",
    "first_layers": "depth.positional:FirstLayers",
    "laco": "depth.laco:LaCo",
    "last_layers": "depth.positional:LastLayers",
    "linear_patch": "maps.linear_patch:LinearPatch",
    "llm_pruner": "width.llm_pruner:LLMPruner",
    "magnitude": "depth.magnitude:Magnitude",
    "random_layers": "depth.positional:RandomLayers",
    "replaceme": "maps.replaceme:ReplaceMe",
    "ridge_map": "maps.ridge_map:RidgeMap",
    "shortened_llama_ppl": "depth.shortened_llama:ShortenedLlamaPPL",
    "shortened_llama_taylor": "depth.shortened_llama:ShortenedLlamaTaylor",
    "shortgpt": "depth.shortgpt:ShortGPT",
    "sleb": "depth.sleb:SLEB",
    "slicegpt": "rotation.slicegpt:SliceGPT",
    "streamline": "depth.streamline:Streamline",
    "uidl": "depth.uidl:UIDL",
}
"""Method name -> ``"module:Class"``, the module below ``streamline_bench.methods``."""


def get_method(name: str) -> Method:
    """Return an instance of the named method.

    Raises:
        RecipeError: no such method.
    """
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise RecipeError(
            f"Unknown method '{name}'{suggest(name, METHODS) or ';'} known methods: {known}."
        )
    module, _, attribute = METHODS[name].partition(":")
    method_class: type[Method] = getattr(
        importlib.import_module(f"streamline_bench.methods.{module}"), attribute
    )
    return method_class()


def unread_parts(method: str) -> frozenset[str]:
    """Return the parts of a recipe that some methods read and this one does not.

    Raises:
        RecipeError: no such method.
    """
    return frozenset({"replacement", "training", "reference_quirks"}) - get_method(method).reads


def check_parameters(recipe: Recipe) -> None:
    """Validate ``recipe.parameters`` against the method's own schema.

    Raises:
        RecipeError: unknown method, unknown parameter (with a suggestion), wrong value, or a part
            that the method would ignore.
    """
    for part in sorted(unread_parts(recipe.method)):
        if getattr(recipe, part) != Recipe.model_fields[part].default:
            raise RecipeError(
                f"Recipe '{recipe.name}': method '{recipe.method}' does not read '{part}', which "
                f"is {_told(getattr(recipe, part))}; leave it out, or take a recipe of method "
                "'streamline'."
            )
    schema = get_method(recipe.method).parameters
    try:
        schema.model_validate(recipe.parameters)
    except ValidationError as error:
        told = wrong_value(error, schema, "parameters")
        raise RecipeError(f"Recipe '{recipe.name}' (method '{recipe.method}'): {told}") from None


def _told(part: object) -> str:
    given = part.model_dump(exclude_defaults=True) if isinstance(part, BaseModel) else part
    return repr(given)
