"""From a request to a plan: every name looked up, every default filled in, every content hashed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamline_bench.core.checkpoint.manifest import file_sha256
from streamline_bench.core.machine.environment import found_device, known_device, package_versions
from streamline_bench.core.recipe.validation import first_problem, suggest_or_list
from streamline_bench.errors import RecipeError
from streamline_bench.modeling.loading import dtype_name
from streamline_bench.runs.planning.plan import Evaluation, NoisePlan, Plan, PlanRow, TextPlan
from streamline_bench.runs.planning.request import NoiseEngine, Request
from streamline_bench.runs.planning.rows import Row, resolve_rows
from streamline_bench.runs.planning.task_files import tasks_sha256

__all__ = ["resolve_plan"]


def resolve_plan(request: Request, *, device: str | None = None) -> Plan:
    """Return the plan of a request.

    Args:
        device: used where the request leaves the device open.

    Raises:
        StreamlineBenchError: the model, a recipe or the task folder cannot be used.
    """
    from streamline_bench.compression.key import content_key
    from streamline_bench.modeling.source_model import SourceModel

    rows = resolve_rows(request)
    source = SourceModel.find(request.model, request.revision)
    local = Path(request.model).expanduser().is_dir()
    device = _device(request.device) or device or found_device("auto")

    def planned(row: Row) -> PlanRow:
        key = content_key(source, row.recipe, device=device, dtype=request.dtype)
        recipe = row.recipe.model_dump(mode="json")
        return PlanRow(label=row.label, dense=row.is_dense, recipe=recipe, key=key)

    return Plan(
        title=request.title or f"{Path(request.model).name} without some of its layers",
        model=str(source.folder.resolve()) if local else request.model,
        revision=request.revision,
        weights_sha256=source.weights_sha256,
        reference=next(row.label for row in rows if row.is_dense),
        rows=tuple(planned(row) for row in rows),
        evaluation=_evaluation(request),
        device=device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        threads=request.threads,
        throughput=request.throughput,
        workload=_workload(request),
        noise=_noise(request),
        text=_text(request),
        environment=request.environment,
        versions=package_versions(),
    )


def _device(asked: str | None) -> str | None:
    return None if asked in (None, "auto") else known_device(str(asked))


def _evaluation(request: Request) -> Evaluation:
    own = Path(request.include_path).expanduser().resolve() if request.include_path else None
    if own is not None and not own.is_dir():
        raise RecipeError(f"The task folder {own} does not exist; mend --include-path.")
    return Evaluation(
        tasks=request.tasks,
        include_path=str(own) if own else None,
        tasks_sha256=_task_files(request, own),
        limit=request.limit,
        num_fewshot=request.num_fewshot,
        apply_chat_template=request.apply_chat_template,
        batch_size=request.batch_size,
        dtype=request.dtype,
    )


def _task_files(request: Request, own: Path | None) -> str:
    """Look the tasks up, and hash what they are made of.

    Raises:
        EvaluationError: a name of a task stands for nothing.
    """
    from streamline_bench.harness.tasks.asked_tasks import open_index, parts_of, task_folders

    index = open_index(request.tasks, own)
    configs = [part.config for name in request.tasks for part in parts_of(index, name)]
    folders = [Path(folder) for folder in task_folders(own)]
    files = [
        name for name in request.tasks if name.endswith(".yaml") or name not in index.all_tasks
    ]
    return tasks_sha256(folders, configs, request.environment, files)


def _workload(request: Request) -> dict[str, Any]:
    """Return the complete workload, so that a later default changes no run."""
    if request.throughput == "none":
        return {}
    from streamline_bench.throughput.workload import Workload

    try:
        return Workload.model_validate(request.workload).model_dump(mode="json")
    except ValidationError as error:
        raise RecipeError(_workload_sentence(error, Workload.model_fields)) from None


def _workload_sentence(error: ValidationError, known: Iterable[str]) -> str:
    problem = error.errors(include_url=False)[0]
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][0])
        return f"The workload has an unknown key '{key}'{suggest_or_list(key, known)}"
    return f"The workload's {first_problem(error)}."


def _noise(request: Request) -> tuple[NoisePlan, ...]:
    """Every way of scoring the dense model again changes one thing only."""
    found = []
    if request.noise_floor or request.noise_batch_size:
        size = request.noise_batch_size or _other_batch_size(request.batch_size)
        _require_other(size, request.batch_size, "--noise-batch-size")
        found.append(_again(request, f"batch size {size}", batch_size=size))
    if request.noise_dtype:
        _require_other(request.noise_dtype, request.dtype, "--noise-dtype")
        dtype_name(request.noise_dtype)  # refused here as --dtype is
        found.append(_again(request, request.noise_dtype, dtype=request.noise_dtype))
    if request.noise_engine:
        _require_engine(request.noise_engine)
        found.append(_again(request, request.noise_engine, engine=request.noise_engine))
    return tuple(found)


def _again(request: Request, label: str, **change: Any) -> NoisePlan:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", label)
    same = {"batch_size": request.batch_size, "dtype": request.dtype}
    return NoisePlan(name=name, label=label, **{**same, **change})


def _require_other(value: str, usual: str | None, option: str) -> None:
    if value == usual:
        raise RecipeError(
            f"The noise floor needs another value than {value}, which all rows have; change "
            f"{option}."
        )


def _require_engine(engine: NoiseEngine) -> None:
    """Refuse an engine that is not installed, before anything is run.

    Raises:
        MissingDependencyError: with the line that installs it.
    """
    from streamline_bench.modeling.vllm.package import require_vllm

    require_vllm(f"--noise-engine {engine}")


def _text(request: Request) -> TextPlan | None:
    if request.text is None:
        return None
    from streamline_bench.divergence import read_texts

    path = Path(request.text).expanduser().resolve()
    # Read as far as the rows will, so that what is damaged or missing is said before anything runs.
    texts = itertools.islice(read_texts(path, request.text_field), request.text_documents)
    if not sum(bool(text.strip()) for text in texts):
        raise RecipeError(f"The text {path} holds no document; give another --text.")
    return TextPlan(
        file=str(path),
        sha256=file_sha256(path),
        field=request.text_field,
        documents=request.text_documents,
        window=request.text_window,
    )


def _other_batch_size(size: str) -> str:
    if not size.isdigit():
        return "8"
    return "4" if size == "1" else str(max(1, int(size) // 4))
