"""What the harness can be told, per comparison or per task, under its own names.

A plan's ``harness:`` section, and ``--config``, take the YAML file of ``lm_eval --config``:
:func:`unfolded` turns it into keys of a request.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from streamline_bench.core.files import read_yaml_mapping
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import RecipeError

Engine = Literal["hf", "vllm"]
"""``hf``: ``--model streamline``, which is transformers; ``vllm``: ``--model streamline-vllm``."""

DocumentIds = tuple[int, ...]


class HarnessOptions(Frozen):
    """Options of the harness; each has the meaning that it has there.

    Attributes:
        engine: what computes the answers.
        fewshot_as_multiturn: examples as turns of the conversation; None: with a chat template.
        gen_kwargs: laid over the generation settings of each task.
        model_args: further arguments of the harness's model, for every row.
        max_batch_size: limit of ``batch_size: auto``.
        seed: of random, numpy, torch and the choice of examples.
        metadata: what some tasks read, such as RULER's ``max_seq_lengths``.
        samples: task -> documents that are asked, by their place in the data, from 0.
        confirm_run_unsafe_code: tasks may run code that a model wrote.
    """

    engine: Engine = "hf"
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    model_args: dict[str, Any] = Field(default_factory=dict)
    max_batch_size: int | None = Field(None, ge=1)
    seed: tuple[int | None, int | None, int | None, int | None] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    samples: dict[str, DocumentIds] = Field(default_factory=dict)
    confirm_run_unsafe_code: bool = False

    @field_validator("seed", mode="before")
    @classmethod
    def _four(cls, seed: Any) -> Any:
        """One seed is that of all four, three leave the last one at the harness's default."""
        if isinstance(seed, bool) or not isinstance(seed, int | list | tuple):
            return seed
        seeds = [seed] if isinstance(seed, int) else [*seed]
        if len(seeds) not in (1, 3, 4):
            raise ValueError("give one seed, or those of random, numpy, torch and the examples")
        return [*seeds, 1234] if len(seeds) == 3 else seeds * (4 // len(seeds))

    @field_validator("samples", mode="before")
    @classmethod
    def _sorted(cls, samples: Any) -> Any:
        """In order: the harness numbers documents in the order of the data, whatever it is told."""
        if not isinstance(samples, Mapping):
            return samples
        return {task: _document_ids(str(task), ids) for task, ids in samples.items()}

    @model_validator(mode="after")
    def _turns(self) -> HarnessOptions:
        if self.fewshot_as_multiturn and getattr(self, "apply_chat_template", True) is False:
            raise ValueError("fewshot_as_multiturn needs apply_chat_template, as in the harness")
        if self.samples and getattr(self, "limit", None) is not None:
            raise ValueError("samples and limit exclude each other, as in the harness")
        return self


def _document_ids(task: str, ids: Any) -> list[int]:
    whole = isinstance(ids, list | tuple) and all(type(each) is int and each >= 0 for each in ids)
    if not whole or not ids:
        raise ValueError(f"samples of '{task}' must be a list of numbers from 0, such as [0, 1, 2]")
    found = sorted(ids)
    twice = next((each for each, other in itertools.pairwise(found) if each == other), None)
    if twice is not None:
        raise ValueError(f"samples of '{task}' have document {twice} twice")
    return found


class TaskRequest(HarnessOptions):
    """A task with options of its own; those that it does not name are those of the comparison.

    Attributes:
        task: a task or group.
        samples: also a list of documents, of this task.
    """

    task: str = Field(min_length=1)
    limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    num_fewshot: int | None = Field(None, ge=0)
    apply_chat_template: bool | str | None = None
    batch_size: str | None = Field(None, pattern=r"^([1-9]\d*|auto(:\d+)?)$")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, payload: Any) -> Any:
        if isinstance(payload, Mapping) and isinstance(payload.get("samples"), list | tuple):
            return {**payload, "samples": {str(payload.get("task")): payload["samples"]}}
        return payload

    @field_validator("batch_size", mode="before")
    @classmethod
    def _text(cls, size: Any) -> Any:
        return str(size) if type(size) is int else size

    def laid_over(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of this task: its own over common ones; mappings key by key."""
        own = {name: getattr(self, name) for name in self.model_fields_set - {"task"}}
        mappings = {
            name: {**common[name], **value}
            for name, value in own.items()
            if isinstance(value, dict) and name != "samples"
        }
        return {**common, **own, **mappings}


_SAME = (
    "num_fewshot max_batch_size device limit apply_chat_template fewshot_as_multiturn "
    "system_instruction seed trust_remote_code confirm_run_unsafe_code engine"
).split()
_MAPPINGS = ("model_args", "gen_kwargs", "metadata")
_ENGINES: Mapping[str, Engine] = {
    **dict.fromkeys(("hf", "huggingface", "hf-auto", "streamline"), "hf"),
    **dict.fromkeys(("vllm", "streamline-vllm"), "vllm"),
}
_OF_THE_COMPARISON = {
    "output_path": "give the run folder with --output",
    "use_cache": "a run folder keeps every answer",
    "cache_requests": "requests are built once for all rows",
    "predict_only": "rows are compared by their metrics",
    "check_integrity": "call lm_eval validate",
    "config": "a configuration cannot name another one",
    **dict.fromkeys(
        ("write_out", "show_config", "verbosity", "wandb_args", "wandb_config_args",
         "trackio_args", "hf_hub_log_args"),
        "each job's log and results are in the run folder",
    ),
}  # fmt: skip
"""Keys of the harness that a comparison has no use for, and why."""

_MODEL_KEYS = ("revision", "dtype", "trust_remote_code")
_NOT_OF_ROWS = {
    "tokenizer": "a row with 'checkpoint' may name one",
    "recipe": "give recipes with --recipes",
    "cache": "the run folder keeps the checkpoints",
    "batch_size": "give batch_size itself",
    "max_batch_size": "give max_batch_size itself",
    "device": "give device itself",
}

SECTION_KEYS = (*_SAME, *_MAPPINGS, "model", "tasks", "batch_size", "include_path", "samples",
                "log_samples", *_OF_THE_COMPARISON)  # fmt: skip


def unfolded(payload: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the keys of a request with those of its ``harness`` section in their places.

    Raises:
        RecipeError: an unknown key, one of no use in a comparison, or one that the payload has
            itself.
    """
    own = {key: value for key, value in payload.items() if key != "harness"}
    section = payload.get("harness")
    if section is None:
        return own
    found = harness_keys(section, origin)
    twice = next((key for key in found if own.get(key) not in (None, found[key])), None)
    if twice is not None:
        raise RecipeError(
            f"{origin}: '{twice}' stands in the plan and in its harness section; leave one out."
        )
    return {**own, **found}


def harness_keys(section: Any, origin: str) -> dict[str, Any]:
    """Return the keys of a request that a configuration of ``lm_eval`` stands for.

    Args:
        section: the mapping, or the path of the YAML file.

    Raises:
        RecipeError: as :func:`unfolded`, or no such file, or not YAML.
    """
    if isinstance(section, str | Path):
        origin = str(section)
        section = read_yaml_mapping(
            Path(section).expanduser(), "a configuration of lm_eval, such as 'num_fewshot: 5'"
        )
    if not isinstance(section, Mapping):
        raise RecipeError(
            f"{origin}: 'harness' is {section!r}; give a mapping such as {{num_fewshot: 5}}, or "
            "the path of a YAML file of lm_eval --config."
        )
    for key, value in section.items():
        if key not in SECTION_KEYS:
            raise RecipeError(
                f"{origin}: unknown key 'harness.{key}'{suggest_or_list(str(key), SECTION_KEYS)}"
            )
        if value and key in _OF_THE_COMPARISON:
            raise RecipeError(
                f"{origin}: 'harness.{key}' has no place in a comparison; "
                f"{_OF_THE_COMPARISON[key]}, so leave it out."
            )
    found = {key: section[key] for key in _SAME if section.get(key) is not None}
    for key in _MAPPINGS:
        if section.get(key):
            found[key] = mapping_of(section[key], f"{origin}: 'harness.{key}'")
    return found | _translated(section, found, origin)


def _translated(section: Mapping[str, Any], found: dict[str, Any], origin: str) -> dict[str, Any]:
    """The keys that a request writes in another way."""
    made: dict[str, Any] = {}
    if section.get("log_samples") is False:
        raise RecipeError(
            f"{origin}: 'harness.log_samples' is false, and answers are compared one by one; leave "
            "it out."
        )
    if section.get("model") is not None:
        made["engine"] = engine_of(str(section["model"]), origin)
    if section.get("batch_size") is not None:
        made["batch_size"] = str(section["batch_size"])
    for key in ("tasks", "include_path"):
        if section.get(key):
            made[key] = _listed(section[key])
    if section.get("samples"):
        made["samples"] = samples_of(section["samples"], f"{origin}: 'harness.samples'")
    arguments = dict(found.get("model_args") or {})
    if "pretrained" in arguments:
        made["model"] = arguments.pop("pretrained")
    made |= {key: arguments.pop(key) for key in _MODEL_KEYS if key in arguments}
    if "model_args" in found:
        made["model_args"] = arguments
    return made


def engine_of(model: str, origin: str) -> Engine:
    """Return the engine behind a ``--model`` of the harness (RecipeError: none of ours)."""
    if model not in _ENGINES:
        raise RecipeError(
            f"{origin}: the model '{model}' of lm_eval cannot score what was compressed; known: "
            f"{', '.join(_ENGINES)}."
        )
    return _ENGINES[model]


def mapping_of(value: Any, where: str) -> dict[str, Any]:
    """Return a mapping, also where it is written as ``key=value,key=value`` (RecipeError: none)."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            return dict(json.loads(value))
        if isinstance(value, str) and all("=" in part for part in value.split(",")):
            from lm_eval.utils import simple_parse_args_string

            return dict(simple_parse_args_string(value))
    except ValueError:
        pass
    raise RecipeError(f"{where} is {value!r}; give a mapping, or key=value,key=value.")


def samples_of(value: Any, where: str) -> dict[str, Any]:
    """Return task -> document ids, from a mapping, JSON or the path of a JSON file.

    RecipeError: neither of these.
    """
    text = value
    try:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            text = Path(value).expanduser().read_text(encoding="utf-8")
        found = json.loads(text) if isinstance(text, str) else text
        if isinstance(found, Mapping):
            return dict(found)
    except (OSError, ValueError):
        pass
    raise RecipeError(
        f"{where} is {value!r}; give documents by task, such as {{piqa: [0, 1, 2]}}, or a JSON "
        "file of that."
    )


def _listed(value: Any) -> Any:
    if not isinstance(value, str):
        return list(value) if isinstance(value, list | tuple) else value
    return [part.strip() for part in value.split(",") if part.strip()]


def with_harness_options(payload: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a request with ``[TASK:]KEY=VALUE`` laid over them.

    Values are YAML. ``gen_kwargs.temperature`` is a key of a mapping.

    Raises:
        RecipeError: another form, or an unknown key.
    """
    own = dict(payload)
    tasks = list(own.get("tasks") or [])
    for text in given:
        task, key, value = _assignment(text)
        if not task:
            found = harness_keys(_nested(key, value), f"--harness {text}")
            own = _over(own, found)
            continue
        place = next((i for i, each in enumerate(tasks) if _name(each) == task), len(tasks))
        before = tasks[place] if place < len(tasks) and isinstance(tasks[place], Mapping) else {}
        tasks[place : place + 1] = [_over({"task": task, **before}, _nested(key, value))]
        own["tasks"] = tasks
    return own


def _assignment(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    task, _, key = name.rpartition(":")
    if not equals or not key.strip():
        raise RecipeError(
            f"--harness '{text}' is not [TASK:]KEY=VALUE, such as num_fewshot=5 or gsm8k:limit=20."
        )
    try:
        return task.strip(), key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--harness '{text}': '{value}' is not a YAML value; quote it.") from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    outer, _, inner = key.partition(".")
    return {outer: {inner: value} if inner else value}


def _over(own: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Later keys over earlier ones; of two mappings, key by key."""
    both = {
        key: {**own[key], **value}
        for key, value in found.items()
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping)
    }
    return {**own, **found, **both}


def _name(task: Any) -> Any:
    return task.get("task") if isinstance(task, Mapping) else task


def check_model_arguments(arguments: Mapping[str, Any], engine: Engine, model: str) -> None:
    """Refuse arguments of the harness's model that it does not know, or that are not for all rows.

    Args:
        model: folder or hub id, whose config may name some.

    Raises:
        RecipeError: naming the argument, and the nearest known one.
        MissingDependencyError: the engine is not installed.
    """
    from streamline_bench.harness.arguments import check_arguments

    named = {"pretrained": "give the model itself", **_NOT_OF_ROWS}
    for key in arguments:
        if key in _MODEL_KEYS:
            raise RecipeError(f"model_args has '{key}'; give '{key}' itself.")
        if key in named:
            raise RecipeError(f"model_args has '{key}', which is not for all rows; {named[key]}.")
    if arguments.get("enable_thinking") and not arguments.get("think_end_token"):
        raise RecipeError(
            "model_args has enable_thinking without think_end_token, which ends the thinking; give "
            "both, such as think_end_token: </think>."
        )
    check_arguments(
        "streamline-vllm" if engine == "vllm" else "streamline", {"pretrained": model, **arguments}
    )


def harness_options(evaluation: Any) -> Iterator[str]:
    """Yield what the harness's command line says of the options of a set of questions."""
    plain: Sequence[tuple[str, Any]] = (
        ("--limit", evaluation.limit),
        ("--num_fewshot", evaluation.num_fewshot),
        ("--max_batch_size", evaluation.max_batch_size),
        ("--system_instruction", evaluation.system_instruction),
    )
    for option, value in plain:
        if value is not None:
            whole = isinstance(value, float) and value.is_integer()
            yield from (option, str(int(value) if whole else value))
    if evaluation.apply_chat_template:
        named = evaluation.apply_chat_template
        yield from ("--apply_chat_template", *([] if named is True else [named]))
    if evaluation.fewshot_as_multiturn is not None:
        yield from ("--fewshot_as_multiturn", str(evaluation.fewshot_as_multiturn).lower())
    for option in ("gen_kwargs", "metadata", "samples"):
        if value := getattr(evaluation, option):
            yield from (f"--{option}", json.dumps(value))
    if evaluation.seed is not None:
        yield from ("--seed", ",".join(map(str, evaluation.seed)))
    if evaluation.confirm_run_unsafe_code:
        yield "--confirm_run_unsafe_code"
