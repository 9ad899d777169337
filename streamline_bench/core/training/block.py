"""A block of layers in training: the intact model as teacher, its replacement as student.

The replacement must see what it will see when deployed: the same causal and padding mask, the same
rotary angles. So nothing is rebuilt by hand. The parent itself runs, a hook takes the arguments
with which it calls the block's first layers, and the pass ends after the block's last layer: later
layers, final norm and LM head are never run. The student's weights are float32, and it is called
as the parent calls its layers.

The teacher gives the states around the block anew each time, or they come from a file that it
filled once. The file is keyed by weights, tokens and block. A small JSON describes it and is
written last, so that a half-written file is never taken for a whole one.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.files import atomic_write_text, sync_path
from streamline_bench.core.forward import (
    LayersEntangled,
    PassEnded,
    entangled,
    hidden_of,
    others_of,
    run_until,
    sent,
    walk_states,
    with_hidden,
    without_tensors,
)
from streamline_bench.core.machine.ranks import current
from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.replacement import ReplacementNetwork, build_network
from streamline_bench.core.state_store import (
    BatchStore,
    create_mapped,
    open_mapped,
    state_store,
    states_bytes,
)
from streamline_bench.core.streaming import held_layer, layer_copy
from streamline_bench.core.training.batch import Batch, make_batch
from streamline_bench.core.training.sharding import put, whole
from streamline_bench.errors import ArchitectureError, OutputError

log = logging.getLogger(__name__)

LayerCall: TypeAlias = dict[str, Any]
"""The keyword arguments of one layer's call, without the hidden states."""


def layer_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
    """Name the positional arguments too; the first argument is the hidden states."""
    names = list(inspect.signature(layer.forward).parameters)
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    named.pop(names[0])
    return named


@dataclass(frozen=True)
class BlockStates:
    """States around a block: ``hidden`` and ``target`` ``[batch, seq, d]``; calls of its layers."""

    hidden: Tensor
    target: Tensor
    calls: tuple[LayerCall, ...]


