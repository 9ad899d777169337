"""From a request to a plan: every name looked up, every default filled in, every content hashed."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamline_bench.core.checkpoint.folder import file_sha256
from streamline_bench.core.machine.environment import found_device, known_device, package_versions
from streamline_bench.core.recipe.validation import suggest_or_list, wrong_value
from streamline_bench.errors import RecipeError, few
from streamline_bench.harness.tasks.asked_tasks import refuse_unknown, task_folders
from streamline_bench.harness.tasks.task_files import check_tasks, task_sha256, tasks_sha256
from streamline_bench.modeling.loading import dtype_name
from streamline_bench.runs.planning.plan import (
    Evaluation,
    ModelPlan,
    NoisePlan,
    Plan,
    PlanRow,
    TextPlan,
    digest,
)
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.rows import Row, refuse_unknown_names, resolve_rows

log = logging.getLogger(__name__)


def resolve_plan(
    request: Request,
    *,
    device: str | None = None,
    asked: Collection[str] = (),
    progress: bool = True,
) -> Plan:
    """Return the plan of a request (StreamlineBenchError: something in it cannot be used).

    Args:
        device: used where the request leaves it open.
        asked: see :func:`resolve_rows`.
    """
    # What was mistyped is refused first: all that follows imports torch.
    refuse_unknown_names(request)
    own = Path(request.include_path).expanduser().resolve() if request.include_path else None
    if own is not None and not own.is_dir():
        raise RecipeError(f"The task folder {own} does not exist; correct --include-path.")
    refuse_unknown(request.tasks, task_folders(own))
    rows = resolve_rows(request, asked)
    from streamline_bench.compression.pipeline import content_key
    from streamline_bench.harness.trunk.stack import tokenizer_sha256
    from streamline_bench.modeling.loading import SourceModel
    from streamline_bench.runs.planning.models import checkpoint_plan, model_plan

    if request.revision and len(request.models) > 1:
        raise RecipeError(
            f"--revision {request.revision} would be that of {len(request.models)} models; give "
            "one model, or a row with 'checkpoint' and its own revision."
        )
    named = request.device if request.device != "auto" else None
    where = known_device(named) if named is not None else device or found_device("auto")
    changed = any(row.recipe.method != "dense" for row in rows)
    trust = request.trust_remote_code
    sources = [
        SourceModel.find(
            name, request.revision, trust_remote_code=trust, progress=progress, changed=changed
        )
        for name in request.models
    ]
    source = sources[0]
    dense = {row.model: row.label for row in reversed(rows) if row.is_dense}
    tasks = open_tasks(request, own)

    def planned(row: Row) -> PlanRow:
        model: ModelPlan | None
        if row.checkpoint is not None:
            model = checkpoint_plan(row.label, row.checkpoint, progress=progress)
            key = digest(["checkpoint", model.model_dump(mode="json", exclude={"name"})])
            recipe = None
        else:
            of_row = sources[row.model]
            model = None if row.model == 0 else model_plan(of_row)
            key = content_key(of_row, row.recipe, device=where, dtype=request.dtype)
            recipe = row.recipe.model_dump(mode="json")
        return PlanRow(
            label=row.label,
            dense=row.is_dense,
            recipe=recipe or {},
            key=key,
            checkpoint=row.checkpoint is not None,
            model=model,
            reference=row.reference or (dense[row.model] if row.model else None),
            group=row.group,
            axes=dict(row.axes),
            published=row.published,
        )

    def same(names: str) -> dict[str, Any]:
        return {name: getattr(request, name) for name in names.split()}

    names = " and ".join(Path(name).name for name in request.models)
    first = model_plan(source)
    return Plan(
        title=request.title or f"{names} without some of its layers",
        model=first.name,
        weights_sha256=first.weights_sha256,
        tokenizer_sha256=tokenizer_sha256(source.folder),
        nbytes=first.nbytes,
        reference=dense[0],
        rows=tuple(planned(row) for row in rows),
        evaluation=Evaluation(
            include_path=str(own) if own else None,
            tasks_sha256=tasks.sha256,
            **same("tasks limit num_fewshot apply_chat_template batch_size dtype"),
        ),
        task_data=tasks.by_task,
        device=where,
        workload=_workload(request),
        noise=_noise(request),
        text=_text(request, source.folder),
        versions=package_versions(),
        **same("revision dtype trust_remote_code threads throughput environment metrics"),
    )


@dataclass(frozen=True)
class _Tasks:
    """Hashes of what tasks are made of: of all together, and of each by the name it is asked by."""

    sha256: str
    by_task: dict[str, str]


def open_tasks(request: Request, own: Path | None) -> _Tasks:
    """Look the tasks up (EvaluationError: unknown), and hash what they are made of."""
    from streamline_bench.harness.tasks.asked_tasks import open_index, parts_of

    index = open_index(request.tasks, own)
    parts = {name: [*parts_of(index, name)] for name in request.tasks}
    found = [part for each in parts.values() for part in each]
    configs = [part.config for part in found]
    tasks = {str(part.config.get("task") or part.task): part.config for part in found if part.task}
    check_tasks(tasks, request.environment)
    _check_fewshot(request.num_fewshot, tasks)
    _refuse_code(tasks)
    _check_metrics(request.metrics, {*tasks, *request.tasks})
    folders = [Path(folder) for folder in task_folders(own)]
    files = [
        name for name in request.tasks if name.endswith(".yaml") or name not in index.all_tasks
    ]
    by_task = {
        name: task_sha256(folders, [part.config for part in each], request.environment,
                          [name] if name in files else [])
        for name, each in parts.items()
    }  # fmt: skip
    return _Tasks(tasks_sha256(folders, configs, request.environment, files), by_task)


def _refuse_code(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Tasks that run code which a model wrote need the harness's own switch."""
    code = [task for task, config in tasks.items() if config.get("unsafe_code")]
    if code:
        raise RecipeError(
            f"Task '{code[0]}' runs code that the model writes; leave it out, or evaluate both "
            "models with lm_eval --confirm_run_unsafe_code --log_samples in a sandbox and compare "
            "them with streamline-bench stability."
        )


