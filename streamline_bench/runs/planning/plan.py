"""``plan.yaml``: everything that decides the result of a run, written before anything is run.

A run folder grows: each command adds its rows and questions to those that are there
(:mod:`.growth`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.recipe.schema import Frozen, PublishedResult
from streamline_bench.core.recipe.validation import first_problem
from streamline_bench.errors import OutputError
from streamline_bench.runs.planning.harness_options import Engine, HarnessOptions
from streamline_bench.runs.planning.request import ThroughputEngine

PLAN_FILE = "plan.yaml"
SCHEMA_VERSION = 1


class ModelPlan(Frozen):
    """A model that is loaded as it is, with what it is loaded with.

    Attributes:
        name: folder (absolute) or hub id.
        dtype: None: that of the evaluation.
        tokenizer: folder or hub id; None: the model's own.
        model_args: further arguments of the harness's model.
        weights_sha256: content of weights and config.
        tokenizer_sha256: content of the tokenizer's files.
        parameters, nbytes: counted from the files of the weights.
        layers: decoder layers.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str | None = None
    tokenizer: str | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    weights_sha256: str
    tokenizer_sha256: str = ""
    parameters: int | None = None
    nbytes: int | None = None
    layers: int | None = None

    @property
    def loaded_plainly(self) -> bool:
        """Nothing but its folder decides how it is loaded."""
        return not (self.dtype or self.tokenizer or self.model_args)


class PlanRow(Frozen):
    """A row: a dense model, what a recipe makes of one, or a checkpoint made elsewhere.

    Attributes:
        recipe: the complete recipe; empty for a checkpoint made elsewhere.
        key: content key of the checkpoint.
        folder: of the row in the run folder, and in the names of its jobs; None: its label.
        checkpoint: it was made elsewhere.
        model: the dense model that it is or comes from, None for the plan's; of a row with
            ``checkpoint``, the checkpoint.
        reference: label of the dense row that it is compared with; None: the plan's.
        target: what its size was solved for; ``size``: the keys of the recipe that give it.
        searched: a search for the Pareto front added it.
        group: label of the row before axes spanned it; None where none did.
        axes: axis -> value of this row: sparsity, n_layers, seed, calibration, model.
        published: numbers of the literature for this very model.
    """

    label: str
    dense: bool
    recipe: dict[str, Any] = Field(default_factory=dict)
    key: str
    folder: str | None = None
    checkpoint: bool = False
    model: ModelPlan | None = None
    reference: str | None = None
    target: dict[str, Any] = Field(default_factory=dict)
    size: dict[str, Any] = Field(default_factory=dict)
    searched: bool = False
    group: str | None = None
    axes: dict[str, Any] = Field(default_factory=dict)
    published: tuple[PublishedResult, ...] = ()

    @property
    def place(self) -> str:
        """Name of its folder, and of its jobs."""
        return self.folder or self.label

    @property
    def made_here(self) -> bool:
        """A recipe makes it, so that it has a checkpoint in the run folder."""
        return not self.dense and not self.checkpoint


_PERMISSION = {"confirm_run_unsafe_code"}
"""Options that allow something, and change no answer."""


class Evaluation(HarnessOptions):
    """What the harness is asked.

    Attributes:
        tasks_sha256: covers task files outside the harness.
        engine_version: of the engine, where it is not transformers.
    """

    tasks: tuple[str, ...]
    include_path: tuple[str, ...] = ()
    tasks_sha256: str
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool | str = False
    batch_size: str
    dtype: str | None = None
    engine_version: str | None = None

    @field_validator("include_path", mode="before")
    @classmethod
    def _several(cls, folders: Any) -> Any:
        # Earlier versions knew one folder.
        return [folders] if isinstance(folders, str) else folders or ()

    @property
    def settings(self) -> dict[str, Any]:
        """How tasks are asked, whichever they are."""
        outside = {"tasks", "tasks_sha256", "include_path", *_PERMISSION}
        return self.model_dump(mode="json", exclude=outside)

    @property
    def shareable(self) -> bool:
        """Whether one walk through shared layers can answer it for several models."""
        from streamline_bench.harness.trunk.request import MODEL_ARGUMENTS

        return self.engine == "hf" and self.model_args.keys() <= MODEL_ARGUMENTS

    @property
    def decisive(self) -> dict[str, Any]:
        """Everything that decides an answer, as it is hashed.

        Where the task folders lie changes nothing. An option that earlier versions did not know
        counts where it is given, so that what they made keeps its name.
        """
        later = {*HarnessOptions.model_fields, "engine_version"}
        given = self.model_dump(mode="json", exclude_defaults=True)
        payload = self.model_dump(mode="json", exclude={"include_path", *_PERMISSION})
        return {key: each for key, each in payload.items() if key in given or key not in later}

    def only(self, tasks: Iterable[str]) -> Evaluation:
        """Return the same for these of its tasks."""
        return self.model_copy(update={"tasks": tuple(tasks)})


