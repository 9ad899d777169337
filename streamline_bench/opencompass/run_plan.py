"""Configs for OpenCompass: one for a run of ours, and one per recipe for its own command."""

from __future__ import annotations

import pprint
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.compression.recipes import listed_recipes, read_overrides
from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.machine.environment import resource
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import OutputError, RecipeError, StreamlineBenchError

_CONFIGS = "streamline_bench.opencompass.configs"

_BUNDLED = "bundled bundled_ppl bundled_gen".split()
_PAPER = (
    "paper classification generation cmnli hellaswag piqa chid wsc commonsense_qa boolq race mmlu "
    "cmmlu c3 xsum gsm8k strategyqa"
).split()
_VARIABLES = {"wsc": "WSC", "commonsense_qa": "commonsenseqa", "boolq": "BoolQ", "c3": "C3",
              "xsum": "Xsum"}  # fmt: skip
DATASETS: Mapping[str, tuple[str, str]] = {
    name: (f"{_CONFIGS}.{module}", f"{_VARIABLES.get(name, name)}_datasets")
    for module, names in (("bundled", _BUNDLED), ("paper", _PAPER))
    for name in names
}
"""Name on the command line -> (config module, variable)."""

_SHARE_PREFIXES = [
    "for each in datasets:",
    '    inferencer = each["infer_cfg"]["inferencer"]',
    # The class itself, its name or its path: which one, mmengine decides.
    """    if str(inferencer["type"]).rstrip("'>").split(".")[-1] == "PPLInferencer":""",
    '        inferencer["type"] = '
    '"streamline_bench.opencompass.inferencers.SharedPrefixPPLInferencer"',
    "del each, inferencer",
]

_EACH_QUESTION = [
    "for each in datasets:",
    '    inferencer = str(each["infer_cfg"]["inferencer"]["type"])',
    """    if inferencer.rstrip("'>").split(".")[-1] == "GenInferencer":""",
    '        each["eval_cfg"] = {**each["eval_cfg"], "evaluator": dict(',
    '            type="streamline_bench.opencompass.question_scores.EachQuestion",',
    '            evaluator=each["eval_cfg"]["evaluator"])}',
    "del each, inferencer",
]

_CLASSES = {
    ("hf", False): "StreamlineModel",
    ("hf", True): "StreamlineChatModel",
    ("vllm", False): "StreamlineVLLM",
    ("vllm", True): "StreamlineVLLMChat",
}
OF_MODEL_CLASS = (
    "max_seq_len tokenizer_path tokenizer_kwargs tokenizer_only meta_template generation_kwargs "
    "pad_token_id stop_words"
).split()
"""Keys of a model entry that :class:`~.models.StreamlineModel` takes for itself."""

_LABEL = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
_REFERENCE = re.compile(r"^[A-Za-z_][\w.]*\.[\w.]+:[A-Za-z_]\w*$")


@dataclass(frozen=True)
class ModelEntry:
    """One model of a run.

    Attributes:
        label: names its row, and its folder in OpenCompass's output.
        path: folder or hub id.
        recipe: name or file; None: as it is.
        overrides: keys of the recipe.
    """

    label: str
    path: str
    recipe: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _LABEL.match(self.label):
            raise StreamlineBenchError(
                f"'{self.label}' cannot name a model: letters, digits and . _ + - only; "
                "give LABEL=PATH."
            )


