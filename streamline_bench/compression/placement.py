"""Where the source model's weights are while a recipe is carried out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from streamline_bench.compression.forecast import (
    LOGITS,
    Forecast,
    as_gb,
    forecast,
    through_model,
    trained,
)
from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.data.corpora import SELF
from streamline_bench.core.machine.environment import free_memory
from streamline_bench.core.machine.ranks import on_this_machine
from streamline_bench.core.recipe.schema import Recipe, TrainingSpec
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.core.state_store import MEMORY_SHARE
from streamline_bench.core.training.sharding import division
from streamline_bench.errors import (
    OutputError,
    RecipeError,
    ResourceError,
    first_line,
    out_of_memory,
)
from streamline_bench.methods.base import get_method
from streamline_bench.modeling.loading import SourceModel, dtype_name

log = logging.getLogger(__name__)

Placement = Literal["auto", "resident", "streamed"]
"""``resident``: the whole model in memory. ``streamed``: one layer at a time, read from the
checkpoint. ``auto``: resident where it fits. The result is the same. Where processes divide the
weights of a model in training, it is that of the passes before."""

PLACEMENTS: tuple[str, ...] = get_args(Placement)

_ROOM = 0.9
"""Share of the free memory that may be planned for."""


def refuse_placement(placement: str, recipe: Recipe) -> None:
    """Refuse a placement that does not exist, or that the recipe cannot be carried out with.

    Raises:
        RecipeError: it is one of them.
    """
    if placement not in PLACEMENTS:
        raise RecipeError(
            f"Unknown placement '{placement}'{suggest_or_list(placement, PLACEMENTS)}"
        )
    if placement == "streamed" and (reason := _resident_only(recipe)):
        raise RecipeError(
            f"Recipe '{recipe.name}' cannot be carried out with placement streamed: {reason}; use "
            "placement resident."
        )


@dataclass(frozen=True)
class Decision:
    """Where the weights are, and what that takes.

    Attributes:
        forecast: of the memory.
        reason: why this placement.
        free: bytes that are free, of ``cpu`` and of the device that computes.
        disk: bytes of the disk that files may take; None: it was not looked at.
    """

    forecast: Forecast
    reason: str
    free: Mapping[str, int]
    disk: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether the weights are read layer by layer."""
        return self.forecast.streamed

    @property
    def name(self) -> str:
        """The placement."""
        return "streamed" if self.streamed else "resident"


def decide_placement(
    placement: str,
    source: SourceModel,
    recipe: Recipe,
    device: str,
    dtype: str | None,
    work: Path | None = None,
    held: int = 0,
    memory: int | None = None,
) -> Decision:
    """Choose where the weights are, from headers and free memory, and say so in the log.

    Micro-batches of a training that do not fit are computed in halves, or parts of these.

    Args:
        placement: one of :data:`PLACEMENTS`; ``auto`` streams what does not fit into memory.
        device: torch device that computes.
        dtype: of the weights in memory; None for float32.
        work: folder of files (hidden states that exceed the memory, logits of the dense model,
            the model before its recovery); None: the disk is not looked at.
        held: bytes that an interrupted attempt left there, to be taken up or replaced.
        memory: bytes of this machine's memory that may be taken; None: all that is free.

    Raises:
        RecipeError: the placement does not exist, or the recipe cannot be carried out with it.
        ResourceError: with ``auto``, the memory suffices for none.
        OutputError: the disk has no room for these files.
    """
    free = {name: free_memory(name) for name in ("cpu", device)}
    free["cpu"] = free["cpu"] if memory is None else min(memory, free["cpu"])
    if trained(recipe) is not None:  # by all processes of a launch, each with its own model
        free["cpu"] //= on_this_machine()
    chosen, reason, fits = _chosen(placement, source, recipe, device, dtype, free)
    decision = Decision(chosen, reason, free, None if work is None else _free_disk(work) + held)
    _say(decision, recipe, fits, device)
    if work is not None:
        _require_disk(decision, recipe, work)
    return decision


def refuse_unfitting(
    placement: str,
    source: SourceModel,
    recipe: Recipe,
    device: str,
    dtype: str | None,
    free: Mapping[str, int],
) -> None:
    """Refuse what :func:`decide_placement` would refuse with so much memory.

    Args:
        free: bytes of ``cpu`` and of the device.

    Raises:
        RecipeError, ResourceError: as there.
    """
    _chosen(placement, source, recipe, device, dtype, free)


