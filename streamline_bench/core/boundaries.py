"""Hidden states at the boundaries of a model's layers, batch after batch.

A model in memory is run once per batch. Of a streamed model each layer is read once: all batches
go through it before the next one, and the states that are wanted are kept until the end.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import architecture_of, config_entry, decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import (
    LayersEntangled,
    TokenBatch,
    hidden_of,
    run_base,
    states_by_token,
    walk_states,
    with_hidden,
)
from streamline_bench.core.similarity import LastState
from streamline_bench.core.state_store import BatchStore, state_store, states_bytes
from streamline_bench.core.streaming import is_streamed
from streamline_bench.errors import ArchitectureError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoundaryPass:
    """What one batch gave; valid until the next one.

    Attributes:
        mask: bool ``[batch, seq]``, on the CPU.
        states: hidden states by boundary, each ``[batch, seq, hidden]``; one tensor
            ``[L + 1, batch, seq, hidden]`` where all boundaries are wanted.
        outputs: number of a watched module -> its output ``[batch, seq, hidden]``.
    """

    mask: Tensor
    states: Any
    outputs: Mapping[int, Tensor] = field(default_factory=dict)


@contextmanager
def boundary_passes(
    model: Any,
    tokens: CalibrationTokens,
    batch_size: int,
    *,
    last_state: LastState = "raw",
    wanted: Collection[int] | None = None,
    watched: Sequence[tuple[int, nn.Module]] = (),
    work: Path | None = None,
    progress: bool = True,
) -> Iterator[Iterator[BoundaryPass]]:
    """Give an iterator over the batches of the tokens; run it without gradients.

    Args:
        wanted: boundaries; None: all. Layers above the topmost may be left out.
        watched: (layer, module of that layer) whose outputs are wanted.
        work: folder for states of a streamed model that exceed the memory.

    Raises:
        ArchitectureError: the states of this model cannot be compared with each other.
        OutputError: the states of a streamed model exceed the memory and the disk.
    """
    recorder = BoundaryRecorder(model, last_state)
    batches = list(tokens.batches(batch_size, trim=True))
    with ExitStack() as stack:
        outputs = stack.enter_context(latest_outputs([module for _, module in watched]))
        if is_streamed(model):
            every = range(len(decoder_layers(model)) + 1)
            kept = sorted(every if wanted is None else wanted)
            count = len(kept) + 1 + len(watched)
            size = count * states_bytes(model, batches)
            store = stack.enter_context(state_store(model, size, work))
            layers = [layer for layer, _ in watched]
            try:
                _fill(model, batches, kept, layers, outputs, store, progress)
            except LayersEntangled:
                log.warning(
                    "Layers of this model hand on more than hidden states: each is read once per "
                    "batch, %d times.", len(batches),
                )  # fmt: skip
            else:
                yield _stored(recorder, batches, kept, len(watched), store, wanted is None)
                return
        with recorder:
            yield _recorded(model, batches, recorder, outputs)


def _fill(
    model: Any,
    batches: Sequence[TokenBatch],
    kept: Sequence[int],
    layers: Sequence[int],
    outputs: Mapping[int, Tensor],
    store: BatchStore,
    progress: bool,
) -> None:
    """Take all batches through the layers; keep their states and the outputs of modules."""

    def visit(layer: int, number: int, *_: Tensor) -> None:
        for watched, place in enumerate(layers):
            if place == layer:
                store["output", watched, number] = outputs[watched]

    walk_states(model, batches, kept, store, visit=visit, progress=progress)


def _stored(
    recorder: BoundaryRecorder,
    batches: Sequence[TokenBatch],
    kept: Sequence[int],
    watched: int,
    store: BatchStore,
    whole: bool,
) -> Iterator[BoundaryPass]:
    for number, (_, mask) in enumerate(batches):
        states: dict[int, Tensor] = {}
        for place in kept:
            state = store.load((place, number), recorder.device)
            if recorder.norm is not None and place == recorder.depth:
                state = recorder.norm(state)
            if whole:
                recorder.store(place, state)
            else:
                states[place] = state
        outputs = {n: store.load(("output", n, number), recorder.device) for n in range(watched)}
        yield BoundaryPass(mask, recorder.states if whole else states, outputs)


def _recorded(
    model: Any,
    batches: Sequence[TokenBatch],
    recorder: BoundaryRecorder,
    outputs: Mapping[int, Tensor],
) -> Iterator[BoundaryPass]:
    for ids, mask in batches:
        run_base(model, ids, mask)
        yield BoundaryPass(mask, recorder.states, outputs)


@contextmanager
def latest_outputs(
    modules: Sequence[nn.Module], *, silenced: bool = False
) -> Iterator[dict[int, Tensor]]:
    """Yield number of a module -> its last output; silenced modules give zeros instead."""
    latest = dict[int, Tensor]()

    def watch(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            latest[number] = hidden_of(output)
            if not silenced:
                return None
            zeros = torch.zeros_like(latest[number])
            return with_hidden(output, zeros)

        return hook

    handles = [module.register_forward_hook(watch(i)) for i, module in enumerate(modules)]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


class BoundaryRecorder:
    """Context in which each forward pass of a model fills :attr:`states`.

    Own hooks instead of ``output_hidden_states``: they see the raw output of the last layer, work
    whether a layer returns a tensor or a tuple, and copy into one buffer that every pass reuses.

    ``states`` is ``[L + 1, batch, seq, hidden]`` in the dtype of the hidden states, on the first
    layer's device; it is valid until the next pass. Where layers have several streams for each
    token, these lie side by side (:func:`.forward.states_by_token`).

    Attributes:
        depth: number of layers.
        norm: the final norm where the last state is taken behind it; else None.

    Raises:
        ArchitectureError: the states of this model cannot be compared with each other.
    """

    def __init__(self, model: Any, last_state: LastState = "raw") -> None:
        if config_entry(model.config, "rotations"):
            raise ArchitectureError(
                "The hidden states of a sliced model (SliceGPT) have another basis and width at "
                "every boundary and cannot be compared; give the original model."
            )
        self._layers = decoder_layers(model)
        self.depth = len(self._layers)
        self.device = model.get_input_embeddings().weight.device
        row = architecture_of(model.config)
        self._base: Any = model.get_submodule(row.base)
        path = row.final_norm
        # OPT-350m has no final norm: the attribute is there and None.
        within, _, name = path.rpartition(".")
        norm: Any = model.get_submodule(within)._modules.get(name)
        self.norm = norm if last_state == "postnorm" else None
        self._buffer: Tensor | None = None
        self._tokens: torch.Size | None = None
        self._shape: torch.Size = torch.Size()
        self._handles: list[Any] = []

    @property
    def states(self) -> Tensor:
        """The states of the last pass, ``[L + 1, batch, seq, hidden]``."""
        if self._buffer is None:
            raise RuntimeError("no forward pass has been recorded")
        return self._buffer[:, : self._shape.numel()].view(-1, *self._shape)

    def __enter__(self) -> BoundaryRecorder:
        for module, hook in ((self._base, self._begin), (self._layers[0], self._before_first)):
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._after(index + 1)))
        if self.norm is not None:
            self._handles.append(self.norm.register_forward_hook(self._after(len(self._layers))))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._tokens = (args[0] if args else kwargs["input_ids"]).shape

    def _before_first(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.store(0, args[0] if args else kwargs["hidden_states"])

    def _after(self, boundary: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            self.store(boundary, hidden_of(output))

        return hook

    def store(self, boundary: int, hidden: Tensor) -> None:
        """Put in the states at one boundary; those at boundary 0 begin a new batch.

        Raises:
            ArchitectureError: they differ in width from those at boundary 0.
        """
        hidden = states_by_token(hidden, hidden.shape[:2] if self._tokens is None else self._tokens)
        if boundary == 0:
            self._shape = hidden.shape
            if self._buffer is None or self._buffer.shape[1] < hidden.numel():
                self._buffer = None  # freed before the larger one is made
                self._buffer = hidden.new_empty((self.depth + 1, hidden.numel()))
        assert self._buffer is not None
        if hidden.shape != self._shape:
            raise ArchitectureError(
                f"The states of this model have {self._shape[-1]} channels between its layers and "
                f"{hidden.shape[-1]} behind its final norm, so that they cannot be compared; take "
                "last_state 'raw'."
            )
        self._buffer[boundary, : hidden.numel()].copy_(hidden.reshape(-1))
