"""Sorts ``--model_args`` into those of the harness, those of a recipe, and mistakes.

The stock class hands what it does not know to transformers, which may ignore it; a mistyped
``sparisty=0.5`` would then evaluate the dense model. Here every key must be known.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import RecipeError

__all__ = ["ModelArguments", "sort_arguments"]

FROM_PRETRAINED = (
    "attn_implementation experts_implementation device_map max_memory offload_buffers "
    "low_cpu_mem_usage variant use_safetensors weights_only token cache_dir local_files_only "
    "force_download proxies code_revision kernel_config use_kernels torch_dtype key_mapping "
    "load_in_8bit load_in_4bit bnb_4bit_compute_dtype bnb_4bit_quant_type "
    "bnb_4bit_use_double_quant bnb_4bit_quant_storage llm_int8_threshold "
    "llm_int8_enable_fp32_cpu_offload llm_int8_skip_modules quantization_config"
).split()
"""What ``from_pretrained`` of transformers takes beyond the parameters of HFLM."""

OWN = ("recipe", "cache")


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of one model.

    Attributes:
        harness: for the harness's class.
        recipe: name or path of the recipe; None: evaluate the model as it is.
        overrides: for :func:`streamline_bench.compression.load_recipe`.
        cache: folder of compressed models; None: the default one.
    """

    harness: dict[str, Any]
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None


def sort_arguments(
    arguments: Mapping[str, Any], base: type, beyond: Iterable[str] = FROM_PRETRAINED
) -> ModelArguments:
    """Sort keyword arguments.

    Args:
        base: the harness class whose ``__init__`` names its own arguments.
        beyond: what that class hands on to its engine; a recipe's keys go before.

    Raises:
        RecipeError: an unknown key, or a recipe's key without ``recipe=``.
    """
    known = [*_parameters(base), *beyond]
    recipe_keys = _recipe_keys()
    has_recipe = arguments.get("recipe") is not None
    harness: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in OWN:
            continue
        if key in known and not (has_recipe and key in recipe_keys):
            harness[key] = value
        elif key in recipe_keys:
            overrides.update(_override(key, value))
        elif key.split(".")[0] in Recipe.model_fields and "." in key:
            overrides[key] = value
        else:
            everything = [*known, *recipe_keys, *OWN]
            raise RecipeError(
                f"Unknown model argument '{key}={value}'"
                f"{suggest(key, everything) or '; see the documentation of --model streamline.'}"
            )
    recipe = arguments.get("recipe")
    if recipe is None and overrides:
        key = next(iter(overrides))
        raise RecipeError(
            f"'{key}={overrides[key]}' is part of a recipe, and none is given; "
            "add recipe=streamline (see: streamline-bench recipes)."
        )
    cache = arguments.get("cache")
    return ModelArguments(
        harness, None if recipe is None else str(recipe), overrides, cache and str(cache)
    )


def _parameters(base: type) -> list[str]:
    parameters = inspect.signature(base).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


def _recipe_keys() -> list[str]:
    from streamline_bench.compression.recipes import OWN_KEYS, SHORT_KEYS

    return [*OWN_KEYS, *SHORT_KEYS, "training"]


def _override(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {f"{key}.{inner}": each for inner, each in value.items()}
    if key in ("replacement", "recovery") and value is None:
        return {key: "none"}  # The harness reads the word none as Python's None.
    return {key: value}