class LayerForm:
    """The form in which a model's layers hand on hidden states: alone, or first of several things.

    Attributes:
        others: whether the other things are tensors (of routers, say), which a later layer reads.
    """

    def __init__(self, output: Any) -> None:
        self._output = without_tensors(output)
        self.others = any(isinstance(item, Tensor) for item in others_of(output))
        self._latest: Any = ()

    @classmethod
    def of(cls, model: nn.Module) -> LayerForm:
        """Look at what the first layer of a causal LM gives."""
        found: list[LayerForm] = []

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            found.append(cls(output))
            raise PassEnded

        layer = decoder_layers(model)[0]
        ids = torch.zeros((1, 2), dtype=torch.long, device=next(layer.parameters()).device)
        handle = layer.register_forward_hook(after)
        run_until(lambda: model(input_ids=ids, use_cache=False), [handle])
        return found[0]

    def give(self, hidden: Tensor) -> Any:
        """Return hidden states in that form, with what the layer before handed on."""
        return with_hidden(self._output, hidden, self._latest)

    def saw(self, output: Any) -> None:
        """Keep what a layer hands on for the next ones."""
        self._latest = others_of(output)

    @contextmanager
    def following(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """See what these layers hand on while they run."""
        handles = [each.register_forward_hook(lambda _m, _a, out: self.saw(out)) for each in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Passthrough(nn.Module):
    """Stands in a layer's slot and hands the hidden states on, in the form the host expects."""

    def __init__(self, host: nn.Module, form: LayerForm) -> None:
        super().__init__()
        self._host = (host,)  # in a tuple, so that it is not a child
        self._form = form
        self.call: LayerCall | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some stacks read attributes of their layers
            return getattr(self.__dict__["_host"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = layer_call(self._host[0], args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return self._form.give(hidden)


class Teacher:
    """Runs the parent up to the end of a block.

    Args:
        model: the intact causal LM.
        start, n: the block is layers ``start .. start + n - 1``.
        calls: of how many of its first layers the call arguments are wanted.
        postnorm: if the block ends at the last layer, give the target after the final norm.
    """

    def __init__(
        self, model: nn.Module, start: int, n: int, calls: int, postnorm: bool = False
    ) -> None:
        row = architecture_of(model.config)
        self._stack: nn.Module = model.get_submodule(row.base)
        self._layers = decoder_layers(model)
        self._form = LayerForm.of(model)
        config: Any = model.config
        self._hidden_size = int(config.hidden_size)
        self._start, self._n, self._calls = start, n, calls
        ends_model = start + n == len(self._layers)
        self._norm = model.get_submodule(row.final_norm) if postnorm and ends_model else None
        self.model = model

    def states_of(self, batches: Sequence[Batch], store: BatchStore, *, progress: bool) -> None:
        """Put the states of a streamed model's batches into a store, layer by layer.

        Those of batch ``i`` before the block are ``store[start, i]``, behind it ``store[stop, i]``.

        Raises:
            ArchitectureError: the layers of this model cannot be run one by one.
        """
        pairs = [(batch.ids, batch.mask) for batch in batches]
        stop = self._start + self._n
        try:
            walk_states(
                self.model, pairs, {self._start, stop}, store, full_mask=True, progress=progress,
                description="hidden states",
            )  # fmt: skip
        except LayersEntangled:
            raise entangled(self.model) from None

    def stored(self, batch: Batch, store: BatchStore, number: int) -> BlockStates:
        """Return what :meth:`states_of` stored for a batch."""
        device, stop = batch.ids.device, self._start + self._n
        hidden = store.load((self._start, number), device)
        target = store.load((stop, number), device)
        target = target if self._norm is None else self._norm(target)
        return BlockStates(hidden, target, self.replay_calls(batch.ids, batch.mask))

    def states(self, batch: Batch) -> BlockStates:
        """Return the states for a batch, as a :class:`StateSource`."""
        return self.run(batch.ids, batch.mask)

    @torch.no_grad()
    def run(self, ids: Tensor, mask: Tensor) -> BlockStates:
        """Run one batch, ids and mask ``[batch, seq]``."""
        calls: list[LayerCall] = []
        ends: list[Tensor] = []

        def before(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not calls:
                ends.append(args[0] if args else kwargs["hidden_states"])
            calls.append(layer_call(layer, args, kwargs))

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            ends.append(hidden_of(output))
            raise PassEnded

        stop = self._start + self._n
        handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True)
            for layer in self._layers[self._start : self._start + max(self._calls, 1)]
        ]
        handles.append(self._layers[stop - 1].register_forward_hook(after))
        self._run_stack(ids, mask, handles)
        hidden, target = ends
        # Layers take their own states in any form; a network takes those of the config.
        other = self._calls == 0 and hidden.shape[-1] != self._hidden_size
        other |= self._norm is not None and hidden.dim() > 3
        if hidden.shape[:2] != ids.shape or other:
            raise ArchitectureError(
                f"The layers of this model have hidden states of shape {list(hidden.shape)} for "
                f"{list(ids.shape)} tokens, so that no replacement can be trained on them; take "
                "the replacement 'none'."
            )
        target = target if self._norm is None else self._norm(target)
        return BlockStates(hidden, target, tuple(calls[: self._calls]))

    @torch.no_grad()
    def replay_calls(self, ids: Tensor, mask: Tensor) -> tuple[LayerCall, ...]:
        """Return only the calls, without computing a layer (for states that were stored)."""
        if self._calls == 0:
            return ()
        if self._form.others:  # which only the layers themselves can give
            return self.run(ids, mask).calls
        probed = range(self._start + self._calls)
        with slots(self._layers, {i: Passthrough(self._layers[i], self._form) for i in probed}):
            last = self._layers[probed[-1]]

            def stop(layer: nn.Module, args: Any, output: Any) -> None:
                raise PassEnded

            self._run_stack(ids, mask, [last.register_forward_hook(stop)])
            probes = [self._layers[self._start + i] for i in range(self._calls)]
        return tuple(probe.call for probe in probes)  # type: ignore[misc]

    def _run_stack(self, ids: Tensor, mask: Tensor, handles: list[Any]) -> None:
        run_until(
            lambda: self._stack(input_ids=ids, attention_mask=mask.long(), use_cache=False), handles
        )


class LayerwiseStates:
    """States around a block from a streamed model, made layer by layer for many batches at once.

    Args:
        order: rows of the batches in the order in which they are asked for; begun anew after the
            last one. A first batch may be any of them.
        budget: bytes of states at the two ends of the block that are held at a time. Where all
            batches need more, the layers up to the block's end are read once per part.
        work: folder for states that exceed the memory.

    Raises:
        OutputError: the states exceed the memory and the disk.
    """

    def __init__(
        self, teacher: Teacher, tokens: CalibrationTokens, order: Sequence[Tensor], *,
        device: torch.device, budget: float, work: Path, progress: bool,
    ) -> None:  # fmt: skip
        self._teacher, self._tokens, self._order = teacher, tokens, list(order)
        self._device, self._budget, self._work = device, budget, work
        self._progress = progress
        self._next = 0
        self._numbers: dict[tuple[int, ...], int] = {}
        self._stack = ExitStack()
        self._store: BatchStore | None = None

    def states(self, batch: Batch) -> BlockStates:
        """Return the states of a batch, as a :class:`StateSource`."""
        key = tuple(batch.rows.tolist())
        if key not in self._numbers:
            self._fill(key)
        assert self._store is not None
        return self._teacher.stored(batch, self._store, self._numbers[key])

    def replay_calls(self, ids: Tensor, mask: Tensor) -> tuple[LayerCall, ...]:
        """Return what :meth:`Teacher.replay_calls` does."""
        return self._teacher.replay_calls(ids, mask)

    def close(self) -> None:
        """Drop the states."""
        self._numbers, self._store = {}, None
        self._stack.close()

    @torch.no_grad()
    def _fill(self, first: tuple[int, ...]) -> None:
        self.close()
        while tuple(self._order[self._next].tolist()) != first:
            self._next = (self._next + 1) % len(self._order)
        batches, size, model = list[Batch](), 0, self._teacher.model
        while len(batches) < len(self._order):
            rows = self._order[self._next]
            batch = make_batch(self._tokens, rows, self._device)
            each = states_bytes(model, [(batch.ids, batch.mask)])
            if batches and size + 2 * each > self._budget:
                break
            size += 2 * each
            self._numbers[tuple(rows.tolist())] = len(batches)
            batches.append(batch)
            self._next = (self._next + 1) % len(self._order)
        if len(batches) < len(self._order):
            log.info(
                "hidden states: %d of %d batches at a time; the layers below are read once for "
                "each part (raise training.cache_gb for fewer parts)",
                len(batches), len(self._order),
            )  # fmt: skip
        # At the block's end the states of its last layers are there as well.
        self._store = self._stack.enter_context(state_store(model, size * 3 // 2, self._work))
        self._teacher.states_of(batches, self._store, progress=self._progress)


class ActivationCache:
    """States of all sequences of a set, ``[2, n, T, d]`` in a memory-mapped file; of layers with
    several streams for each token, ``[2, n, T, streams, d]``.

    ``[0]`` holds the states before the block, ``[1]`` those behind it, in the dtype in which the
    teacher gives them. An earlier attempt's file with the same key is taken up.

    Args:
        batches: rows that are computed together; each row is in one of them.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(
        self, path: Path, key: str, tokens: CalibrationTokens, teacher: Teacher | LayerwiseStates,
        *, device: torch.device, batches: Sequence[Tensor], progress: bool,
    ) -> None:  # fmt: skip
        self._teacher = teacher
        description_file = path.with_suffix(".json")
        described = current().first(lambda: _read_description(description_file))
        if described.get("key") == key and path.is_file():
            log.info("activations: reusing %s", path.name)
            dtype = getattr(torch, described["dtype"])
            self._values = open_mapped(path, described["shape"], dtype)
            return
        own = batches[current().rank :: current().count]  # several processes fill one file
        filled = self._fill(path, tokens, own, device, progress)
        if isinstance(teacher, LayerwiseStates):
            teacher.close()  # they are in the file now

        def describe() -> None:
            sync_path(path)
            name = str(filled.dtype).removeprefix("torch.")
            description = {"key": key, "shape": list(filled.shape), "dtype": name}
            atomic_write_text(description_file, json.dumps(description))

        current().wait()
        current().first(describe)
        self._values = filled

    def _fill(
        self, path: Path, tokens: CalibrationTokens, batches: Sequence[Tensor],
        device: torch.device, progress: bool,
    ) -> Tensor:  # fmt: skip
        """Put the states of these batches into the file, which the main process makes."""
        values: Tensor | None = None

        def make(states: BlockStates | None) -> Tensor:
            def create() -> tuple[list[int], torch.dtype]:
                if states is None:
                    raise OutputError(f"No sequences to store in {path}.")
                path.with_suffix(".json").unlink(missing_ok=True)
                shape = [2, *tokens.input_ids.shape, *states.hidden.shape[2:]]
                create_mapped(path, shape, states.hidden.dtype, "lower training.cache_gb")
                return shape, states.hidden.dtype

            return open_mapped(path, *current().first(create))

        for rows in tqdm(batches, desc="activations", unit="batch", disable=not progress):
            batch = make_batch(tokens, rows, device)
            states = self._teacher.states(batch)
            values = make(states) if values is None else values
            used = batch.ids.shape[1]
            values[0, rows, :used] = states.hidden.cpu()
            values[1, rows, :used] = states.target.cpu()
        return make(None) if values is None else values

    def states(self, batch: Batch) -> BlockStates:
        """Return the stored states of a batch, as a :class:`StateSource`."""
        used = batch.ids.shape[1]
        hidden, target = (
            sent(part[batch.rows, :used], batch.ids.device) for part in self._values.unbind(0)
        )
        return BlockStates(hidden, target, self._teacher.replay_calls(batch.ids, batch.mask))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}


StateSource: TypeAlias = Teacher | LayerwiseStates | ActivationCache
"""Gives the states around the block for a batch of one set of sequences."""


@contextmanager
def slots(layers: nn.ModuleList, replaced: dict[int, nn.Module]) -> Iterator[None]:
    """Put other modules into some slots of a list of layers, and the old ones back at the end."""
    originals = {index: layers[index] for index in replaced}
    try:
        for index, module in replaced.items():
            layers[index] = module
        yield
    finally:
        for index, module in originals.items():
            layers[index] = module


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep no activations of what layers compute inside: each runs again in the backward pass."""

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)  # whose signature is looked at
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    held = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer, _ in held:
        layer.forward = again(layer.forward)
    try:
        yield
    finally:
        for layer, own in held:
            del layer.forward
            if own is not None:
                layer.forward = own


class StudentSlot(nn.Module):
    """One slot of the student: a decoder layer or a network, in the signature of a layer.

    Weights are float32 whatever the parent's dtype (an optimizer step of 2e-4 would be lost in
    bfloat16), so inputs are widened and the output is cast back.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.form: LayerForm | None = None  # of the model that it is put into; None: hidden states

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = hidden_states.float()
        if isinstance(self.module, ReplacementNetwork):
            output = self.module(wide)
        else:
            output = self.module(wide, *_widen(args), **_widen(kwargs))
            if self.form is not None:
                self.form.saw(output)
        output = hidden_of(output).to(hidden_states.dtype)
        return output if self.form is None else self.form.give(output)


class Student:
    """The trainable replacement of a block.

    Attributes:
        module: what is trained. Kind ``layer``: a ``ModuleList`` of deep copies of the block's
            first layers; else the network. Its ``state_dict`` is the training's result.
    """

    label, task = "replacement", "distill"

    def __init__(self, model: nn.Module, start: int, spec: ReplacementSpec, seed: int) -> None:
        with held_layer(model, start) as layer:
            device = next(layer.parameters()).device
        self.module: nn.Module
        if spec.kind == "layer":
            copies = [layer_copy(model, start + index) for index in range(spec.layers)]
            self.module = nn.ModuleList(copies)
            parts = list(self.module)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.module = build_network(spec, model.config)
            parts = [self.module]
        self.module.to(device=device, dtype=torch.float32).eval().requires_grad_(True)
        self.slots = [StudentSlot(part) for part in parts]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return all weights; kind ``layer``: names begin with the index among the new layers."""
        return dict(self.module.named_parameters())

    draws = False

    def begin(self, step: int | None) -> None:
        """Nothing to prepare: a replacement is trained without dropout."""

    def take(self, rows: slice, of: int) -> None:
        """Nothing is drawn."""

    @property
    def num_calls(self) -> int:
        """Number of layer calls that must be known to run it (none for a network)."""
        return len(self.slots) if isinstance(self.module, nn.ModuleList) else 0

    def run(self, hidden: Tensor, calls: tuple[LayerCall, ...]) -> Tensor:
        """Map the state before the block ``[batch, seq, d]`` to the one behind it, in float32."""
        hidden = hidden.float()
        for index, slot in enumerate(self.slots):
            hidden = slot(hidden, **(calls[index] if calls else {}))
        return hidden

    def state_on_cpu(self) -> dict[str, Tensor]:
        """Return a copy of all weights (and buffers that are saved) on the CPU."""
        state = self.module.state_dict(keep_vars=True)
        return {name: whole(tensor).detach().to("cpu", copy=True) for name, tensor in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            put(tensor, state.get(name))


@contextmanager
def pruned(model: nn.Module, start: int, n: int, student: Student) -> Iterator[None]:
    """Let ``model`` compute as if the block were replaced by the student.

    The student takes the first slots of the block and the others hand the states on: every layer
    keeps its index, so that per-layer masks and rotary angles stay right without a new config.
    """
    layers = decoder_layers(model)
    form = LayerForm.of(model)
    replaced: dict[int, nn.Module] = {
        start + i: Passthrough(layers[start + i], form) for i in range(n)
    }
    for offset, slot in enumerate(student.slots):
        slot.form = form
        replaced[start + offset] = slot
    with form.following(layers[:start]), slots(layers, replaced):
        yield
    for slot in student.slots:
        slot.form = None


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_widen(item) for item in value)
    if isinstance(value, dict):
        return {key: _widen(item) for key, item in value.items()}
    return value