def _chosen(
    placement: str,
    source: SourceModel,
    recipe: Recipe,
    device: str,
    dtype: str | None,
    free: Mapping[str, int],
) -> tuple[Forecast, str, bool]:
    """Return the forecast of what is chosen, why it is, and whether it fits."""
    refuse_placement(placement, recipe)

    def tried_with(streamed: bool) -> list[Forecast]:
        where: dict[str, Any] = {"device": device, "dtype": dtype, "streamed": streamed}
        where["budget"] = int(MEMORY_SHARE * free["cpu"])
        return [forecast(source, recipe, **where, at_once=size) for size in _parts(recipe)]

    tried = tried_with(placement == "streamed")
    fitting = [each for each in tried if _fits(each, free, device)]
    reason = "as asked"
    if placement == "auto":
        need, have = _tightest(tried[0], free, device)
        reason = f"the whole model needs {need / 1e9:.3g} GB of {have / 1e9:.3g} GB free"
        if not fitting:
            reason += ", so one layer at a time"
            apart = _resident_only(recipe) or _inseparable(source)
            tried = tried if apart else tried_with(True)
            fitting = [each for each in tried if _fits(each, free, device)]
            if not fitting:
                raise _fits_nowhere(source, recipe, device, dtype, tried[-1], free, apart)
    return (fitting or tried)[0], reason, bool(fitting)


@contextmanager
def within_memory(decision: Decision, device: str) -> Iterator[None]:
    """Turn running out of memory into one sentence that says what was needed and what helps.

    Raises:
        ResourceError: the memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        helps = "fewer or shorter sequences, or dtype bfloat16"
        if not decision.streamed:
            helps = f"placement streamed, if the recipe allows it, {helps}"
        raise ResourceError(
            f"The memory ran out with placement {decision.name} ({first_line(error)}); the "
            f"forecast was {describe(decision, device)}; take {helps}."
        ) from error


def _say(decision: Decision, recipe: Recipe, fits: bool, device: str) -> None:
    chosen = decision.forecast
    log.info("placement: %s, %s", decision.name, decision.reason)
    log.info("memory: %s", describe(decision, device))
    if not fits:
        need, have = _tightest(chosen, decision.free, device)
        log.warning(
            "memory may not suffice: %.3g GB are needed and %.3g GB are free on %s",
            need / 1e9, have / 1e9, device,
        )  # fmt: skip
    spec = trained(recipe)
    if spec is not None and chosen.at_once not in (None, spec.batch_size):
        log.info("training: %s", _step(spec, chosen.at_once))
    if chosen.reads[0]:
        log.info("reading: %s", _reading(chosen))


def describe(decision: Decision, device: str) -> str:
    """Return what is needed and what is free, by part, in 10^9 bytes."""
    chosen, free = decision.forecast, decision.free
    rows = [
        f"{_gb(sum(parts.values()))} GB of {_gb(free[name])} GB free on {name} ({as_gb(parts)})"
        for name, parts in ((device, chosen.device), ("cpu", chosen.host))
        if parts
    ]
    if chosen.processes > 1:
        rows.append(f"in each of {chosen.processes} processes")
    if chosen.files:
        rows.append(f"{_gb(chosen.file_bytes)} GB on disk ({as_gb(chosen.files)})")
    return f"{'; '.join(rows)}; the most in stage '{chosen.stage}'"


def decision_table(decision: Decision, recipe: Recipe, device: str, dtype: str) -> str:
    """Return the decision with what is needed and what is free, line by line, in 10^9 bytes."""
    chosen, free = decision.forecast, decision.free
    lines = [
        f"placement   {decision.name}: {decision.reason}",
        f"weights     {dtype} on {device}",
        f"most memory {chosen.stage}",
    ]
    if chosen.processes > 1:
        lines.append(f"processes   {chosen.processes}, of which each needs:")
    places = [(device, chosen.device, free[device]), ("cpu", chosen.host, free["cpu"])]
    if decision.disk is not None:
        places.append(("disk", chosen.files, decision.disk))
    for place, parts, have in places:
        if not parts:
            continue
        lines.append(f"{place}: need {_gb(sum(parts.values()))} GB, have {_gb(have)} GB")
        rows = sorted(parts.items(), key=lambda item: -item[1])
        lines += [f"  {_gb(size):>9}  {name}" for name, size in rows]
    spec = trained(recipe)
    if spec is not None:
        lines.append(f"training: {_step(spec, chosen.at_once)}")
    if chosen.reads[0]:
        lines.append(f"reading: {_reading(chosen)}")
    return "\n".join(lines)


def _step(spec: TrainingSpec, at_once: int | None) -> str:
    """Return in words how an optimizer step is computed."""
    said = f"micro-batches of {spec.batch_size} sequences, {spec.gradient_accumulation} per step"
    if at_once is not None and at_once < spec.batch_size:
        said += f"; computed {at_once} at a time, which changes nothing but the rounding"
    return said


def _reading(chosen: Forecast) -> str:
    """Return in words what a training on the states of a streamed model reads."""
    times, size = chosen.reads
    return (
        f"the training's states need the layers up to the replacement {times} times, {_gb(size)} "
        "GB at most (a larger training.cache_gb: fewer)"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"


def _parts(recipe: Recipe) -> list[int | None]:
    """Return how many sequences may be computed together, the recipe's own number first."""
    spec = trained(recipe)
    if spec is None:
        return [None]
    sizes = [spec.batch_size]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return list(sizes)


