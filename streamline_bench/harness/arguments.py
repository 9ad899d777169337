"""Sorts ``--model_args`` into those of the harness, those of a recipe, and mistakes.

The stock class hands what it does not know to transformers, which may ignore it; a mistyped
``sparisty=0.5`` would then evaluate the dense model. Here every key must be known.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.core.checkpoint.folder import check_name
from streamline_bench.core.machine.environment import bundled_model, is_bundled
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import RecipeError, StreamlineBenchError, library_errors
from streamline_bench.modeling.vllm.package import require_vllm

_TAKEN_FROM_KEYWORDS = (
    "attn_implementation experts_implementation device_map max_memory offload_buffers "
    "low_cpu_mem_usage variant proxies code_revision kernel_config use_kernels torch_dtype "
    "key_mapping quantization_config"
).split()
"""What ``from_pretrained`` of transformers takes without naming it in its signature."""

OWN = ("recipe", "cache", "placement")


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of one model.

    Attributes:
        harness: for the harness's class.
        recipe: name or path of the recipe; None: evaluate the model as it is.
        overrides: for :func:`streamline_bench.compression.load_recipe`.
        cache: folder of compressed models; None: the default one.
        placement: of the source's weights while it is compressed, as for ``compress``.
    """

    harness: dict[str, Any]
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None
    placement: Any = "auto"


def check_arguments(model: str, arguments: Mapping[str, Any]) -> None:
    """Refuse wrong arguments of our models before the harness and its tasks are loaded.

    transformers is imported only where an argument may be its own.

    Raises:
        CheckpointError: the model's folder does not exist.
        MissingDependencyError: the model runs in vLLM, which is not installed.
        RecipeError: an unknown key, or one that does not go with the recipe.
    """
    from streamline_bench.compression.recipes import load_recipe

    if isinstance(pretrained := arguments.get("pretrained"), str):
        check_name(pretrained)
    if model != "streamline":
        require_vllm(f"--model {model}")
        own = _parameters_in_source("vllm_causallms", "VLLM")
        engine = _arguments_of_the_engine()
        if engine:  # else only vLLM itself knows their names
            sort_arguments(arguments, own, [*engine, "device"])
        return
    own = _parameters_in_source("huggingface", "HFLM")
    plain = {*own, *_recipe_keys(), *OWN, *_TAKEN_FROM_KEYWORDS}
    foreign = [key for key in arguments if key not in plain and "." not in key]
    ask = bool(foreign) and _may_be_of_transformers(foreign, arguments)
    found = sort_arguments(arguments, own, None if ask else _TAKEN_FROM_KEYWORDS)
    if found.recipe is not None:
        load_recipe(found.recipe, found.overrides, check=False)


def parameters_of(base: type) -> list[str]:
    """Return the names of the arguments that a class of the harness takes."""
    parameters = inspect.signature(base).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


def _parameters_in_source(module: str, name: str) -> list[str]:
    """Return those of a model of the harness, read from its file: importing it takes seconds."""
    harness = importlib.util.find_spec("lm_eval")
    folder = Path(str(harness.origin)).parent if harness is not None else Path()
    tree = ast.parse((folder / "models" / f"{module}.py").read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    model = next(each for each in classes if each.name == name)
    methods = (node for node in model.body if isinstance(node, ast.FunctionDef))
    made = next(each.args for each in methods if each.name == "__init__")
    return [each.arg for each in (*made.args[1:], *made.kwonlyargs)]


def _arguments_of_the_engine() -> list[str]:
    """Return the fields of vLLM's ``EngineArgs``, read from its file; none where it has none."""
    package = importlib.util.find_spec("vllm")
    home = Path(str(package.origin)).parent if package is not None else Path()
    source = home / "engine" / "arg_utils.py"
    if not source.is_file():
        return []
    classes = (n for n in ast.parse(source.read_text("utf-8")).body if isinstance(n, ast.ClassDef))
    fields = [n for each in classes if each.name == "EngineArgs" for n in each.body]
    return [
        node.target.id
        for node in fields
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _may_be_of_transformers(keys: list[str], arguments: Mapping[str, Any]) -> bool:
    """Whether the sources of transformers' configs, or the model's own files, name all the keys.

    A search takes 0.1 s, the import of transformers takes several.
    """
    config = _config_file(str(arguments.get("pretrained")), arguments.get("revision"))
    own = [] if config is None else [config, *config.parent.glob("*.py")]
    package = importlib.util.find_spec("transformers")
    home = Path(str(package.origin)).parent if package is not None else Path()
    sources = [
        *home.glob("models/*/configuration_*.py"), *home.glob("*.py"),
        home / "utils" / "quantization_config.py", *Path(__file__).parents[1].glob("modeling/*.py"),
    ]  # fmt: skip
    text = "\n".join(path.read_text("utf-8", "replace") for path in (*own, *sources))
    return all(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text) for key in keys)


def _config_file(pretrained: str, revision: Any) -> Path | None:
    """The config of a model; None where there is none, so that the model cannot be loaded."""
    if is_bundled(pretrained):
        return bundled_model() / "config.json"
    local = Path(pretrained) / "config.json"
    if local.is_file():
        return local
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(pretrained, "config.json", revision=revision))
    except (OSError, ValueError):
        return None


