"""What a user asks for: a model, rows, tasks and options; also the schema of a ``--plan`` file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from streamline_bench.core.files import read_yaml_mapping
from streamline_bench.core.machine.environment import resource
from streamline_bench.core.recipe.schema import Frozen, PublishedResult
from streamline_bench.core.recipe.validation import suggest, suggest_or_list
from streamline_bench.errors import RecipeError
from streamline_bench.runs.planning.harness_options import (
    Engine,
    HarnessOptions,
    TaskRequest,
    unfolded,
)

ThroughputEngine = Literal["none", "vllm", "hf", "serve"]
NoiseEngine = Engine


AXES: tuple[str, ...] = ("sparsity", "n_layers", "seed", "calibration")
"""Recipe keys of which a row, or all rows, may be given several values: each is a row."""


class RowRequest(Frozen):
    """One row: a recipe by name or path, with values of its own, or a checkpoint made elsewhere.

    Attributes:
        label: name of the row and of its folder; None: the recipe's name.
        overrides: recipe keys of this row alone; they win over those of the request. A list for
            one of :data:`AXES` gives a row for each value.
        model: the dense model of this row, one of the request's; None: a row for each.
        checkpoint: folder or hub id, in place of a recipe.
        revision, dtype, trust_remote_code, tokenizer: of the checkpoint.
        model_args: further arguments of the harness's model, for the checkpoint.
        reference: label of the dense row that it is compared with; None: the model that it comes
            from, the first one for a checkpoint.
        published: numbers of the literature for this very model.
    """

    recipe: str | None = Field(None, min_length=1)
    label: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict, alias="set")
    model: str | None = None
    checkpoint: str | None = Field(None, min_length=1)
    revision: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    reference: str | None = None
    published: tuple[PublishedResult, ...] = ()

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _recipe_or_checkpoint(self) -> RowRequest:
        if (self.recipe is None) == (self.checkpoint is None):
            raise ValueError("a row needs either 'recipe' or 'checkpoint'")
        loading = ("revision", "dtype", "trust_remote_code", "tokenizer", "model_args")
        given = [name for name in loading if getattr(self, name)]
        if self.recipe is not None and given:
            raise ValueError(f"'{given[0]}' belongs to a row with 'checkpoint'")
        if self.checkpoint is not None and self.overrides:
            raise ValueError("'set' changes a recipe, and this row is a checkpoint")
        if self.checkpoint is not None and self.model:
            raise ValueError("a row with 'checkpoint' has no 'model'; its 'reference' names a row")
        return self


class Request(HarnessOptions):
    """Everything that decides the result of a comparison.

    A mapping may have a key ``harness`` too: what ``lm_eval --config`` reads, or the path of such a
    file; its keys are put in the places of those here.

    Attributes:
        model: folder or hub id of the dense model; several give rows of each.
        recipes: rows; a string is a recipe's name or path, or a group of recipes
            (see :func:`.recipe_groups`); with a minus before it, it is left out.
        tasks: names of tasks or groups, or mappings that give a task options of its own
            (:class:`.TaskRequest`).
        include_path: folders with the user's own task files, used with those of this package and of
            the harness; of tasks with the same name, that of the last folder counts.
        overrides: recipe keys for every row but the dense one (``set`` in a plan file). A list for
            one of :data:`AXES` gives a row for each value, of the rows that read it.
        target: what every row must fit, in place of a size, see :class:`.Target`; a row may have
            its own in ``set``.
        search: so many more sizes, where the Pareto front is uncertain.
        metrics: task or group -> the metric of its samples that judges it, in place of its own.
        pairs: task with free answers -> the one that asks the same and gives choices, besides what
            the tasks' metadata say.
        limit: documents per task (a share of them below 1), None for all.
        apply_chat_template: True, or the name of a template that the tokenizer has.
        batch_size: what the harness is given; with ``engine: vllm``, ``auto`` unless given.
        dtype: of the models in memory; None: as for ``compress``; for scoring, the checkpoint's.
        device: torch device; None or ``auto``: ``cuda`` where there is one, else ``cpu``.
        throughput: engine to measure tokens per second with; ``serve``: latencies of vLLM's server.
        workload: what it is asked, see :class:`streamline_bench.throughput.Workload`.
        load: what is sent to a server, see :class:`streamline_bench.throughput.ServingLoad`.
        noise_floor: score the dense model again at another batch size, a quarter of
            ``batch_size``, or four times 1. What vLLM scores always has such a floor.
        noise_batch_size: score it again at this batch size instead.
        noise_dtype: score it again in this dtype, all else being equal.
        noise_engine: score it again with this engine, all else being equal.
        text: file (.txt, .jsonl, .parquet) on which every row's next-token distributions are
            compared with the dense model's; None: no such comparison.
        text_documents: at most this many documents of it.
        text_window: tokens that are read at once.
        threads: CPU threads of every job; None: the cores divided by the workers.
        environment: variables for the processes of the jobs.
    """

    model: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(min_length=1)
    revision: str | None = None
    title: str | None = None
    recipes: tuple[str | RowRequest, ...] = Field(min_length=1)
    tasks: tuple[str | TaskRequest, ...] = Field(min_length=1)
    include_path: tuple[str, ...] = ()
    overrides: dict[str, Any] = Field(default_factory=dict, alias="set")
    target: str | dict[str, Any] | None = None
    search: int = Field(0, ge=0)
    metrics: dict[str, str] = Field(default_factory=dict)
    pairs: dict[str, str] = Field(default_factory=dict)
    limit: float | None = Field(None, gt=0, allow_inf_nan=False)
    num_fewshot: int | None = Field(None, ge=0)
    apply_chat_template: bool | str = False
    batch_size: str = Field("16", pattern=r"^([1-9]\d*|auto(:\d+)?)$")
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    throughput: ThroughputEngine = "none"
    workload: dict[str, Any] = Field(default_factory=dict)
    load: dict[str, Any] = Field(default_factory=dict)
    noise_floor: bool = False
    noise_batch_size: str | None = Field(None, pattern=r"^([1-9]\d*|auto(:\d+)?)$")
    noise_dtype: str | None = None
    noise_engine: NoiseEngine | None = None
    text: str | None = None
    text_field: str = "text"
    text_documents: int | None = Field(None, ge=1)
    text_window: int = Field(2048, ge=2)
    threads: int | None = Field(None, ge=1)
    environment: dict[str, str] = Field(default_factory=dict)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks and groups that are asked, whatever options they have."""
        return tuple(each if isinstance(each, str) else each.task for each in self.tasks)

    @property
    def models(self) -> tuple[str, ...]:
        """The dense models, the first of which is compared with where nothing else is said."""
        return (self.model,) if isinstance(self.model, str) else self.model

    @field_validator("limit")
    @classmethod
    def _whole(cls, limit: float | None) -> float | None:
        if limit is not None and limit > 1 and limit != int(limit):
            raise ValueError("give a whole number of documents, or a share of them below 1")
        return limit

    @field_validator("include_path", mode="before")
    @classmethod
    def _several(cls, folders: Any) -> Any:
        return [str(folders)] if isinstance(folders, str | Path) else folders or ()

    @model_validator(mode="after")
    def _once(self) -> Request:
        names = self.task_names
        twice = next((task for task in names if names.count(task) > 1), None)
        if twice is not None:
            raise ValueError(f"the task '{twice}' is given twice; leave one out")
        return self

    model_config = ConfigDict(populate_by_name=True)


