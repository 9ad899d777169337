"""Where a gradient became NaN or infinite."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["gradient_fault"]

_IN_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")


def gradient_fault(gradients: Mapping[str, Tensor | None]) -> str | None:
    """Return where NaN or infinity arose, as ``'self_attn.q_proj' in layer 3``; None: nowhere.

    A gradient that is no number spoils those of all layers below it on its way down, so that the
    topmost place is the one to look at.

    Args:
        gradients: name of a parameter (``model.layers.3.self_attn.q_proj.weight``) -> its gradient,
            from the bottom of the model to its top; None: it got none.
    """
    faulty = [
        _place(name)
        for name, gradient in gradients.items()
        if gradient is not None and not bool(torch.isfinite(gradient).all())
    ]
    if not faulty:
        return None
    topmost = faulty[-1][0]
    places = itertools.takewhile(lambda place: place[0] == topmost, reversed(faulty))
    return list(places)[-1][1]


def _place(name: str) -> tuple[str, str]:
    """Return (layer, or the name itself outside of layers; description)."""
    name = name.removesuffix(".weight")
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        return name, f"'{name}'"
    return found[1], f"'{found[2]}' in layer {found[1]}"
