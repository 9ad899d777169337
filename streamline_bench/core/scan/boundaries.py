"""Records the hidden states at all layer boundaries of one forward pass.

Own hooks instead of ``output_hidden_states``: they see the raw output of the last layer, work
whether a layer returns a tensor or a tuple, and copy into one buffer that every pass reuses.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import architecture_of, config_entry, decoder_layers
from streamline_bench.core.scan.similarity import LastState
from streamline_bench.errors import ArchitectureError

__all__ = ["BoundaryRecorder"]


class BoundaryRecorder:
    """Context in which each forward pass of a model fills :attr:`states`.

    ``states`` is ``[L + 1, batch, seq, hidden]`` in the dtype of the hidden states, on the first
    layer's device; it is valid until the next pass.

    Raises:
        ArchitectureError: the states of this model cannot be compared with each other.
    """

    def __init__(self, model: nn.Module, last_state: LastState = "raw") -> None:
        if config_entry(model.config, "rotations"):
            raise ArchitectureError(
                "The hidden states of a sliced model (SliceGPT) have another basis and width at "
                "every boundary and cannot be compared; give the original model."
            )
        self._layers = decoder_layers(model)
        path = architecture_of(model.config).final_norm
        # OPT-350m has no final norm: the attribute is there and None.
        norm = model.get_submodule(path.rpartition(".")[0])._modules.get(path.rpartition(".")[2])
        self._norm = norm if last_state == "postnorm" else None
        self._buffer: Tensor | None = None
        self._shape: torch.Size = torch.Size()
        self._handles: list[Any] = []

    @property
    def states(self) -> Tensor:
        """The states of the last pass, ``[L + 1, batch, seq, hidden]``."""
        if self._buffer is None:
            raise RuntimeError("no forward pass has been recorded")
        return self._buffer[:, : self._shape.numel()].view(-1, *self._shape)

    def __enter__(self) -> BoundaryRecorder:
        first = self._layers[0].register_forward_pre_hook(self._before_first, with_kwargs=True)
        self._handles.append(first)
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._after(index + 1)))
        if self._norm is not None:
            self._handles.append(self._norm.register_forward_hook(self._after(len(self._layers))))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before_first(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._shape = hidden.shape
        rows = len(self._layers) + 1
        if self._buffer is None or self._buffer.shape[1] < hidden.numel():
            self._buffer = None  # freed before the larger one is made
            self._buffer = hidden.new_empty((rows, hidden.numel()))
        self._store(0, hidden)

    def _after(self, boundary: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            self._store(boundary, output[0] if isinstance(output, tuple) else output)

        return hook

    def _store(self, boundary: int, hidden: Tensor) -> None:
        assert self._buffer is not None
        self._buffer[boundary, : hidden.numel()].copy_(hidden.reshape(-1))
