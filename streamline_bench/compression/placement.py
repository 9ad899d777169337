"""Where the source model's weights are while a recipe is carried out."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.machine.environment import free_memory
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import RecipeError
from streamline_bench.methods.base import get_method
from streamline_bench.modeling.loading import SourceModel, dtype_name

log = logging.getLogger(__name__)

Placement = Literal["auto", "resident", "streamed"]
"""``resident``: the whole model in memory. ``streamed``: one layer at a time, read from the
checkpoint. ``auto``: resident where it fits. The result is the same."""

PLACEMENTS: tuple[str, ...] = get_args(Placement)

_ROOM = 0.7
"""Share of the free memory that a resident model's weights may take; the rest is for states."""


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


def is_streamed_placement(
    placement: str, source: SourceModel, recipe: Recipe, device: str, dtype: str | None
) -> bool:
    """Return whether the model is streamed, and say why in the log.

    Args:
        placement: one of :data:`PLACEMENTS`; ``auto`` streams what does not fit into memory.
        device: torch device that computes.
        dtype: of the weights in memory; None for float32.
    """
    import torch

    refuse_placement(placement, recipe)
    kind = dtype_name(dtype)
    needed = source.reader.num_parameters * getattr(torch, kind).itemsize
    free = free_memory(device)
    facts = f"weights: {needed / 1e9:.3g} GB as {kind}; free on {device}: {free / 1e9:.3g} GB"
    if placement != "auto":
        log.info("placement: %s, as asked (%s)", placement, facts)
        return placement == "streamed"
    if needed <= _ROOM * free:
        log.info("placement: resident (%s)", facts)
        return False
    reason = _resident_only(recipe) or _inseparable(source)
    if reason:
        log.warning("placement: resident although memory may not suffice, because %s (%s)",
                    reason, facts)  # fmt: skip
        return False
    log.info("placement: streamed, one layer at a time (%s)", facts)
    return True


def _resident_only(recipe: Recipe) -> str:
    """Return why a recipe needs the whole model in memory; empty if it does not."""
    if recipe.recovery is not None:
        return f"its recovery ({recipe.recovery.kind}) trains the whole model"
    if not get_method(recipe.method).streams(recipe):
        return f"method '{recipe.method}' needs the whole model for it"
    return ""


def _inseparable(source: SourceModel) -> str:
    from streamline_bench.core.architecture_guard import facts_of

    shared = any(facts_of(source.config, architecture_of(source.config)).shared)
    return "layers of this model share weights" if shared else ""
