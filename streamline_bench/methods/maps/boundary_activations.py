"""States around a removed block: before it, after it, and the output of the MLP before it.

For a block of layers ``s .. s + n - 1`` the stream that reaches what follows is ``h_s`` where it
used to be ``h_{s+n}``. Layer ``s - 1`` wrote its MLP's output M into it last: ``h_s = Y + c M``,
with c = 1 in most families. Rows stream by batch after batch; nothing is kept, and pads are left
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of, decoder_layers, get_submodule
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import hidden_of, run_base
from streamline_bench.core.scan.scan import BoundaryRecorder
from streamline_bench.core.scan.similarity import Block
from streamline_bench.errors import ArchitectureError

_ROUNDING = 4  # units of the dtype's epsilon that two sums of the same terms may differ by


@dataclass(frozen=True)
class BoundaryRows:
    """States of some tokens around one block, each ``[rows, hidden]`` in the model's dtype.

    Attributes:
        stream: ``h_s``, what enters the block.
        target: ``h_{s+n}``, what leaves it, before any final norm.
        mlp: what the MLP of layer ``s - 1`` added to the stream (c M); None for a block at layer 0
            or where it was not asked for.
    """

    stream: Tensor
    target: Tensor
    mlp: Tensor | None = None


def boundary_rows(
    model: Any,
    tokens: CalibrationTokens,
    blocks: Sequence[Block],
    *,
    scales: Sequence[float] | None = None,
    batch_size: int = 1,
    progress: bool = True,
    description: str = "boundaries",
) -> Iterator[list[BoundaryRows]]:
    """Run the model over the tokens and yield, per batch, the rows of every block.

    Args:
        model: the intact causal LM, in evaluation mode. Its LM head is not run.
        scales: c of :func:`mlp_scale` per block; None: the MLPs are not looked at.
    """
    layers = decoder_layers(model)
    hosts = [layers[block.start - 1] for block in blocks] if scales is not None else []
    with (
        torch.no_grad(),
        BoundaryRecorder(model) as recorder,
        _MLPOutputs(model, hosts) as outputs,
        tqdm(
            total=tokens.num_tokens, unit="tok", desc=description, delay=2, disable=not progress
        ) as bar,
    ):
        for ids, mask in tokens.batches(batch_size, trim=True):
            run_base(model, ids, mask)
            states, kept = recorder.states, mask.reshape(-1)
            rows = []
            for number, block in enumerate(blocks):
                stream = _rows(states[block.start], kept)
                mlp = None
                if scales is not None:
                    mlp = _rows(outputs.latest[number], kept) * scales[number]
                rows.append(BoundaryRows(stream, _rows(states[block.stop], kept), mlp))
            yield rows
            bar.update(int(mask.sum()))


def mlp_scale(model: Any, layer: int, tokens: CalibrationTokens) -> float:
    """Return c of ``output = Y + c M`` for one layer, measured on the first sequence.

    The layer is run with its MLP's output as it is and set to zero: the difference must be a
    multiple of M, or else something stands between the MLP and the stream.

    Args:
        layer: index of a decoder layer.

    Raises:
        ArchitectureError: the layer does not add its MLP's output to the stream.
    """
    ids, mask = next(tokens.batches(1, trim=True))
    kept = mask.reshape(-1)
    host = decoder_layers(model)[layer]
    with torch.no_grad(), BoundaryRecorder(model) as recorder:
        with _MLPOutputs(model, [host]) as outputs:
            run_base(model, ids, mask)
        mlp = _rows(outputs.latest[0], kept).double()
        whole = _rows(recorder.states[layer + 1], kept)
        epsilon = torch.finfo(whole.dtype).eps
        whole = whole.double()
        with _silenced(model, host):
            run_base(model, ids, mask)
        rest = _rows(recorder.states[layer + 1], kept).double()
    if not bool(mlp.any()):
        return 1.0
    scale = float(((whole - rest) * mlp).sum() / mlp.square().sum())
    size = max(float(whole.norm()), float(rest.norm()))
    if float((whole - rest - scale * mlp).norm()) > _ROUNDING * epsilon * size:
        model_type = architecture_of(model.config).model_type
        raise ArchitectureError(
            f"Layer {layer} of this '{model_type}' model does not add its MLP's output to the "
            "residual stream (something acts on it first), so that no map can be folded into the "
            "MLP; use linear_patch or ridge_map, which put it behind the layer."
        )
    return 1.0 if abs(scale - 1) <= _ROUNDING * epsilon else scale


class _MLPOutputs:
    """Context in which ``latest[i]`` is the last output of the MLP of ``hosts[i]``."""

    def __init__(self, model: Any, hosts: Sequence[nn.Module]) -> None:
        self.latest: list[Tensor] = [torch.empty(0)] * len(hosts)
        self._modules = [_mlp_module(model, host) for host in hosts]
        self._handles: list[Any] = []

    def __enter__(self) -> _MLPOutputs:
        for number, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(self._store(number)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _store(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.latest[number] = hidden_of(output)

        return hook


@contextmanager
def _silenced(model: Any, host: nn.Module) -> Iterator[None]:
    """The MLP of a layer gives zeros."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handle = _mlp_module(model, host).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _mlp_module(model: Any, layer: nn.Module) -> nn.Module:
    """Return what gives the MLP's output; where there is no MLP module, its last projection."""
    family = architecture_of(model.config)
    return get_submodule(layer, family.mlp or family.down)


def _rows(states: Tensor, kept: Tensor) -> Tensor:
    """Return a copy of the states ``[rows, hidden]`` without those of padding."""
    return states.reshape(len(kept), -1)[kept.to(states.device)]