class NoisePlan(Frozen):
    """The dense model scored once more, in another way that should change nothing.

    Attributes:
        name: of the job and its folder.
        label: for the reader.
        engine: None: as for the rows.
        only_engine: repeated is what this engine scored; None: everything.
    """

    name: str
    label: str
    batch_size: str
    dtype: str | None = None
    engine: Engine | None = None
    only_engine: Engine | None = None


class TextPlan(Frozen):
    """A text on which next-token distributions are compared; ``sha256`` is the file's."""

    file: str
    sha256: str
    field: str
    documents: int | None = None
    window: int


class Plan(Frozen):
    """A comparison with nothing left open.

    Attributes:
        model: folder (absolute) or hub id.
        weights_sha256: content of the model's weights and config.
        tokenizer_sha256: content of its tokenizer's files.
        nbytes: of its weights.
        reference: label of the dense row that the others are compared with.
        more: what the harness is asked with other options than those of ``evaluation``.
        search: sizes that are added where the Pareto front is uncertain.
        metrics: task or group -> the metric that judges it, in place of its own.
        pairs: task with free answers -> the one that asks the same and gives choices.
        versions: packages that decide a result.
        prompts_sha256: of the file of prompts that a server is sent; None for random ones.
        task_data: task as asked -> SHA-256 of its configuration and data.
        asked: every set of questions that was put to rows of this folder, in this order. A row is
            asked the sets that it has not answered.
        others: rows of earlier commands that are not part of this one; they stay on disk.
    """

    schema_version: int = SCHEMA_VERSION
    title: str
    model: str
    revision: str | None = None
    weights_sha256: str
    tokenizer_sha256: str = ""
    nbytes: int | None = None
    reference: str
    rows: tuple[PlanRow, ...] = Field(min_length=1)
    evaluation: Evaluation
    more: tuple[Evaluation, ...] = ()
    device: str
    dtype: str | None = None
    trust_remote_code: bool = False
    threads: int | None = None
    throughput: ThroughputEngine = "none"
    workload: dict[str, Any] = Field(default_factory=dict)
    load: dict[str, Any] = Field(default_factory=dict)
    prompts_sha256: str | None = None
    noise: Annotated[tuple[NoisePlan, ...], BeforeValidator(lambda value: value or ())] = ()
    text: TextPlan | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    search: int = 0
    metrics: dict[str, str] = Field(default_factory=dict)
    pairs: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str]
    task_data: dict[str, str] = Field(default_factory=dict)
    asked: tuple[Evaluation, ...] = ()
    others: tuple[PlanRow, ...] = ()

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """What every row is asked, one for each way of asking."""
        return (self.evaluation, *self.more)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task and group that a row is asked."""
        return tuple(task for each in self.evaluations for task in each.tasks)

    @property
    def questions(self) -> tuple[Evaluation, ...]:
        """What was asked in this folder so far; the first set has plain names on disk."""
        return self.asked or self.evaluations

    @property
    def target(self) -> dict[str, Any]:
        """The target of the first row that has one; empty where none has."""
        return next((row.target for row in self.rows if row.target), {})

    def source(self, row: PlanRow) -> ModelPlan:
        """The dense model that a row is or comes from, or the checkpoint made elsewhere."""
        return row.model or ModelPlan(
            name=self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            weights_sha256=self.weights_sha256,
        )

    def reference_of(self, row: PlanRow) -> PlanRow:
        """The dense row that a row is compared with."""
        label = row.label if row.dense else row.reference or self.reference
        return next(each for each in self.rows if each.label == label)


def digest(payload: Any) -> str:
    """SHA-256 (hex) of a value as canonical JSON."""
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_plan(folder: Path, plan: Plan) -> None:
    """Write ``plan.yaml`` atomically (OutputError: the folder cannot be written)."""
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    atomic_write_text(folder / PLAN_FILE, text)


def read_plan(folder: Path) -> Plan | None:
    """Return the plan of a run folder, if any (OutputError: damaged, another schema version)."""
    path = folder / PLAN_FILE
    try:
        payload = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan = Plan.model_validate(payload)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:160]
        if isinstance(error, ValidationError):
            why = first_problem(error)
        raise OutputError(f"{path} is damaged ({why}); give another --output.") from None
    if plan.schema_version != SCHEMA_VERSION:
        raise OutputError(
            f"{path} has schema version {plan.schema_version}, this release writes "
            f"{SCHEMA_VERSION}; give another --output."
        )
    return plan