def _check_metrics(metrics: Mapping[str, str], known: Collection[str]) -> None:
    for task, name in metrics.items():
        if task not in known:
            raise RecipeError(
                f"--metric {task}={name}: '{task}' is not among the tasks"
                f"{suggest_or_list(task, sorted(known))}"
            )


def _check_fewshot(asked: int | None, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """The harness ignores --num_fewshot for tasks that fix their number at 0."""
    fixed = [task for task, config in tasks.items() if config.get("num_fewshot") == 0]
    if not asked or not fixed:
        return
    named = few(fixed)
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
    other = _other_batch_size(request.batch_size) if request.noise_floor else None
    changes = {
        "batch_size": request.noise_batch_size or other,
        "dtype": request.noise_dtype,
        "engine": request.noise_engine,
    }
    usual = {"batch_size": request.batch_size, "dtype": request.dtype}
    found = []
    for key, value in changes.items():
        if not value:
            continue
        if value == usual.get(key):
            raise RecipeError(
                f"--noise-{key.replace('_', '-')} is {value}, which is the value of all rows; give "
                "another one, so that it shows the noise."
            )
        label = f"batch size {value}" if key == "batch_size" else value
        name = re.sub(r"[^A-Za-z0-9.]+", "-", label)
        found.append(NoisePlan.model_validate({"name": name, "label": label, **usual, key: value}))
    if request.noise_dtype:
        dtype_name(request.noise_dtype)  # refused here as --dtype is
    if request.noise_engine:
        from streamline_bench.modeling.vllm.package import require_vllm

        require_vllm(f"--noise-engine {request.noise_engine}")
    return tuple(found)


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