def _needs(each: Forecast, free: Mapping[str, int], device: str) -> list[tuple[int, int]]:
    """Return (needed, free) of each memory."""
    return [(each.device_bytes, free[device]), (each.host_bytes, free["cpu"])]


def _fits(each: Forecast, free: Mapping[str, int], device: str) -> bool:
    return all(need <= _ROOM * have for need, have in _needs(each, free, device))


def _tightest(each: Forecast, free: Mapping[str, int], device: str) -> tuple[int, int]:
    return max(_needs(each, free, device), key=lambda pair: pair[0] / max(pair[1], 1))


def _fits_nowhere(
    source: SourceModel,
    recipe: Recipe,
    device: str,
    dtype: str | None,
    least: Forecast,
    free: Mapping[str, int],
    apart: str,
) -> ResourceError:
    """Return the error that says what is needed, what is free, and what helps."""
    need, have = _tightest(least, free, device)
    half = forecast(
        source, recipe, device=device, dtype="bfloat16", streamed=least.streamed,
        at_once=least.at_once, budget=int(MEMORY_SHARE * free["cpu"]),
    )  # fmt: skip
    if dtype_name(dtype) == "float32" and _fits(half, free, device):
        helps = "give dtype bfloat16"
    elif apart:
        helps = f"it cannot be read layer by layer, because {apart}: take another recipe"
        if through_model(recipe) and device != "cpu":
            helps += ", or divide it among GPUs (accelerate launch with FSDP2 or ZeRO-3)"
    elif least.processes > 1 and through_model(recipe):
        helps = "give shorter sequences, or more GPUs with FSDP2 or ZeRO-3"
    else:
        helps = "give fewer or shorter sequences"
    parts = as_gb(least.device if least.device and need == least.device_bytes else least.host)
    each = f" in each of {least.processes} processes" if least.processes > 1 else ""
    return ResourceError(
        f"Recipe '{recipe.name}' needs {need / 1e9:.3g} GB of memory{each} for {source.folder} "
        f"({parts}), and {have / 1e9:.3g} GB are free; {helps}, take a machine with more memory, "
        f"or placement {'streamed' if least.streamed else 'resident'} to try it all the same."
    )


def _free_disk(work: Path) -> int:
    place = next(path for path in (work, *work.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free


def _require_disk(decision: Decision, recipe: Recipe, work: Path) -> None:
    chosen, free = decision.forecast, decision.disk
    if free is None or chosen.file_bytes <= free:
        return
    helps = "lower kd.top_k, or " if LOGITS in chosen.files else ""
    raise OutputError(
        f"Recipe '{recipe.name}' needs {_gb(chosen.file_bytes)} GB on disk while it works "
        f"({as_gb(chosen.files)}), and the disk of {work} has {_gb(free)} GB free; free space, "
        f"{helps or 'or '}give fewer or shorter sequences."
    )


def _resident_only(recipe: Recipe) -> str:
    """Return why a recipe needs the whole model in memory; empty if it does not."""
    if recipe.recovery is not None and division().moments == 1:
        return f"its recovery ({recipe.recovery.kind}) trains the whole model"
    if SELF in recipe.data_sources:
        return "the model writes its own texts (source self)"
    if not get_method(recipe.method).streams(recipe):
        return f"method '{recipe.method}' needs the whole model for it"
    return ""


def _inseparable(source: SourceModel) -> str:
    from streamline_bench.core.architecture_guard import facts_of

    shared = any(facts_of(source.config, architecture_of(source.config)).shared)
    return "layers of this model share weights" if shared else ""
