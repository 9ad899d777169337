"""Decides by numbers, not by names, which shortcuts give the model's own logits.

Two questions are put to a model when it is first used: does running the LM head on chosen
positions change anything, and do branching rows? A short cut that fails is switched off and the
reason is logged. Branching rows are checked again, on real rows, whenever a longer one than ever
before turns up, because a window of attention may only show beyond a certain length.
"""

from __future__ import annotations

from typing import Any

import torch

from streamline_bench.errors import (
    ResourceError,
    StreamlineBenchError,
    first_line,
    library_errors,
)
from streamline_bench.harness.scoring.forward import BatchTensors, Forward, tensors_of
from streamline_bench.harness.scoring.packing import PackedRow, Query

_WINDOW_KEYS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 8e-3}


def attention_window(config: Any) -> int | None:
    """Return the smallest attention window a config names, in tokens, or None."""
    sizes = [getattr(config, key, None) for key in _WINDOW_KEYS]
    windows = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(windows, default=None)


def synthetic_row(vocabulary: int) -> PackedRow:
    """Return a small tree: a trunk of six tokens, branches below it, one of them forking."""
    tokens = [(7919 * i + 13) % vocabulary for i in range(16)]
    trunk = tokens[:6]
    row = PackedRow()
    row.add(Query(0, [*trunk, *tokens[6:9]], tokens[:4]), 0)
    row.add(Query(1, [*trunk, *tokens[9:13]], tokens[:5]), 6)
    row.add(Query(2, [*trunk, *tokens[9:11], tokens[14]], tokens[:4]), 8)
    return row


def head_objection(forward: Forward, vocabulary: int) -> str | None:
    """Return why the LM head must not be run on chosen positions only, or None."""
    rows = []
    for query in (Query(0, [i % vocabulary for i in range(7)], [1, 2, 3]), Query(1, [5], [1])):
        row = PackedRow()
        row.add(query, 0)
        rows.append(row)
    batch = tensors_of(rows)
    plain = forward.all_logits(batch.ids)
    chosen, refusal = _tried(forward, batch)
    if chosen is None:
        return refusal
    if plain.shape[:2] != batch.ids.shape:
        return f"it gives logits of shape {tuple(plain.shape)} for ids {tuple(batch.ids.shape)}"
    return _difference(chosen, plain.flatten(0, 1)[batch.wanted.to(plain.device)])


def _tried(forward: Forward, batch: BatchTensors) -> tuple[torch.Tensor | None, str]:
    """The logits on chosen positions; None, and why, where the model does not give them.

    Raises:
        ResourceError: memory ran out, which says nothing about the model.
    """
    try:
        with library_errors("The model was tried"):
            return forward.wanted_logits(batch), ""
    except ResourceError:
        raise
    except StreamlineBenchError as error:
        return None, first_line(error.__cause__ or error)


def packing_objection(forward: Forward, row: PackedRow) -> str | None:
    """Return why a branching row gives other logits than its longest members alone, or None."""
    packed, refusal = _tried(forward, tensors_of([row]))
    if packed is None:
        return f"it refuses a mask and positions ({refusal})"
    wanted = tensors_of([row]).wanted
    longest = sorted(row.scored, key=lambda pair: len(pair[0].inputs))[-2:]
    for query, nodes in longest:
        plain = forward.all_logits(torch.tensor([list(query.inputs)]))[0, -len(nodes) :]
        at = torch.searchsorted(wanted, torch.from_numpy(nodes)).to(packed.device)
        objection = _difference(packed[at], plain)
        if objection:
            return objection
    return None


def _difference(ours: torch.Tensor, plain: torch.Tensor) -> str | None:
    if not torch.isfinite(plain).all():
        return None  # Damaged weights are reported by whoever asked for the scores.
    tolerance = _TOLERANCE.get(plain.dtype, 5e-5)
    if plain.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, 5e-3)
    gap = (ours.float() - plain.float().to(ours.device)).abs()
    scale = max(1.0, float(plain.float().abs().max()))
    if float(gap.max()) <= tolerance * scale and float(gap.mean()) <= tolerance * scale / 4:
        return None
    return f"its logits change by up to {float(gap.max()):.2g}"
