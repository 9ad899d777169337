"""Requests that cannot be trained, refused before anything is computed or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.recipe.schema import ReplacementSpec, TrainingSpec
from streamline_bench.core.recipe.suggestions import suggest
from streamline_bench.errors import RecipeError, SparsityError

__all__ = ["QUIRKS", "check_block", "check_quirks"]

QUIRKS: Mapping[str, str] = {
    "bidirectional_layer": "a layer is trained by MSE without a causal mask",
    "schedule_per_accumulation": "the schedule spans half the micro-batches and advances once per "
    "optimizer step (mse: an eighth of it is used) or per micro-batch (lm: it wraps)",
    "postnorm_target": "the target is taken after the final norm if the block ends at the last "
    "layer",
}
"""Deviations of the reference implementation that ``reference_quirks`` can switch on."""


def check_quirks(quirks: Sequence[str], spec: ReplacementSpec, training: TrainingSpec) -> None:
    """Refuse quirks that do not exist or that would change nothing.

    Raises:
        RecipeError: a quirk is unknown, or says nothing about this kind or objective.
    """
    for quirk in quirks:
        if quirk not in QUIRKS:
            known = ", ".join(QUIRKS)
            raise RecipeError(
                f"Reference quirk '{quirk}' is unknown{suggest(quirk, QUIRKS)} (known: {known})."
            )
    if "bidirectional_layer" in quirks and (spec.kind != "layer" or training.objective != "mse"):
        raise RecipeError(
            "Reference quirk 'bidirectional_layer' concerns kind 'layer' trained by 'mse', not "
            f"'{spec.kind}' by '{training.objective}'; leave it out."
        )
    if "postnorm_target" in quirks and training.objective != "mse":
        raise RecipeError("Reference quirk 'postnorm_target' concerns objective 'mse'.")


def check_block(model: nn.Module, start: int, n: int, spec: ReplacementSpec) -> None:
    """Refuse a block outside the model, or a replacement that does not fit into it.

    Raises:
        SparsityError, RecipeError: as said.
    """
    depth = len(decoder_layers(model))
    if n < 1 or start < 0 or start + n > depth:
        raise SparsityError(
            f"The block of {n} layers from layer {start} is not inside a model of {depth} layers."
        )
    if spec.kind == "none":
        raise RecipeError("Replacement kind 'none' has nothing to train; name another kind.")
    if spec.kind == "layer" and spec.layers > n:
        raise RecipeError(
            f"replacement.layers is {spec.layers}, more than the {n} layers that are removed; "
            "lower it."
        )
