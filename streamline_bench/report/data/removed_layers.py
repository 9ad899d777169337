"""Layers that were removed: one block or several, and how a sentence names them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_start", "layer_runs", "named_layers"]


def layer_runs(removed: Sequence[int]) -> list[tuple[int, int]]:
    """``[2, 4, 5, 6]`` -> ``[(2, 2), (4, 6)]``: first and last of every stretch of neighbours."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(removed):
        if runs and layer == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def block_start(removed: Sequence[int]) -> int | None:
    """The first layer, where all are one block; None where they are apart or none."""
    runs = layer_runs(removed)
    return runs[0][0] if len(runs) == 1 else None


def named_layers(removed: Sequence[int]) -> str:
    """``[2, 4, 5, 6]`` -> ``layers 2, 4 to 6``; an empty string for none."""
    runs = ", ".join(
        str(first) if first == last else f"{first} to {last}" for first, last in layer_runs(removed)
    )
    return f"layer{'s' if len(removed) > 1 else ''} {runs}" if runs else ""
