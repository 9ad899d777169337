"""``plan.yaml``: everything that decides the result of a run, written before anything is run.

A run folder belongs to one plan. Running again with the same one continues; with another one it is
refused, naming the first differences, so that a table never mixes two sets of options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from streamline_bench.core.files import atomic_write_text
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.recipe.validation import first_problem
from streamline_bench.errors import OutputError
from streamline_bench.runs.planning.request import NoiseEngine, ThroughputEngine

PLAN_FILE = "plan.yaml"
SCHEMA_VERSION = 1

_NOT_COMPARED = ("model", "title", "evaluation.include_path", "text.file")
"""The same weights, task files and text may lie elsewhere, and a title changes no number."""

_CHANGED_FILES = {
    "evaluation.tasks_sha256": "the files of the tasks, or the data they name, are others now",
    "text.sha256": "the text is another one now",
}
"""What a hash that differs says to a reader."""


class PlanRow(Frozen):
    """A row: its label, its complete recipe, and the content key of the checkpoint it gives."""

    label: str
    dense: bool
    recipe: dict[str, Any]
    key: str


class Evaluation(Frozen):
    """What the harness is asked; ``tasks_sha256`` covers task files outside the harness."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    tasks_sha256: str
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: str
    dtype: str | None = None


class NoisePlan(Frozen):
    """The dense model scored once more, in another way that should change nothing.

    Attributes:
        name: of the job and its folder.
        label: for the reader.
        engine: None: transformers, as for the rows.
    """

    name: str
    label: str
    batch_size: str
    dtype: str | None = None
    engine: NoiseEngine | None = None


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
        reference: label of the dense row that the others are compared with.
        versions: packages that decide a result.
    """

    schema_version: int = SCHEMA_VERSION
    title: str
    model: str
    revision: str | None = None
    weights_sha256: str
    reference: str
    rows: tuple[PlanRow, ...] = Field(min_length=1)
    evaluation: Evaluation
    device: str
    dtype: str | None = None
    trust_remote_code: bool = False
    threads: int | None = None
    throughput: ThroughputEngine = "none"
    workload: dict[str, Any] = Field(default_factory=dict)
    noise: Annotated[tuple[NoisePlan, ...], BeforeValidator(lambda value: value or ())] = ()
    text: TextPlan | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str]


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
    except FileNotFoundError:
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


def differences(there: Plan, here: Plan) -> list[str]:
    """Return what differs, as ``evaluation.limit: 4 there, 8 now``, in the order of the plan."""
    old, new = (dict(_flat(plan.model_dump(mode="json"))) for plan in (there, here))
    changed = [
        key
        for key in [*old, *(each for each in new if each not in old)]
        if key not in _NOT_COMPARED and old.get(key) != new.get(key)
    ]
    # The key of a row follows from what else is said to differ; alone it needs words.
    said = [key for key in changed if not _is_key_of_a_row(key)] or changed[:1]
    return [
        f"row {key[5:-4]}: its calibration data changed, or this version of streamline-bench "
        "computes it in another way"
        if _is_key_of_a_row(key)
        else f"{key}: {_CHANGED_FILES[key]}"
        if key in _CHANGED_FILES
        else f"{key}: {old.get(key, 'not set')!r} there, {new.get(key, 'not set')!r} now"
        for key in said
    ]


def _is_key_of_a_row(key: str) -> bool:
    return key.startswith("rows.") and key.endswith(".key")


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(each, (*path, str(key)))
    elif path == ("rows",):
        yield "rows", [row["label"] for row in value]
        for row in value:
            yield from _flat(row, ("rows", row["label"]))
    else:
        yield ".".join(path), value