def make_request(payload: Mapping[str, Any], origin: str = "The comparison") -> Request:
    """Validate a mapping as a request (RecipeError: naming the first wrong key or value)."""
    try:
        return Request.model_validate(unfolded(payload, origin))
    except ValidationError as error:
        raise RecipeError(_sentence(error, origin)) from None


def make_row(payload: Mapping[str, Any], origin: str) -> RowRequest:
    """Validate a mapping as a row (RecipeError: naming the first wrong key or value)."""
    try:
        return RowRequest.model_validate(dict(payload))
    except ValidationError as error:
        raise RecipeError(_sentence(error, origin)) from None


def read_request(path_or_name: str) -> dict[str, Any]:
    """Return the keys of a plan file: a path, or the name of one in ``reports/plans``.

    ``$NAME`` in its strings stands for an environment variable (RecipeError: one that is not set,
    no such file, not YAML).
    """
    path = _plan_path(path_or_name)
    payload = read_yaml_mapping(path, "a plan: it must hold a mapping such as 'tasks: [piqa]'")
    known = ["harness", *(field.alias or name for name, field in Request.model_fields.items())]
    for key in payload:
        if key not in known:
            raise RecipeError(f"{path}: unknown key '{key}'{suggest_or_list(str(key), known)}")
    found = {key: _expanded(value, path) for key, value in payload.items()}
    return unfolded(found, str(path))


def _plan_path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"The plan file {path} does not exist.")
        return path
    known = {path.stem: path for path in sorted((resource("reports") / "plans").glob("*.yaml"))}
    if name not in known:
        listed = f"; known: {', '.join(known)}, or the path of a .yaml file."
        raise RecipeError(f"Unknown plan '{name}'{suggest(name, known) or listed}")
    return known[name]


def _expanded(value: Any, path: Path) -> Any:
    """Put environment variables in place, in every string."""
    if isinstance(value, dict):
        return {key: _expanded(each, path) for key, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each, path) for each in value]
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{?(\w+)\}?", value):
        if name not in os.environ:
            raise RecipeError(f"{path} uses ${name}, which is not set; export {name}=… first.")
    return os.path.expandvars(value)


_CHOICES: dict[str, type[Frozen]] = {
    schema.__name__: schema for schema in (RowRequest, TaskRequest)
}
"""What a row or a task may be in place of a name; pydantic puts these names into places."""


def _schema_at(part: object) -> type[Frozen] | None:
    return next((schema for name, schema in _CHOICES.items() if name in str(part)), None)


def _sentence(error: ValidationError, origin: str) -> str:
    problems = error.errors(include_url=False)
    # A row may be a name or a mapping: a key that a mapping has too many is what was meant.
    of_rows = [each for each in problems if any(_schema_at(p) for p in each["loc"])]
    mapped = [each for each in of_rows if isinstance(each.get("input"), Mapping)]
    problem = next(
        (each for each in problems if each["type"] == "extra_forbidden"), [*mapped, *problems][0]
    )
    schema = next(filter(None, map(_schema_at, problem["loc"])), None)
    place = [str(p) for p in problem["loc"] if p != "str" and _schema_at(p) is None]
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        fields = (schema or (Request if len(place) == 1 else RowRequest)).model_fields
        names = [*(["harness"] if schema is None and len(place) == 1 else []),
                 *(field.alias or name for name, field in fields.items())]  # fmt: skip
        return f"{origin}: unknown key '{'.'.join(place)}'{suggest_or_list(place[-1], names)}"
    if not place:  # values that contradict each other: the sentence names them itself
        return f"{origin}: {said}."
    return f"{origin}: '{'.'.join(place)}' is {problem.get('input')!r}: {said}."
