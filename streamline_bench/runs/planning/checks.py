"""What would make jobs fail later is refused before the first one starts."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from streamline_bench.core.recipe.schema import CalibrationSpec, Recipe
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import (
    CalibrationError,
    CheckpointError,
    OutputError,
    RecipeError,
    ResourceError,
    SparsityError,
    few,
)
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.planning.plan import Plan, PlanRow
from streamline_bench.runs.planning.rows import read_texts

_FEW = 8
"""Sequences that are read of a source of which any number will do."""


def check_before(plan: Plan, run: RunPaths, execution: Execution, *, until: str) -> None:
    """Refuse a plan that this machine, its disk or the data cannot serve (StreamlineBenchError).

    Args:
        until: ``compress`` needs nothing that only the evaluation needs.
    """
    from streamline_bench.core.checkpoint.folder import resolve_pretrained
    from streamline_bench.core.checkpoint.reader import CheckpointReader

    folder = resolve_pretrained(plan.model, plan.revision)
    size = CheckpointReader(folder).stored_bytes
    largest = max(size, *(row.model.nbytes or 0 for row in plan.rows if row.model), 0)
    todo = [row for row in plan.rows if row.made_here and not run.checkpoint(row.place).exists()]
    here = execution.executor == "local"
    _check_depth(folder, plan, todo)
    _check_disk(plan, run, size, todo)
    if until != "compress":
        _check_names(plan, run)
        if plan.throughput in ("vllm", "serve"):
            from streamline_bench.modeling.vllm.package import require_vllm

            require_vllm(f"--throughput {plan.throughput}")
        if here and plan.device == "cpu":
            _check_memory(plan, largest, execution.job_slots)
        for wanted in {each.apply_chat_template for each in plan.evaluations}:
            if wanted:
                _check_chat_template(plan, folder, wanted)
    if here:
        _check_placement(plan, todo, execution)
    _check_calibration(plan, folder, todo)


def _check_depth(folder: Path, plan: Plan, todo: Sequence[PlanRow]) -> None:
    from streamline_bench.core.architecture import depth_of
    from streamline_bench.modeling.loading import load_config

    counted = {row.label: Recipe.model_validate(row.recipe).n_layers for row in todo}
    if not any(counted.values()):
        return
    depth = depth_of(load_config(folder, trust_remote_code=plan.trust_remote_code))
    for row in (row for row in todo if row.model is None):
        asked = counted[row.label]
        if asked is not None and asked >= depth:
            raise SparsityError(
                f"Row {row.label} cannot be made: {plan.model} has {depth} layers, so that "
                f"{asked} cannot be removed; give a smaller --n-layers."
            )


def _check_names(plan: Plan, run: RunPaths) -> None:
    """The harness makes one file name of a model's whole path."""
    most = os.pathconf(run.there, "PC_NAME_MAX")
    for row in plan.rows:
        own = run.checkpoint(row.place)
        model = str(own) if row.made_here else plan.source(row).name
        # As lm_eval.utils.sanitize_model_name does, without importing it.
        too_many = len(re.sub(r'["<>:/|\\?*\[\]]+', "__", model).encode()) - most
        if too_many > 0:
            where = "--output" if row.made_here else "model's folder"
            raise OutputError(
                f"The path {model} is too long: the harness names a file after it, which may have "
                f"{most} bytes; give a {where} that is {too_many} bytes shorter."
            )


def _check_disk(plan: Plan, run: RunPaths, size: int, todo: Sequence[PlanRow]) -> None:
    # Half of the parameters, if a recipe names no sparsity.
    shares = [(row, Recipe.model_validate(row.recipe).sparsity) for row in todo]
    needed = sum(
        (row.model.nbytes or size if row.model else size) * (1 - (0.5 if share is None else share))
        for row, share in shares
    )
    free = shutil.disk_usage(run.there).free
    if needed > free:
        raise OutputError(
            f"{run.root} needs about {_size(needed)} for {len(todo)} checkpoints, and "
            f"{_size(free)} are free there; free some space, or give another --output."
        )


def _check_memory(plan: Plan, size: int, jobs_at_a_time: int) -> None:
    """A model's weights must fit, once for each job; what comes on top is not counted."""
    import psutil

    needed = size * jobs_at_a_time
    free = psutil.virtual_memory().available
    if needed > free:
        jobs = f" for each of {jobs_at_a_time} jobs" if jobs_at_a_time > 1 else ""
        fewer = "give fewer --workers" if jobs_at_a_time > 1 else "use a smaller model"
        raise RecipeError(
            f"{plan.model} needs {_size(size)} of memory{jobs}, and {_size(free)} are free; "
            f"{fewer}, or free some memory."
        )