def sort_arguments(
    arguments: Mapping[str, Any], own: Iterable[str], beyond: Iterable[str] | None = None
) -> ModelArguments:
    """Sort keyword arguments.

    Args:
        own: names of the arguments of the harness's class (:func:`parameters_of`).
        beyond: what that class passes to its engine; keys of a recipe have priority. None: the
            engine is ``from_pretrained`` of transformers.

    Raises:
        RecipeError: an unknown key, one that would be without effect, or a recipe's key without
            ``recipe=``.
    """
    known = [*own, *(_of_from_pretrained() if beyond is None else beyond)]
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
        elif beyond is None and key in _config_entries(arguments):
            harness[key] = value
        else:
            everything = [*known, *recipe_keys, *OWN]
            raise RecipeError(
                f"Unknown model argument '{key}={value}'"
                f"{suggest(key, everything) or '; see the documentation of --model streamline.'}"
            )
    if "device_map" in harness and not harness.get("parallelize"):
        raise RecipeError(
            "The harness follows device_map only together with parallelize=True; add it, or leave "
            "device_map out."
        )
    recipe = arguments.get("recipe")
    if recipe is None and overrides:
        key = next(iter(overrides))
        raise RecipeError(
            f"'{key}={overrides[key]}' is part of a recipe, and no recipe was given; "
            "add recipe=streamline (see: streamline-bench recipes)."
        )
    if recipe is None and "placement" in arguments:
        raise RecipeError(
            f"'placement={arguments['placement']}' is about compressing, and no recipe was given; "
            "add recipe=streamline, or leave it out."
        )
    cache = arguments.get("cache")
    return ModelArguments(
        harness, None if recipe is None else str(recipe), overrides, cache and str(cache),
        arguments.get("placement", "auto"),
    )  # fmt: skip


def _of_from_pretrained() -> list[str]:
    """What ``from_pretrained`` takes, without what the harness itself gives it."""
    from transformers import BitsAndBytesConfig, PreTrainedModel

    named = inspect.signature(PreTrainedModel.from_pretrained).parameters.values()
    own = [p.name for p in named if p.kind is p.KEYWORD_ONLY or p.name == "cache_dir"]
    # Those of quantisation are collected from the keyword arguments of their config.
    return [*own, *parameters_of(BitsAndBytesConfig), *_TAKEN_FROM_KEYWORDS]


def _config_entries(arguments: Mapping[str, Any]) -> set[str]:
    """The entries of the model's config, which ``from_pretrained`` changes when they are given."""
    from transformers import AutoConfig

    from streamline_bench.modeling import register

    register()
    name = str(arguments.get("pretrained"))
    folder = bundled_model() if is_bundled(name) else name
    try:
        with library_errors("The config cannot be read"):
            config = AutoConfig.from_pretrained(folder, revision=arguments.get("revision"))
    except StreamlineBenchError:
        return set()  # the loading of the model says what is wrong with it
    return set(config.to_dict())


def _recipe_keys() -> list[str]:
    from streamline_bench.compression.recipes import OWN_KEYS, SHORT_KEYS

    return [*OWN_KEYS, *SHORT_KEYS, "training"]


def _override(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {f"{key}.{inner}": each for inner, each in value.items()}
    if key in ("replacement", "recovery") and value is None:
        return {key: "none"}  # The harness reads the word none as Python's None.
    return {key: value}