@dataclass(frozen=True)
class RunPlan:
    """A whole run.

    Attributes:
        models: the first one is what the others are compared with.
        datasets: names of :data:`DATASETS`, or ``package.module:variable`` of any config.
        options: further keys of every model's entry (``device``, ``dtype``, ``model_kwargs``).
        engine: ``hf`` or ``vllm``.
        chat: use the chat template.
        limit: questions per data set, None for all.
        workers: tasks at once; data sets are split into as many parts.
        gpus: accelerators per task.
        batch_size: prompts handed to the model at once.
        max_out_len: new tokens per answer where the data set does not say.
        share_prefixes: score the choices of a question together (:mod:`.inferencers`).
    """

    models: tuple[ModelEntry, ...]
    datasets: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "hf"
    chat: bool = False
    limit: int | None = None
    workers: int = 1
    gpus: int = 0
    batch_size: int = 64
    max_out_len: int = 256
    share_prefixes: bool = True

    def __post_init__(self) -> None:
        labels = [entry.label for entry in self.models]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise StreamlineBenchError(
                f"Two models are called '{min(twice)}'; name one of them by LABEL=PATH."
            )
        for name in self.datasets:
            _reference(name)

    def as_data(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return asdict(self)


def _reference(name: str) -> tuple[str, str]:
    if name in DATASETS:
        return DATASETS[name]
    if not _REFERENCE.match(name):
        raise StreamlineBenchError(
            f"There are no data sets called '{name}'{suggest_or_list(name, DATASETS)} "
            "(or give package.module:variable of a config)."
        )
    module, variable = name.split(":")
    return module, variable


def config_text(plan: RunPlan) -> str:
    """Return the config, as Python source for ``opencompass CONFIG``."""
    references = [_reference(name) for name in plan.datasets]
    imports = [
        f"    from {module} import {variable} as datasets_{number}"
        for number, (module, variable) in enumerate(references)
    ]
    lists = ", ".join(f"*datasets_{number}" for number in range(len(references)))
    limit = f'    each["reader_cfg"]["test_range"] = "[0:{plan.limit}]"'
    limited = ["for each in datasets:", limit, "del each"]
    lines = [
        '"""Written by streamline-bench opencompass."""',
        "",
        "from mmengine.config import read_base",
        "from opencompass.partitioners import NaivePartitioner, NumWorkerPartitioner",
        "from opencompass.runners import LocalRunner",
        "from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask",
        "",
        "with read_base():",
        *imports,
        *_summarizer_import(plan),
        "",
        f"datasets = [{lists}]",
        *([] if plan.limit is None else limited),
        *(_SHARE_PREFIXES if plan.share_prefixes else []),
        *_EACH_QUESTION,
        "",
        "models = "
        + pprint.pformat([_entry(plan, each) for each in plan.models], sort_dicts=False),
        "",
        "infer = dict(",
        f"    partitioner=dict(type=NumWorkerPartitioner, num_worker={plan.workers}),",
        f"    runner=dict(type=LocalRunner, max_num_workers={plan.workers}, "
        "task=dict(type=OpenICLInferTask)),",
        ")",
        "eval = dict(",
        "    partitioner=dict(type=NaivePartitioner, n=1000),",
        "    runner=dict(type=LocalRunner, max_num_workers=1, task=dict(type=OpenICLEvalTask)),",
        ")",
    ]
    return "\n".join(lines) + "\n"


def _summarizer_import(plan: RunPlan) -> list[str]:
    whole = {
        "bundled": "bundled",
        **dict.fromkeys(("paper", "classification", "generation"), "paper"),
    }
    names = sorted(whole[name] for name in plan.datasets if name in whole)
    return [
        f"    from {_CONFIGS}.summarizers import {name}_summarizer as summarizer"
        for name in names[:1]
    ]


def source_keys(plan: RunPlan, model: ModelEntry) -> dict[str, Any]:
    """Return the keys of a model's entry that decide what is loaded.

    The run's record and the classes in OpenCompass's tasks both get the checkpoint from them, by
    :func:`~.source.entry_source`.
    """
    dotted = {key: value for key, value in model.overrides.items() if "." in key}
    plain = {key: value for key, value in model.overrides.items() if "." not in key}
    keys: dict[str, Any] = {"path": model.path}
    if model.recipe is not None:
        keys.update(recipe=model.recipe, **plain)
    if dotted:
        keys["overrides"] = dotted
    return keys | {key: value for key, value in plan.options.items() if key not in OF_MODEL_CLASS}


def _entry(plan: RunPlan, model: ModelEntry) -> dict[str, Any]:
    return {
        "type": f"streamline_bench.opencompass.{_CLASSES[plan.engine, plan.chat]}",
        "abbr": model.label,
        **source_keys(plan, model),
        **{key: value for key, value in plan.options.items() if key in OF_MODEL_CLASS},
        "max_out_len": plan.max_out_len,
        "batch_size": plan.batch_size,
        "run_cfg": {"num_gpus": plan.gpus},
    }


def entries(
    model: str,
    recipes: Sequence[str],
    overrides: Mapping[str, Any],
    further: Sequence[tuple[str, str]] = (),
) -> tuple[ModelEntry, ...]:
    """Return the entries of one model under several recipes, and of further checkpoints.

    Args:
        recipes: names; ``dense`` is the model as it is.
        overrides: keys of recipes; each recipe gets those that it has a use for.
        further: (label, path) of checkpoints evaluated as they are.

    Raises:
        RecipeError: an unknown recipe or key, or a key that no recipe has a use for.
    """
    own = {
        recipe: read_overrides(recipe, overrides) if overrides else {}
        for recipe in recipes
        if recipe != "dense"
    }
    unread = [key for key in overrides if not any(key in each for each in own.values())]
    if unread:
        raise RecipeError(
            f"'{unread[0]}' has no effect, because none of the recipes ({', '.join(recipes)}) "
            "reads it; leave it out, or add a recipe that reads it."
        )
    model = _absolute(model)
    made = [
        ModelEntry("dense", model)
        if recipe == "dense"
        else ModelEntry(
            _recipe_label(recipe),
            model,
            _absolute(recipe),
            own[recipe],
        )
        for recipe in recipes
    ]
    return (*made, *(ModelEntry(label, _absolute(path)) for label, path in further))


def _absolute(name: str) -> str:
    """Return the absolute path of what exists, and names of recipes and hub ids as they are.

    OpenCompass is started in a folder of its own.
    """
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _recipe_label(recipe: str) -> str:
    return recipe.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".yaml")


_RECIPE_CONFIG = '''"""Written by streamline-bench opencompass --write-configs."""

import os

models = [
    dict(
        type="streamline_bench.opencompass.StreamlineModel",
        abbr={name!r},
        path=os.environ.get("STREAMLINE_BENCH_MODEL", "meta-llama/Llama-2-7b-hf"),{keys}
        max_out_len=256,
        batch_size=32,
        run_cfg=dict(num_gpus=1),
    )
]
'''


def write_configs(folder: Path) -> list[str]:
    """Write a folder for ``opencompass --config-dir``: data sets, summarizers and models.

    ``--models recipe_NAME`` then is a recipe with a quarter of the parameters removed; a recipe
    whose size is a paper's own ratio keeps it. The model is ``$STREAMLINE_BENCH_MODEL``, by default
    that of the LLM-Streamline paper.

    Returns:
        The names of the model configs.

    Raises:
        OutputError: the folder cannot be written.
    """
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
    texts = {f"recipe_{recipe.name}": _recipe_config(recipe) for recipe in listed_recipes()}
    for name, text in texts.items():
        atomic_write_text(folder / "models" / f"{name}.py", text)
    return list(texts)


def _recipe_config(recipe: Recipe) -> str:
    keys = ""
    if recipe.method != "dense":
        keys += f"\n        recipe={recipe.name!r},"
        keys += f"\n        sparsity={recipe.sparsity:g}," if recipe.sparsity is not None else ""
    return _RECIPE_CONFIG.format(name=recipe.name, keys=keys)
