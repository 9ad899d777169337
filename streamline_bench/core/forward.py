"""Runs parts of a causal LM, from any layer boundary or up to one, and keeps hidden states.

Nothing of a model's own pass is rebuilt: it runs itself, and the layers' ``forward`` is replaced
where a part is left out. So masks, rotary embeddings, per-layer attention types, scalings and the
head are right for every family; what a bypassed layer costs is one function call.

Boundary ``l`` is the input of layer ``l``; boundary ``L`` the output of the last layer before the
final norm.

A streamed model (:mod:`.streaming`) is passed through with the layers outside and the batches
inside (:func:`walk`), so that each layer is read once.
"""

from __future__ import annotations

import itertools
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.state_store import BatchStore
from streamline_bench.core.streaming import held_layer
from streamline_bench.errors import ArchitectureError, NumericsError

TokenBatch: TypeAlias = tuple[Tensor, Tensor]
"""Token ids, int64 ``[batch, seq]``, and the mask, bool ``[batch, seq]``; both on the CPU."""


class PassEnded(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to end a pass of :func:`run_until`."""


class LayersEntangled(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a pass layer by layer where a layer hands on more than hidden states."""


_EMBEDDINGS = -1  # where a pass ends that is to give the states at boundary 0


@contextmanager
def evaluating(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout); every module's own mode back at the end.

    Args:
        frozen: let no parameter ask for gradients meanwhile.
    """
    training = [module for module in model.modules() if module.training]
    gradients = [(p, p.requires_grad) for p in model.parameters() if frozen]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute by another function; its own ``forward`` back at the end."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in what a layer gives: a tensor, or the first of several things."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def others_of(output: Any) -> Sequence[Any]:
    """Return what a layer gives besides its hidden states."""
    return output[1:] if isinstance(output, (tuple, list)) else ()


def with_hidden(output: Any, hidden: Tensor, rest: Sequence[Any] | None = None) -> Any:
    """Return what a layer gives, with other hidden states in it.

    Args:
        rest: the other things, in the place of those in ``output``; None for what is lacking.
    """
    if not isinstance(output, (tuple, list)):
        return hidden
    others = output[1:] if rest is None else [*rest, *[None] * len(output)][: len(output) - 1]
    return type(output)((hidden, *others))


def states_by_token(states: Tensor, shape: Sequence[int]) -> Tensor:
    """Return hidden states as ``[batch, seq, width]``.

    Models whose layers have several streams for each token (hyper-connections) give
    ``[batch, seq, streams, hidden]`` or ``[streams, batch, seq, hidden]``: the streams then lie
    side by side.

    Args:
        shape: ``(batch, seq)``.

    Raises:
        ArchitectureError: there is not one state for each token.
    """
    if tuple(states.shape[:2]) == tuple(shape):
        return states.flatten(2)
    if states.dim() == 4 and tuple(states.shape[1:3]) == tuple(shape):
        return states.permute(1, 2, 0, 3).flatten(2)
    raise ArchitectureError(
        f"The layers of this model have hidden states of shape {list(states.shape)} for "
        f"{list(shape)} tokens, so that they cannot be told apart by token; use a method that "
        "does not look at hidden states."
    )


def run_base(
    model: Any, ids: Tensor, mask: Tensor, module: Any = None, *, full_mask: bool = False
) -> Any:
    """Run a causal LM without its head, without a cache.

    Without pads the mask is left out, unless ``full_mask``: attention then takes its fastest path.

    Args:
        ids: int64 ``[batch, seq]``.
        mask: bool ``[batch, seq]``, true where there is a token.
        module: what is called; None: the model without its head.
    """
    device = model.get_input_embeddings().weight.device
    padded = full_mask or not bool(mask.all())
    called = model.get_submodule(architecture_of(model.config).base) if module is None else module
    return called(
        input_ids=sent(ids, device),
        attention_mask=sent(mask, device).long() if padded else None,
        use_cache=False,
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; CUDA is not waited for, so that the host runs ahead."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU; the function that is returned waits for the copy.

    On CUDA it waits for what was queued before, not for what is queued by the time it is called.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    held.copy_(tensor, non_blocking=True)
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return held

    return wait


def run_until(call: Callable[[], Any], handles: Iterable[Any]) -> None:
    """Run a pass that a hook may end by raising :class:`PassEnded`; then remove the hooks."""
    try:
        call()
    except PassEnded:
        return
    finally:
        for handle in handles:
            handle.remove()


class PartialForward:
    """Context in which a model can be run in parts; without gradients, in evaluation mode.

    Args:
        full_mask: give the model a mask without pads, too, as trainings do.

    Attributes:
        states: boundary -> hidden states ``[batch, seq, hidden]`` of the last recorded pass.
        handed: boundary -> what else the layer before it handed on (of routers, say).
    """

    def __init__(self, model: Any, *, full_mask: bool = False) -> None:
        self.states: dict[int, Tensor] = {}
        self.handed: dict[int, Sequence[Any]] = {}
        self._full_mask = full_mask
        self._model = model
        self._base = model.get_submodule(architecture_of(model.config).base)
        self._layers = list(decoder_layers(model))
        self._start = 0
        self._stop: int | None = None
        self._state: Tensor | None = None
        self._skip: Collection[int] = ()
        self._record = False
        self._form: Any = _UNKNOWN  # an output of a layer, without its tensors
        self._latest: Sequence[Any] = ()
        self._restored = ExitStack()

    def __enter__(self) -> PartialForward:
        self._restored.enter_context(evaluating(self._model))
        for index, layer in enumerate(self._layers):
            forward = self._bypass(index, layer.forward)
            self._restored.enter_context(replaced_forward(layer, forward))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restored.close()
        self.states, self.handed = {}, {}

    def logits(self, ids: Tensor, mask: Tensor, **where: Any) -> Tensor:
        """Return the logits ``[batch, seq, vocabulary]``; for ``where`` see :meth:`hidden`."""
        output: Tensor = self._run(self._model, ids, mask, **where).logits
        return output

    def hidden(self, ids: Tensor, mask: Tensor, **where: Any) -> Tensor:
        """Return the last hidden states ``[batch, seq, hidden]``, after the final norm.

        Args:
            ids: int64 ``[batch, seq]``.
            mask: bool ``[batch, seq]``, true where there is a token.
            start: boundary to enter at; the layers below it are not run.
            state: hidden states ``[batch, seq, hidden]`` at that boundary.
            handed: what else a layer gets there, see :attr:`handed`.
            skip: layers that pass their input on.
            record: keep the states at all boundaries that are run, in :attr:`states`.
            gradients: record the pass for a backward one.
        """
        output: Tensor = self._run(self._base, ids, mask, **where).last_hidden_state
        return output

    def embedded(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states at boundary 0, ``[batch, seq, hidden]``."""
        return self._ended_at(_EMBEDDINGS, ids, mask, None)

    def layer(
        self, index: int, ids: Tensor, mask: Tensor, state: Tensor, *, gradients: bool = False
    ) -> Tensor:
        """Return what one layer makes of the states at its boundary, ``[batch, seq, hidden]``.

        Args:
            gradients: record the layer for a backward pass.

        Raises:
            LayersEntangled: the layer hands more than hidden states on to later ones, or gets
                others than the layer before it gave.
        """
        with torch.set_grad_enabled(gradients):
            return self._ended_at(index, ids, mask, state)

    def _ended_at(self, stop: int, ids: Tensor, mask: Tensor, state: Tensor | None) -> Tensor:
        self._stop = stop
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and state is not None):
                self._pass(self._base, ids, mask, max(stop, 0), state)
        except PassEnded as ended:
            output: Tensor = ended.args[0]
            return output
        finally:
            self._stop = None
        raise RuntimeError(f"the pass has not come to layer {stop}")

    def _run(
        self,
        module: Any,
        ids: Tensor,
        mask: Tensor,
        *,
        start: int = 0,
        state: Tensor | None = None,
        handed: Sequence[Any] = (),
        skip: Collection[int] = (),
        record: bool = False,
        gradients: bool = False,
    ) -> Any:
        if (start > 0) != (state is not None):
            raise ValueError("a pass that starts above boundary 0 needs a state, others take none")
        with torch.set_grad_enabled(gradients):
            return self._pass(module, ids, mask, start, state, handed, skip, record)

    def _pass(
        self,
        module: Any,
        ids: Tensor,
        mask: Tensor,
        start: int,
        state: Tensor | None,
        handed: Sequence[Any] = (),
        skip: Collection[int] = (),
        record: bool = False,
    ) -> Any:
        self._start, self._state, self._skip, self._record = start, state, skip, record
        self._latest = handed
        if record:
            self.states, self.handed = {}, {}
        try:
            return run_base(self._model, ids, mask, module, full_mask=self._full_mask)
        finally:
            self._state, self._latest = None, ()

    def _bypass(self, index: int, original: Any) -> Any:
        last = index == len(self._layers) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden: Any = args[0] if args else kwargs["hidden_states"]
            if index < self._start:
                hidden = self._state
            else:
                if self._stop == _EMBEDDINGS:
                    raise PassEnded(hidden)
                if index == self._stop:
                    raise PassEnded(self._alone(original, args, kwargs))
                if self._record:
                    self.states[index], self.handed[index] = hidden, self._latest
            runs = index >= self._start and index not in self._skip
            # A layer that is left out runs once, to show the form of what layers give.
            output = original(*args, **kwargs) if runs or self._form is _UNKNOWN else self._form
            self._form = without_tensors(output)
            if runs:
                hidden = hidden_of(output)
                self._latest = others_of(output)
            else:
                output = with_hidden(output, hidden, self._latest)
            if last and self._record:
                self.states[index + 1] = hidden
            return output

        return forward

    def _alone(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run one layer on the given state, and make sure that nothing else is handed on."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._stop and hidden is not self._state:
            raise LayersEntangled  # something is done to the states between two layers
        if args:
            args = (self._state, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": self._state}
        before = _lengths(args, kwargs)
        output = original(*args, **kwargs)
        self._form = without_tensors(output)
        more = any(isinstance(each, Tensor) for each in others_of(output))
        if more or _lengths(args, kwargs) != before:
            raise LayersEntangled
        return hidden_of(output)


_UNKNOWN = object()


def without_tensors(output: Any) -> Any:
    """Return the form of what a layer gives: a tuple or list of as many Nones, or None."""
    several = isinstance(output, (tuple, list))
    return type(output)([None] * len(output)) if several else None


def _lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the lengths of a call's arguments in which a layer could leave something."""
    kinds = (MutableMapping, MutableSequence)
    return [len(value) for value in (*args, *kwargs.values()) if isinstance(value, kinds)]


def walk(
    model: Any,
    batches: Sequence[TokenBatch],
    layers: Sequence[int],
    *,
    progress: bool = True,
    description: str = "layers",
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (layer, batch number, ids, mask) with the layers outside and the batches inside.

    A layer of a streamed model is held while its batches go through it: it is read once.

    Args:
        layers: in the order in which they are wanted.
    """
    following = dict(itertools.pairwise(layers))
    with tqdm(
        total=len(layers) * len(batches), unit="batch", desc=description, delay=2,
        disable=not progress,
    ) as bar:  # fmt: skip
        for index in layers:
            with held_layer(model, index, following.get(index)):
                for number, (ids, mask) in enumerate(batches):
                    yield index, number, ids, mask
                    bar.update()


def walk_states(
    model: Any,
    batches: Sequence[TokenBatch],
    wanted: Collection[int],
    store: BatchStore,
    *,
    begin: Callable[[int], None] | None = None,
    visit: Callable[[int, int, Tensor, Tensor], None] | None = None,
    full_mask: bool = False,
    progress: bool = True,
    description: str = "layers",
) -> None:
    """Pass all batches through the layers, and keep their states at the wanted boundaries.

    Args:
        wanted: boundaries; layers above the topmost are not run.
        store: gets the states of batch ``number`` at a boundary as ``store[boundary, number]``.
        begin: called with the batch number before a batch goes through a layer.
        visit: called with layer, batch number and the states before and behind the layer.
        full_mask: see :class:`PartialForward`.

    Raises:
        LayersEntangled: layers hand more than hidden states on; nothing of use is stored.
    """
    device = model.get_input_embeddings().weight.device
    with torch.no_grad(), PartialForward(model, full_mask=full_mask) as forward:
        for number, (ids, mask) in enumerate(batches):
            store[0, number] = forward.embedded(ids, mask)
        for index, number, ids, mask in walk(
            model, batches, range(max(wanted)), progress=progress, description=description
        ):
            if begin is not None:
                begin(number)
            state = store.load((index, number), device)
            store[index + 1, number] = behind = forward.layer(index, ids, mask, state)
            if index not in wanted:
                store.drop((index, number))
            if visit is not None:
                visit(index, number, state, behind)


def entangled(model: Any) -> ArchitectureError:
    """Return the error that says that layers cannot be run one by one."""
    model_type = architecture_of(model.config).model_type
    return ArchitectureError(
        f"Layers of this '{model_type}' model hand on more than hidden states, so that they cannot "
        "be run one by one; use placement resident."
    )


def require_finite_states(states: Mapping[int, Tensor], last: Tensor, mask: Tensor) -> None:
    """Refuse a model that computes NaN or infinity, and name the first place.

    Args:
        states: boundary -> hidden states ``[batch, seq, hidden]``, from the bottom upwards.
        last: what comes out at the top, ``[batch, seq, …]``: states after the final norm, or
            logits.
        mask: bool ``[batch, seq]``; pads do not count.

    Raises:
        NumericsError: some are NaN or infinite.
    """
    if bool(torch.isfinite(last).all()):
        return
    for boundary, tensor in (*states.items(), (None, last)):
        tensor = states_by_token(tensor, mask.shape)
        if not bool(torch.isfinite(tensor[mask.to(tensor.device)]).all()):
            place = "the final norm or the LM head"
            if boundary is not None:
                place = f"layer {boundary - 1}" if boundary else "the embeddings"
            raise NumericsError(
                f"The model computes NaN or infinity from {place} on; check the weights there and "
                "the calibration text, or compute in float32 or bfloat16."
            )
