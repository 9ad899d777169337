"""What goes into modules of a model's layers, over calibration tokens.

A model in memory runs whole, batch by batch; a streamed one layer by layer, so that each layer is
read once. Both give the same inputs in the same order of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import (
    LayersEntangled,
    TokenBatch,
    entangled,
    evaluating,
    run_base,
    sent,
    walk_states,
)
from streamline_bench.core.state_store import state_store, states_bytes
from streamline_bench.core.streaming import is_streamed
from streamline_bench.errors import ArchitectureError, NumericsError

Visitor: TypeAlias = Callable[..., None]
"""Called with layer, path of the module in it, and its inputs ``[tokens, width]`` without pads."""


def visit_inputs(
    model: Any,
    wanted: Mapping[int, Sequence[str]],
    tokens: CalibrationTokens,
    visit: Visitor,
    *,
    batch_size: int = 1,
    by_sequence: bool = False,
    work: Path | None = None,
    progress: bool = True,
) -> None:
    """Show the inputs of modules to ``visit``, batch by batch; the layer has its weights then.

    Args:
        model: a causal LM, in memory or streamed.
        wanted: layer -> paths of modules in it.
        by_sequence: call ``visit`` with the inputs of each sequence, not of each batch.
        work: folder for states of a streamed model that exceed the memory.

    Raises:
        ArchitectureError: a module is not called when its layer runs, or the layers of a streamed
            model cannot be run one by one.
    """
    batches = list(tokens.batches(batch_size, trim=True))
    inputs = _Inputs(visit, by_sequence)
    with torch.no_grad(), evaluating(model), ExitStack() as hooks:
        for layer, paths in wanted.items():
            for path in paths:
                module = decoder_layers(model)[layer].get_submodule(path)
                handle = module.register_forward_pre_hook(
                    inputs.hook(layer, path), with_kwargs=True
                )
                hooks.callback(handle.remove)
        if is_streamed(model):
            _by_layer(model, max(wanted), batches, inputs, work, progress)
        else:
            from tqdm import tqdm

            for ids, mask in tqdm(
                batches, unit="batch", desc="activations", delay=2, disable=not progress
            ):
                inputs.begin(mask)
                run_base(model, ids, mask)
    for layer, paths in wanted.items():
        for path in paths:
            if (layer, path) not in inputs.seen:
                raise ArchitectureError(
                    f"Layer {layer} of this model runs without calling '{path}', so that what goes "
                    "into it cannot be seen; use another method."
                )


class _Inputs:
    """Hooks that give the inputs of modules to a visitor.

    Attributes:
        seen: the modules that have been called.
    """

    def __init__(self, visit: Visitor, by_sequence: bool) -> None:
        self._tokens: Tensor | None = None
        self._lengths: list[int] | None = None
        self._by_sequence = by_sequence
        self.seen: set[tuple[int, str]] = set()
        self._visit = visit

    def begin(self, mask: Tensor) -> None:
        """Take the mask of the next batch, bool ``[batch, seq]`` on the CPU.

        Only where there are pads are rows gathered; an accelerator is not asked where.
        """
        whole = bool(mask.all())
        self._tokens = None if whole else mask.reshape(-1).nonzero().view(-1)
        self._lengths = mask.sum(dim=1).tolist() if self._by_sequence else None

    def hook(self, layer: int, path: str) -> Callable[[Any, Any, Any], None]:
        def before(module: Any, args: Any, named: Any) -> None:
            tensors = [each for each in (*args, *named.values()) if isinstance(each, Tensor)]
            self.seen.add((layer, path))
            rows = [self._rows(each) for each in tensors]
            if self._lengths is None:
                self._visit(layer, path, *rows)
                return
            for sequence in zip(
                *(each.split_with_sizes(self._lengths) for each in rows), strict=True
            ):
                self._visit(layer, path, *sequence)

        return before

    def _rows(self, values: Tensor) -> Tensor:
        rows = values.reshape(-1, values.shape[-1])
        if self._tokens is None:
            return rows
        return rows.index_select(0, sent(self._tokens, rows.device))


def _by_layer(
    model: Any,
    last: int,
    batches: Sequence[TokenBatch],
    inputs: _Inputs,
    work: Path | None,
    progress: bool,
) -> None:
    with state_store(model, 2 * states_bytes(model, batches), work) as store:
        try:
            walk_states(
                model, batches, {last + 1}, store, progress=progress, description="activations",
                begin=lambda number: inputs.begin(batches[number][1]),
            )  # fmt: skip
        except LayersEntangled:
            raise entangled(model) from None


class Moments:
    """Mean and variance of the rows that were added, per column, merged in float64.

    Attributes:
        count: rows.
        mean: float64 ``[width]``, on the device of the rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows ``[n, width]``."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        count, mean = len(wide), wide.mean(dim=0)
        squares = (wide - mean).square().sum(dim=0).double()
        mean = mean.double()
        if not self.count:
            self.count, self.mean, self._squares = count, mean, squares
            return
        total, apart = self.count + count, mean - self.mean
        self._squares += squares + apart.square() * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    def variance(self, layer: int) -> Tensor:
        """Return the unbiased variance, float64 ``[width]`` on the CPU.

        Raises:
            NumericsError: it is NaN or infinite; the layer is named.
        """
        variance = (self._squares / max(self.count - 1, 1)).cpu()
        require_finite(variance, layer)
        return variance


def require_finite(sums: Tensor, layer: int) -> None:
    """Refuse sums over activations that are NaN or infinite.

    Raises:
        NumericsError: naming the layer.
    """
    if not bool(torch.isfinite(sums).all()):
        raise NumericsError(
            f"Activations of layer {layer} are NaN or infinite; check the weights up to there and "
            "the calibration text, or compute in float32 or bfloat16."
        )
