"""Model configs for the stock ``opencompass`` command, one per recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

from streamline_bench.compression.recipes import listed_recipes
from streamline_bench.core.files.staging import atomic_write_text
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import OutputError
from streamline_bench.resources import resource

MODEL = "meta-llama/Llama-2-7b-hf"  # of the LLM-Streamline paper
SPARSITY = 0.25

_CONFIG = '''"""Written by streamline-bench opencompass --write-configs."""

import os

models = [
    dict(
        type="streamline_bench.opencompass.StreamlineModel",
        abbr={name!r},
        path=os.environ.get("STREAMLINE_BENCH_MODEL", {model!r}),{keys}
        max_out_len=256,
        batch_size=32,
        run_cfg=dict(num_gpus=1),
    )
]
'''


def write_configs(folder: Path) -> list[str]:
    """Write a folder for ``opencompass --config-dir``: data sets, summarizers and models.

    ``--models recipe_NAME`` then is a recipe with a quarter of the parameters removed; a recipe
    whose size is a paper's own ratio keeps it. The model is ``$STREAMLINE_BENCH_MODEL``.

    Returns:
        The names of the model configs.

    Raises:
        OutputError: the folder cannot be written.
    """
    recipes = listed_recipes()
    try:
        shutil.copytree(
            resource("tasks") / "opencompass",
            folder,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    except OSError as error:
        raise OutputError(
            f"The folder {folder} cannot be written ({error}); give another one."
        ) from None
    for recipe in recipes:
        atomic_write_text(folder / "models" / f"recipe_{recipe.name}.py", _config(recipe))
    return [f"recipe_{recipe.name}" for recipe in recipes]


def _config(recipe: Recipe) -> str:
    keys = ""
    if recipe.method != "dense":
        keys += f"\n        recipe={recipe.name!r},"
        keys += f"\n        sparsity={SPARSITY}," if recipe.sparsity is not None else ""
    return _CONFIG.format(name=recipe.name, model=MODEL, keys=keys)
