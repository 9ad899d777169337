"""From a request to a plan: every name looked up, every default filled in, every content hashed."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamline_bench.core.checkpoint.folder import file_sha256
from streamline_bench.core.machine.environment import found_device, known_device, package_versions
from streamline_bench.core.recipe.validation import wrong_value
from streamline_bench.errors import RecipeError
from streamline_bench.harness.tasks.asked_tasks import refuse_unknown, task_folders
from streamline_bench.harness.tasks.task_files import check_tasks, tasks_sha256
from streamline_bench.modeling.loading import dtype_name
from streamline_bench.runs.planning.plan import Evaluation, NoisePlan, Plan, PlanRow, TextPlan
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.rows import Row, refuse_unknown_names, resolve_rows

log = logging.getLogger(__name__)


def resolve_plan(request: Request, *, device: str | None = None, progress: bool = True) -> Plan:
    """Return the plan of a request.

    Args:
        device: used where the request leaves the device open.

    Raises:
        StreamlineBenchError: the model, a recipe or the task folder cannot be used.
    """
    # What was mistyped is refused first: all that follows imports torch.
    refuse_unknown_names(request)
    own = _own_tasks(request)
    refuse_unknown(request.tasks, task_folders(own))
    rows = resolve_rows(request)
    from streamline_bench.compression.pipeline import content_key
    from streamline_bench.modeling.loading import SourceModel

    source = SourceModel.find(request.model, request.revision, progress=progress)
    local = Path(request.model).expanduser().is_dir()
    asked = request.device if request.device != "auto" else None
    where = known_device(asked) if asked is not None else device or found_device("auto")

    def planned(row: Row) -> PlanRow:
        key = content_key(source, row.recipe, device=where, dtype=request.dtype)
        recipe = row.recipe.model_dump(mode="json")
        return PlanRow(label=row.label, dense=row.is_dense, recipe=recipe, key=key)

    def same(names: str) -> dict[str, Any]:
        return {name: getattr(request, name) for name in names.split()}

    return Plan(
        title=request.title or f"{Path(request.model).name} without some of its layers",
        model=str(source.folder.resolve()) if local else request.model,
        weights_sha256=source.weights_sha256,
        reference=next(row.label for row in rows if row.is_dense),
        rows=tuple(planned(row) for row in rows),
        evaluation=Evaluation(
            include_path=str(own) if own else None,
            tasks_sha256=_task_files(request, own),
            **same("tasks limit num_fewshot apply_chat_template batch_size dtype"),
        ),
        device=where,
        workload=_workload(request),
        noise=_noise(request),
        text=_text(request, source.folder),
        versions=package_versions(),
        **same("revision dtype trust_remote_code threads throughput environment"),
    )


def _own_tasks(request: Request) -> Path | None:
    own = Path(request.include_path).expanduser().resolve() if request.include_path else None
    if own is not None and not own.is_dir():
        raise RecipeError(f"The task folder {own} does not exist; correct --include-path.")
    return own


def _task_files(request: Request, own: Path | None) -> str:
    """Look the tasks up, and hash what they are made of.

    Raises:
        EvaluationError: a name of a task stands for nothing.
    """
    from streamline_bench.harness.tasks.asked_tasks import open_index, parts_of

    index = open_index(request.tasks, own)
    parts = [part for name in request.tasks for part in parts_of(index, name)]
    configs = [part.config for part in parts]
    tasks = {str(part.config.get("task") or part.task): part.config for part in parts if part.task}
    check_tasks(tasks, request.environment)
    _check_fewshot(request.num_fewshot, tasks)
    folders = [Path(folder) for folder in task_folders(own)]
    files = [
        name for name in request.tasks if name.endswith(".yaml") or name not in index.all_tasks
    ]
    return tasks_sha256(folders, configs, request.environment, files)


def _check_fewshot(asked: int | None, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """The harness ignores --num_fewshot for tasks that fix their number at 0."""
    fixed = [task for task, config in tasks.items() if config.get("num_fewshot") == 0]
    if not asked or not fixed:
        return
    named = ", ".join(fixed[:4]) + (f" and {len(fixed) - 4} more" if len(fixed) > 4 else "")
    if len(fixed) == len(tasks):
        raise RecipeError(
            f"--num-fewshot {asked} has no effect: {named} always ask without examples; leave the "
            "option out."
        )
    log.warning("--num-fewshot %s has no effect on %s, which ask without examples", asked, named)


def _workload(request: Request) -> dict[str, Any]:
    """Return the complete workload, so that a later default changes no run."""
    if request.throughput == "none":
        return {}
    from streamline_bench.throughput.workload import Workload

    try:
        return Workload.model_validate(request.workload).model_dump(mode="json")
    except ValidationError as error:
        raise RecipeError(f"--workload: {wrong_value(error, Workload)}") from None


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
        from streamline_bench.modeling.vllm.package import require_vllm

        require_vllm(f"--noise-engine {request.noise_engine}")
        found.append(_again(request, request.noise_engine, engine=request.noise_engine))
    return tuple(found)


def _again(request: Request, label: str, **change: Any) -> NoisePlan:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", label)
    same = {"batch_size": request.batch_size, "dtype": request.dtype}
    return NoisePlan(name=name, label=label, **{**same, **change})


def _require_other(value: str, usual: str | None, option: str) -> None:
    if value == usual:
        raise RecipeError(
            f"{option} is {value}, which is the value of all rows; give another one, so that it "
            "shows the noise."
        )


def _text(request: Request, model: Path) -> TextPlan | None:
    if request.text is None:
        return None
    from streamline_bench.divergence import read_texts
    from streamline_bench.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=request.trust_remote_code)
    path = Path(request.text).expanduser().resolve()
    # Read as far as the rows will, so that what is damaged or missing is said before anything runs.
    texts = itertools.islice(
        read_texts(path, request.text_field, tokenizer), request.text_documents
    )
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
