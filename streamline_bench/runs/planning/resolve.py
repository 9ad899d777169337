"""From a request to a plan: every name looked up, every default filled in, every content hashed."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamline_bench.core.checkpoint.folder import file_sha256
from streamline_bench.core.machine.environment import found_device, known_device, package_versions
from streamline_bench.core.recipe.validation import wrong_value
from streamline_bench.errors import RecipeError
from streamline_bench.harness.tasks.asked_tasks import refuse_unknown, task_folders
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
from streamline_bench.runs.planning.questions import evaluations, own_folders
from streamline_bench.runs.planning.request import AXES, Request
from streamline_bench.runs.planning.rows import Row, refuse_unknown_names, resolve_rows

log = logging.getLogger(__name__)


def resolve_plan(
    request: Request,
    *,
    device: str | None = None,
    asked: Collection[str] = (),
    progress: bool = True,
    run: Path | None = None,
    there: Plan | None = None,
) -> Plan:
    """Return the plan of a request (StreamlineBenchError: something in it cannot be used).

    Args:
        device: used where the request leaves it open.
        asked: see :func:`resolve_rows`.
        run: the run folder, whose measured speeds targets may ask for.
        there: its plan. A row that was solved for a target before keeps its size, and the sizes
            that a search added stay.
    """
    # What was mistyped is refused first: all that follows imports torch.
    refuse_unknown_names(request)
    own = own_folders(request)
    refuse_unknown(request.task_names, task_folders(own))
    rows = resolve_rows(request, asked)
    from streamline_bench.compression.pipeline import content_key
    from streamline_bench.harness.trunk.stack import tokenizer_sha256
    from streamline_bench.modeling.loading import SourceModel, computing_dtype
    from streamline_bench.runs.planning.models import checkpoint_plan, model_plan
    from streamline_bench.runs.search import solved_row

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
    evaluation, *more = evaluations(request, own, first_model=source.name)

    def planned(row: Row) -> PlanRow:
        model: ModelPlan | None
        size, axes = dict[str, Any](), dict(row.axes)
        if row.checkpoint is not None:
            model = checkpoint_plan(row.label, row.checkpoint, progress=progress)
            key = digest(["checkpoint", model.model_dump(mode="json", exclude={"name"})])
            recipe = None
        else:
            of_row = sources[row.model]
            model = None if row.model == 0 else model_plan(of_row)
            kind = computing_dtype(request.dtype, where, of_row.reader)
            made, size = solved_row(row, of_row, run, there, where, kind)
            key = content_key(of_row, made, device=where, dtype=request.dtype)
            recipe = made.model_dump(mode="json")
            axes |= {name: value for name, value in size.items() if name in AXES}
        return PlanRow(
            label=row.label,
            dense=row.is_dense,
            recipe=recipe or {},
            key=key,
            checkpoint=row.checkpoint is not None,
            model=model,
            reference=row.reference or (dense[row.model] if row.model else None),
            target=row.target.model_dump(exclude_none=True) if row.target else {},
            size=size,
            group=row.group,
            axes=axes,
            published=row.published,
        )

    def same(names: str) -> dict[str, Any]:
        return {name: getattr(request, name) for name in names.split()}

    names = " and ".join(Path(name).name for name in request.models)
    first = model_plan(source)
    own_rows = tuple(planned(row) for row in rows)
    return Plan(
        title=request.title or f"{names} without some of its layers",
        model=first.name,
        weights_sha256=first.weights_sha256,
        tokenizer_sha256=tokenizer_sha256(source.folder),
        nbytes=first.nbytes,
        reference=dense[0],
        rows=(*own_rows, *_searched(request, there, own_rows, source, where)),
        evaluation=evaluation.questions,
        more=tuple(each.questions for each in more),
        task_data={k: v for each in (evaluation, *more) for k, v in each.task_data.items()},
        device=where,
        search=request.search,
        workload=_workload(request),
        **_load(request),
        noise=_noise(request, [each.questions for each in (evaluation, *more)]),
        text=_text(request, source.folder),
        versions=package_versions(),
        **same("revision dtype trust_remote_code threads throughput environment metrics pairs"),
    )


def _searched(
    request: Request, there: Plan | None, rows: Sequence[PlanRow], source: Any, device: str
) -> Sequence[PlanRow]:
    """The rows that a search in the run folder added before."""
    from streamline_bench.runs.search import added_before

    if not request.search:
        return ()
    how: dict[str, Any] = {"search": request.search, "device": device, "dtype": request.dtype}
    return added_before(there, rows, source, **how)


_OF_BATCHES = ("batch_sizes", "rounds", "warmup_rounds")


def _workload(request: Request) -> dict[str, Any]:
    """Return the complete workload, so that a later default changes no run."""
    if request.throughput == "none":
        return {}
    from streamline_bench.throughput.workload import Workload

    useless = next((name for name in _OF_BATCHES if name in request.workload), None)
    if request.throughput == "serve" and useless is not None:
        raise RecipeError(
            f"--workload {useless} has no effect on a server, which takes requests of --load; "
            "leave it out."
        )
    try:
        return Workload.model_validate(request.workload).model_dump(mode="json")
    except ValidationError as error:
        raise RecipeError(f"--workload: {wrong_value(error, Workload)}") from None


def _load(request: Request) -> dict[str, Any]:
    """Return the plan's fields on a server: the complete load, and the hash of the prompts."""
    if request.throughput != "serve":
        if request.load:
            raise RecipeError("--load has no effect here; it needs --throughput serve.")
        return {}
    from streamline_bench.throughput.load import ServingLoad, read_prompts, require_own_tokens
    from streamline_bench.throughput.workload import Workload

    try:
        load = ServingLoad.model_validate(request.load)
    except ValidationError as error:
        raise RecipeError(f"--load: {wrong_value(error, ServingLoad)}") from None
    workload = Workload.model_validate(request.workload)
    if load.prompts == "random":
        require_own_tokens(load, workload.prompt_tokens)
        return {"load": load.model_dump(mode="json")}
    path = Path(load.prompts).expanduser().resolve()
    load = load.model_copy(update={"prompts": str(path)})
    read_prompts(load, workload.output_tokens)
    return {"load": load.model_dump(mode="json"), "prompts_sha256": file_sha256(path)}


