"""Which layers of a model can be removed, and which methods apply to it, from its config alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamline_bench.core.architecture import architecture_of, depth_of
from streamline_bench.core.surgery import pruned_config
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.base import METHODS


def removable_layers(config: Any) -> dict[int, str]:
    """Try to remove each layer alone; return the reason for each that cannot be.

    Raises:
        ArchitectureError: the family is not supported.
    """
    refused: dict[int, str] = {}
    depth = depth_of(config)
    if depth < 2:
        return {0: "It is the only layer."}
    for layer in range(depth):
        try:
            pruned_config(config, [index for index in range(depth) if index != layer])
        except ArchitectureError as error:
            refused[layer] = str(error)
    return refused


def methods_for(config: Any, refused: Mapping[int, str]) -> dict[str, str]:
    """Return for each method why it does not apply; nothing where it does.

    Args:
        refused: from :func:`removable_layers`.
    """
    from streamline_bench.methods.experts.expert_pruning import mixture_of
    from streamline_bench.methods.maps.magnitude_compensation import refuse_unscalable
    from streamline_bench.methods.maps.replaceme import refuse_normed_mlp
    from streamline_bench.methods.width.stream_width import stream_axes
    from streamline_bench.modeling.rotations import require_rotatable
    from streamline_bench.modeling.sublayers import require_sublayers
    from streamline_bench.modeling.widths import require_narrowable

    row = architecture_of(config)

    def require_narrowable_stream() -> None:
        require_narrowable(row)
        stream_axes(config)

    without_removal: Mapping[str, Callable[[], Any]] = {
        "block_pruner": lambda: require_sublayers(config, row, "attention"),
        "dense": lambda: None,
        "expert_pruning": lambda: mixture_of(config),
        "flap": lambda: require_narrowable(row),
        "llm_pruner": lambda: require_narrowable(row),
        "minitron": require_narrowable_stream,
        "slicegpt": lambda: require_rotatable(config),
        "sublayer_drop": lambda: require_sublayers(config, row, "attention"),
    }
    folded: Mapping[str, Callable[[], Any]] = {
        "magnitude_compensation": lambda: refuse_unscalable(row),
        "replaceme": lambda: refuse_normed_mlp(row),
    }
    found = {}
    for name in METHODS:
        reason = _reason(without_removal[name]) if name in without_removal else ""
        if name not in without_removal and len(refused) == depth_of(config):
            reason = next(iter(refused.values()))
        if name in folded:
            reason = reason or _reason(folded[name])
        found[name] = reason
    return found


def _reason(check: Callable[[], Any]) -> str:
    try:
        check()
    except ArchitectureError as error:
        return str(error)
    return ""
