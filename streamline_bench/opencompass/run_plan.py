"""What an OpenCompass run evaluates, and the config that says so to OpenCompass."""

from __future__ import annotations

import pprint
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import StreamlineBenchError
from streamline_bench.opencompass.source import OF_MODEL_CLASS

_CONFIGS = "streamline_bench.opencompass.configs"

DATASETS: Mapping[str, tuple[str, str]] = {
    "bundled": (f"{_CONFIGS}.bundled", "bundled_datasets"),
    "bundled_ppl": (f"{_CONFIGS}.bundled", "bundled_ppl_datasets"),
    "bundled_gen": (f"{_CONFIGS}.bundled", "bundled_gen_datasets"),
    "paper": (f"{_CONFIGS}.paper", "paper_datasets"),
    "classification": (f"{_CONFIGS}.paper", "classification_datasets"),
    "generation": (f"{_CONFIGS}.paper", "generation_datasets"),
    "cmnli": (f"{_CONFIGS}.paper", "cmnli_datasets"),
    "hellaswag": (f"{_CONFIGS}.paper", "hellaswag_datasets"),
    "piqa": (f"{_CONFIGS}.paper", "piqa_datasets"),
    "chid": (f"{_CONFIGS}.paper", "chid_datasets"),
    "wsc": (f"{_CONFIGS}.paper", "WSC_datasets"),
    "commonsense_qa": (f"{_CONFIGS}.paper", "commonsenseqa_datasets"),
    "boolq": (f"{_CONFIGS}.paper", "BoolQ_datasets"),
    "race": (f"{_CONFIGS}.paper", "race_datasets"),
    "mmlu": (f"{_CONFIGS}.paper", "mmlu_datasets"),
    "cmmlu": (f"{_CONFIGS}.paper", "cmmlu_datasets"),
    "c3": (f"{_CONFIGS}.paper", "C3_datasets"),
    "xsum": (f"{_CONFIGS}.paper", "Xsum_datasets"),
    "gsm8k": (f"{_CONFIGS}.paper", "gsm8k_datasets"),
    "strategyqa": (f"{_CONFIGS}.paper", "strategyqa_datasets"),
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

_CLASSES = {
    ("hf", False): "StreamlineModel",
    ("hf", True): "StreamlineChatModel",
    ("vllm", False): "StreamlineVLLM",
    ("vllm", True): "StreamlineVLLMChat",
}
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
        *_limit(plan.limit),
        *(_SHARE_PREFIXES if plan.share_prefixes else []),
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
    for names, variable in (
        (("bundled",), "bundled_summarizer"),
        (("paper", "classification", "generation"), "paper_summarizer"),
    ):
        if any(name in names for name in plan.datasets):
            return [f"    from {_CONFIGS}.summarizers import {variable} as summarizer"]
    return []


def _limit(limit: int | None) -> list[str]:
    if limit is None:
        return []
    return [
        "for each in datasets:",
        f'    each["reader_cfg"]["test_range"] = "[0:{limit}]"',
        "del each",
    ]


def source_keys(plan: RunPlan, model: ModelEntry) -> dict[str, Any]:
    """Return the keys of a model's entry that decide what is loaded.

    They are what :func:`~.source.entry_source` takes, of which the run's record and the classes in
    OpenCompass's tasks both get the checkpoint.
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
    """
    from streamline_bench.compression.recipes import applicable, load_recipe

    model = _absolute(model)
    made = [
        ModelEntry("dense", model)
        if recipe == "dense"
        else ModelEntry(
            _recipe_label(recipe),
            model,
            _absolute(recipe),
            applicable(overrides, load_recipe(recipe)) if overrides else {},
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