def _noise(request: Request, asked: Sequence[Evaluation]) -> tuple[NoisePlan, ...]:
    """Every way of scoring the dense model again changes one thing only.

    vLLM has a noise of its own: what it computes together changes from call to call. It is measured
    without being asked for.
    """
    size, engine = asked[0].batch_size, asked[0].engine
    wanted = request.noise_floor or any(
        (request.noise_batch_size, request.noise_dtype, request.noise_engine)
    )
    scored = next((each for each in asked if each.engine == "vllm"), None)
    if not wanted and scored is not None:
        other = _other_batch_size(scored.batch_size)
        only = None if all(each.engine == "vllm" for each in asked) else "vllm"
        noise = {"name": f"batch-size-{other}", "label": f"vLLM again, batch size {other}",
                 "batch_size": other, "dtype": request.dtype, "only_engine": only}  # fmt: skip
        return (NoisePlan.model_validate(noise),)
    other_size = _other_batch_size(size) if request.noise_floor else None
    changes = {
        "batch_size": request.noise_batch_size or other_size,
        "dtype": request.noise_dtype,
        "engine": request.noise_engine,
    }
    usual = {"batch_size": size, "dtype": request.dtype}
    found = []
    for key, value in changes.items():
        if not value:
            continue
        if value == {**usual, "engine": engine}.get(key):
            raise RecipeError(
                f"--noise-{key.replace('_', '-')} is {value}, which is the value of all rows; give "
                "another one, so that it shows the noise."
            )
        label = f"batch size {value}" if key == "batch_size" else value
        name = re.sub(r"[^A-Za-z0-9.]+", "-", label)
        found.append(NoisePlan.model_validate({"name": name, "label": label, **usual, key: value}))
    if request.noise_dtype:
        dtype_name(request.noise_dtype)  # refused here as --dtype is
    if request.noise_engine == "vllm":
        from streamline_bench.modeling.vllm.package import require_vllm

        require_vllm("--noise-engine vllm")
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