def _check_placement(plan: Plan, todo: Sequence[PlanRow], execution: Execution) -> None:
    """Every recipe whose result is not in the cache must fit into the memory of one of the jobs."""
    from streamline_bench.compression.cache import cached_folder, is_whole
    from streamline_bench.compression.placement import refuse_unfitting
    from streamline_bench.core.machine.environment import free_memory
    from streamline_bench.modeling.loading import SourceModel, computing_dtype

    jobs, device = execution.job_slots, plan.device
    free = {"cpu": memory_per_job(execution) or free_memory("cpu")}
    if device != "cpu":
        free[device] = _free_on_gpus(device, execution.gpus)
    sources: dict[str, SourceModel] = {}
    for row in todo:
        if is_whole(cached_folder(row.key)):
            continue
        named = plan.source(row)
        source = sources.setdefault(
            named.name,
            SourceModel.find(
                named.name, named.revision, trust_remote_code=named.trust_remote_code,
                progress=False,
            ),
        )  # fmt: skip
        recipe = Recipe.model_validate(row.recipe)
        dtype = computing_dtype(plan.dtype, device, source.reader)
        try:
            refuse_unfitting(execution.placement, source, recipe, device, dtype, free)
        except (RecipeError, ResourceError) as error:
            fewer = f" Its memory is shared by {jobs} jobs; fewer --workers leave more."
            shared = fewer if jobs > 1 and isinstance(error, ResourceError) else ""
            raise type(error)(f"Row {row.label} cannot be made: {error}{shared}") from None


def memory_per_job(execution: Execution) -> int | None:
    """Return bytes of this machine's memory for each of several jobs; None: they are not shared."""
    from streamline_bench.core.machine.environment import free_memory

    shared = execution.executor == "local" and execution.job_slots > 1
    return free_memory("cpu") // execution.job_slots if shared else None


def _free_on_gpus(device: str, gpus: Sequence[str]) -> int:
    """Return what is free on the fullest GPU, as the driver says; without it, no limit.

    CUDA itself would keep memory of the GPU as long as this process runs.
    """
    from streamline_bench.throughput.meters import open_device, visible_device

    found, _ = open_device(",".join(gpus) or visible_device(device))
    free = found.free_bytes() if found is not None else None
    return sys.maxsize if free is None else free


def _check_chat_template(plan: Plan, folder: Path, wanted: bool | str) -> None:
    from streamline_bench.modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(folder, trust_remote_code=plan.trust_remote_code)
    known = getattr(tokenizer, "chat_template", None)
    if not known:
        raise CheckpointError(
            f"{plan.model} has no chat template; leave --apply-chat-template out, or add one to "
            "the model's tokenizer."
        )
    if wanted is True:
        return
    names = list(known) if isinstance(known, dict) else []
    if wanted not in names:
        hint = suggest_or_list(str(wanted), names) if names else (
            "; it has one template, without a name: give --apply-chat-template."
        )  # fmt: skip
        raise CheckpointError(f"{plan.model} has no chat template '{wanted}'{hint}")


def _check_calibration(plan: Plan, folder: Path, todo: Sequence[PlanRow]) -> None:
    """Read from every source that a row uses, each once: a little, or all that must be there."""
    from streamline_bench.core.data.calibration import load_calibration
    from streamline_bench.core.data.corpora import SELF
    from streamline_bench.core.data.own_texts import count_of
    from streamline_bench.methods.recovery.instruction_data import load_instructions
    from streamline_bench.modeling.loading import load_config, load_tokenizer

    users: dict[CalibrationSpec, list[str]] = {}
    for row in todo:
        for spec in read_texts(Recipe.model_validate(row.recipe)):
            users.setdefault(spec, []).append(row.label)
    if not users:
        return
    tokenizer = load_tokenizer(folder, trust_remote_code=plan.trust_remote_code)
    config = load_config(folder, trust_remote_code=plan.trust_remote_code)
    longest = getattr(config, "max_position_embeddings", None)
    for spec in users:
        if spec.source == SELF:
            count_of(spec, spec.length_within(longest))
            continue
        read = load_instructions if spec.form == "instruction" else load_calibration
        some = {} if spec.tokens else {"samples": min(spec.samples or _FEW, _FEW)}
        try:
            read(
                spec.model_copy(update=some),
                tokenizer,
                model_folder=folder,
                max_length=longest,
                progress=False,
            )
        except CalibrationError as error:
            labels = [
                label for each in users if each.source == spec.source for label in users[each]
            ]
            raise CalibrationError(
                f"Row {few(labels, 1)} cannot be made: {error} Give --calibration with text that "
                "is there, such as a .jsonl or .txt file."
            ) from None


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{max(number, 1e5) / 1e6:.1f} MB"
