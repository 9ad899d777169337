"""From a request to a plan: every name looked up, every default filled in, every content hashed.

Names and groups of recipes become rows, each with a label that can be a folder's name.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamline_bench.compression.recipes import (
    SIZE_KEYS,
    applicable,
    load_recipe,
    recipe_groups,
    refuse_unknown_key,
    refuse_unread,
    unread_keys,
)
from streamline_bench.core.checkpoint.folder import file_sha256
from streamline_bench.core.machine.environment import found_device, known_device, package_versions
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.recipe.validation import suggest_or_list, wrong_value
from streamline_bench.errors import RecipeError
from streamline_bench.harness.tasks.asked_tasks import refuse_unknown, task_folders
from streamline_bench.harness.tasks.task_files import check_tasks, tasks_sha256
from streamline_bench.modeling.loading import dtype_name
from streamline_bench.runs.folder import is_row_name
from streamline_bench.runs.planning.plan import Evaluation, NoisePlan, Plan, PlanRow, TextPlan
from streamline_bench.runs.planning.request import Request, RowRequest

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
    from streamline_bench.modeling.loading import SourceModel

    changed = any(row.recipe.method != "dense" for row in rows)
    source = SourceModel.find(
        request.model, request.revision, trust_remote_code=request.trust_remote_code,
        progress=progress, changed=changed,
    )  # fmt: skip
    local = Path(request.model).expanduser().is_dir()
    named = request.device if request.device != "auto" else None
    where = known_device(named) if named is not None else device or found_device("auto")

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


def _task_files(request: Request, own: Path | None) -> str:
    """Look the tasks up (EvaluationError: unknown), and hash what they are made of."""
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


GROUPS: tuple[str, ...] = (
    *("all", "no-training", "calibrated", "recovered"),
    *("paper-settings", "hub-data"),
)
"""Groups of recipes, see :func:`.recipe_groups`; with a minus before it, a group is taken away."""


@dataclass(frozen=True)
class Row:
    """A label and its complete recipe."""

    label: str
    recipe: Recipe

    @property
    def is_dense(self) -> bool:
        """Nothing is compressed: the model itself is scored."""
        return self.recipe.method == "dense" and self.recipe.recovery is None


def refuse_unknown_names(request: Request) -> None:
    """Refuse unknown recipes and keys (RecipeError) before a method imports torch."""
    asked = _expanded(request.recipes)
    for each in asked:
        load_recipe(each.recipe, check=False)
    for key in (*request.overrides, *(key for row in asked for key in row.overrides)):
        refuse_unknown_key(key)


def resolve_rows(request: Request, asked: Collection[str] = ()) -> list[Row]:
    """Return the rows of a request in its order; the dense model is put first if it is missing.

    Args:
        asked: those of the keys for every row that somebody gave for this comparison, and that
            therefore decide something in at least one row. Those of a plan may fit other rows.

    RecipeError: an unknown recipe or key, one that no row reads, a label that is taken or cannot
    name a folder.
    """
    rows = [_row(each, request.overrides) for each in _expanded(request.recipes)]
    _require_used(request.overrides, rows, asked)
    if not any(row.is_dense for row in rows):
        rows.insert(0, Row("dense", load_recipe("dense")))
    seen: set[str] = set()
    for row in rows:
        if not is_row_name(row.label):
            raise RecipeError(
                f"The row label '{row.label}' cannot name a folder here; use letters, digits, '.', "
                "'_', '+' and '-', and no name of the run's own files, such as jobs, noise or "
                "run.json."
            )
        if row.label.lower() in seen:
            raise RecipeError(
                f"Two rows are called '{row.label}'; give one of them another label (--row "
                "LABEL=RECIPE)."
            )
        seen.add(row.label.lower())
    return rows


def _expanded(recipes: Sequence[str | RowRequest]) -> list[RowRequest]:
    """Replace groups by their recipes, and take away what has a minus before it (RecipeError).

    A recipe that a group repeats is taken once.
    """
    wanted = {each.removeprefix("-") for each in recipes if isinstance(each, str)}
    groups = recipe_groups() if wanted & {*GROUPS} else {}
    found: list[RowRequest] = []
    for each in recipes:
        if isinstance(each, RowRequest):
            found.append(each)
        elif each.startswith("-"):
            name = each.removeprefix("-")
            gone = groups.get(name, (name,))
            kept = [row for row in found if row.recipe not in gone]
            if len(kept) == len(found):
                known = [*GROUPS, *(row.recipe for row in found)]
                raise RecipeError(f"'{each}' takes nothing away{suggest_or_list(name, known)}")
            found = kept
        elif each in GROUPS:
            known_rows = {row.recipe for row in found if row.label is None}
            names = sorted(groups.get(each, ()), key=lambda name: (name != "dense", name))
            found += [RowRequest(recipe=name) for name in names if name not in known_rows]
        else:
            found.append(RowRequest(recipe=each))
    return found


def _row(request: RowRequest, common: Mapping[str, Any]) -> Row:
    own = request.overrides
    sizes = set(SIZE_KEYS)
    shared = {
        key: value
        for key, value in common.items()
        # A row that names its own size is not given the other one as well.
        if not (key in sizes and sizes & own.keys())
    }
    written = load_recipe(request.recipe)
    label = request.label or written.name
    given = {**applicable(shared, written), **own} if written.method != "dense" else own
    recipe = load_recipe(request.recipe, given)
    refuse_unread(recipe, own)
    for key, (before, after) in recipe.overridden.items():
        if key not in SIZE_KEYS and before is not None:
            log.info("%s: %s is %s, the recipe's own is %s", label, key, after, before)
    return Row(label, recipe)


def _require_used(common: Mapping[str, Any], rows: Sequence[Row], asked: Collection[str]) -> None:
    made = [row for row in rows if row.recipe.method != "dense"]
    used = [applicable(common, row.recipe).keys() for row in made]
    unused = sorted(common.keys() - set().union(*used)) if used else []
    # Of a row's own size or value, the common one is not read.
    unused += [
        key
        for key in asked
        if key in common and all(unread_keys(row.recipe, [key]) for row in rows)
    ]
    if unused:
        labels = ", ".join(row.label for row in rows)
        raise RecipeError(
            f"'{unused[0]}' has no effect, because none of the rows ({labels}) reads it; leave it "
            "out, or add a row that reads it."
        )
