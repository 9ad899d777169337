"""Searches for merges of layers that leave the last hidden states where they were.

From the top of the range downwards, layers are merged by way of trial; a merge stays if the last
hidden states (after the final norm) keep a mean cosine above the threshold. Whatever the
threshold, layers below the merge at hand are still the dense model's, so that their states, taken
once, serve every trial.

:class:`LaCoSearch` merges equally many layers each time. It is the paper's for both rules of
merging: in a model that still has ``depth`` layers, the next merge's base is at most ``depth - C``.
The authors' code takes ``depth - 1 - C`` there and leaves the topmost layer out of later merges.

:class:`SlidingSearch` (arXiv 2502.19159) lets a window of layers grow downwards while its merge
stays above the threshold, merges it, and goes on from the layer that did not fit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import (
    LayersEntangled,
    PartialForward,
    entangled,
    require_finite_states,
    sent,
    walk_states,
)
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.state_store import BatchStore, state_store, states_bytes
from streamline_bench.core.streaming import held_layer, is_streamed
from streamline_bench.errors import ArchitectureError, CalibrationError, NumericsError
from streamline_bench.methods.tools.layer_removal import is_linear_weight

_BATCH = 8


@dataclass(frozen=True)
class Merge:
    """Layers of the source merged into ``base``; ``cosine`` is to the dense model's states."""

    base: int
    others: tuple[int, ...]
    cosine: float


class MergeRange(Frozen):
    """Where layers are merged.

    Attributes:
        lowest: no merge into a layer below it.
        highest: one above the topmost layer merged; None: the number of layers.
    """

    lowest: int = Field(0, ge=0)
    highest: int | None = Field(None, ge=2)


class LaCoRange(MergeRange):
    """Where and how far LaCo merges (its C, L, H and I).

    Attributes:
        layers_per_merge: C, layers that become one.
        interval: least distance from one merge's base down to the next one's.
    """

    layers_per_merge: int = Field(4, ge=2)
    interval: int = Field(2, ge=1)


RangeT = TypeVar("RangeT", bound=MergeRange)


class MergeSearch(ABC, Generic[RangeT]):
    """Runs a search at any threshold over one model and a few sequences.

    Used as a context; the model is as before afterwards.

    Args:
        span: where it merges.
        activations_gb: most memory for the dense model's states, in 10^9 bytes.
        work: folder for states of a streamed model that exceed the memory. Each trial reads the
            layers from the merge upwards.

    Raises:
        CalibrationError: the states would need more.
        ArchitectureError: the layers differ in shape, or cannot be run one by one.
        NumericsError: on entering: the model's own states are NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        tokens: CalibrationTokens,
        span: RangeT,
        rule: MergeRule,
        activations_gb: float = 8.0,
        work: Path | None = None,
    ) -> None:
        self._model, self._work = model, work
        self._depth = len(decoder_layers(model))
        self._span = span
        kind = StreamedMerger if is_streamed(model) else LayerMerger
        self._merger = kind(model, rule)
        self._forward = PartialForward(model)
        self._batches = list(tokens.batches(_BATCH, trim=True))
        self._device = model.get_input_embeddings().weight.device
        self._states: list[dict[int, Tensor]] = []
        self._handed: list[dict[int, Sequence[Any]]] = []
        self._store: BatchStore | None = None
        self._dense: list[Tensor] = []
        self._cosines: dict[tuple[Any, ...], float] = {}
        embedding: Tensor = model.get_input_embeddings().weight
        size = max(embedding.element_size(), torch.float32.itemsize)
        needed = tokens.input_ids.numel() * (self._depth + 2) * embedding.shape[1] * size / 1e9
        if needed > activations_gb:
            raise CalibrationError(
                f"The search keeps the states of all {len(tokens)} calibration sequences, "
                f"{needed:.3g} GB, and activations_gb is {activations_gb}; give fewer or shorter "
                "sequences, or raise it."
            )

    @property
    def trials(self) -> int:
        """Different merges evaluated so far."""
        return len(self._cosines)

    def __enter__(self) -> Self:
        self._opened = ExitStack()
        try:
            if is_streamed(self._model):
                self._fill()
            self._opened.enter_context(self._forward)
            for number, (ids, mask) in enumerate(self._batches):
                if self._store is not None:
                    store, device, top = self._store, self._device, self._depth
                    states = {b: store.load((b, number), device) for b in range(top + 1)}
                    self._dense.append(
                        self._forward.hidden(ids, mask, start=top, state=states[top])
                    )
                else:
                    self._dense.append(self._forward.hidden(ids, mask, record=True))
                    states = self._forward.states
                    self._states.append(states)
                    self._handed.append(self._forward.handed)
                require_finite_states(states, self._dense[-1], mask)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._merger.undo()
        self._opened.close()
        self._states, self._handed, self._dense, self._store = [], [], [], None

    def _fill(self) -> None:
        """Take all batches through a streamed model, and keep their states at all boundaries."""
        every = range(self._depth + 1)
        size = (self._depth + 3) * states_bytes(self._model, self._batches)
        self._store = self._opened.enter_context(state_store(self._model, size, self._work))
        try:
            walk_states(self._model, self._batches, every, self._store, progress=False)
        except LayersEntangled:
            raise entangled(self._model) from None

    def run(self, threshold: float, most: int) -> list[Merge]:
        """Return the merges at a threshold, at most ``most`` layers removed, top first.

        The last merge takes fewer layers if that hits ``most``.

        Raises:
            NumericsError: the last hidden states after a merge are NaN or infinite.
        """
        self._merger.undo()
        merges: list[Merge] = []
        for merge in self._search(threshold, most, merges):
            merges.append(merge)
            self._merger.merge(merge.base, merge.others)
        return merges

    @abstractmethod
    def _search(self, threshold: float, most: int, merges: Sequence[Merge]) -> Iterator[Merge]:
        """Yield the merges; each is part of ``merges``, and of the model, when it is asked on."""

    def _cosine(self, merges: Sequence[Merge], base: int, others: tuple[int, ...]) -> float:
        key = (*((merge.base, merge.others) for merge in merges), base, others)
        if key not in self._cosines:
            gone = {layer for merge in merges for layer in merge.others}.union(others)
            before = self._merger.depth
            self._merger.merge(base, others)
            self._cosines[key] = self._evaluate(base, gone)
            self._merger.undo(before)
        return self._cosines[key]

    def _evaluate(self, base: int, gone: set[int]) -> float:
        found = list[Tensor]()
        for (_, mask), hidden, dense in zip(
            self._batches, self._last_states(base, gone), self._dense, strict=True
        ):
            keep = sent(mask, dense.device)[..., None]  # pads do not count
            a, b = ((states.double() * keep).flatten(1) for states in (dense, hidden))
            found.append(nn.functional.cosine_similarity(a, b, dim=1, eps=1e-300).sum())
        total = 0.0
        for each in torch.stack(found).tolist():
            total += each
        mean = total / sum(len(ids) for ids, _ in self._batches)
        if not -1.01 < mean < 1.01:
            raise NumericsError(
                f"The last hidden states are not finite after merging into layer {base}; check "
                "the weights, or try another dtype."
            )
        return mean

    def _last_states(self, base: int, gone: set[int]) -> Iterator[Tensor]:
        """Yield each batch's last hidden states with the merges at hand.

        Merges proceed from the top downwards, so that no layer below the base has changed.
        """
        if self._store is None:
            for (ids, mask), states, handed in zip(
                self._batches, self._states, self._handed, strict=True
            ):
                at_base = {"start": base, "state": states[base], "handed": handed[base]}
                where = at_base if base else {}
                yield self._forward.hidden(ids, mask, skip=gone, **where)
            return
        store = self._store
        place: int | str = base
        for layer in range(base, self._depth):
            if layer in gone:
                continue
            with self._merger.held(layer):
                for number, (ids, mask) in enumerate(self._batches):
                    state = store.load((place, number), self._device)
                    store["trial", number] = self._forward.layer(layer, ids, mask, state)
            place = "trial"
        for number, (ids, mask) in enumerate(self._batches):
            state = store.load((place, number), self._device)
            yield self._forward.hidden(ids, mask, start=self._depth, state=state)


class LaCoSearch(MergeSearch[LaCoRange]):
    """Merges ``layers_per_merge`` layers into one, from the top downwards."""

    def _search(self, threshold: float, most: int, merges: Sequence[Merge]) -> Iterator[Merge]:
        span, alive = self._span, list(range(self._depth))
        base = (span.highest or self._depth) - span.layers_per_merge
        while base >= span.lowest and len(alive) > self._depth - most:
            room = most - (self._depth - len(alive))
            count = min(span.layers_per_merge - 1, len(alive) - 1 - base, room)
            others = tuple(alive[base + 1 : base + 1 + count])
            cosine = self._cosine(merges, base, others)
            if cosine > threshold:
                yield Merge(base, others, cosine)
                alive = [layer for layer in alive if layer not in others]
                base = min(base - span.interval, len(alive) - span.layers_per_merge)
            else:
                base -= 1


class SlidingSearch(MergeSearch[MergeRange]):
    """Merges windows that grow downwards from their topmost layer.

    A window is merged when its next layer would not fit, and the next window begins with that
    layer. The authors' code merges no window that has reached layer 0 when it ends; this one does.
    """

    def _search(self, threshold: float, most: int, merges: Sequence[Merge]) -> Iterator[Merge]:
        top, left = (self._span.highest or self._depth) - 1, most
        while left and top > self._span.lowest:
            window = None
            for base in range(top - 1, max(self._span.lowest, top - left) - 1, -1):
                others = tuple(range(base + 1, top + 1))
                cosine = self._cosine(merges, base, others)
                if cosine <= threshold:
                    break
                window = Merge(base, others, cosine)
            if window is None:
                top -= 1
                continue
            yield window
            left -= len(window.others)
            top = window.base - 1


MergeRule: TypeAlias = Literal["reference", "rdsc"]
"""``rdsc`` is the paper's sum: ``θ_l + Σ_k (θ_{l+k} - θ_l)``. ``reference`` is what its code
computes: it adds ``θ_{l+k}`` minus the *running* θ_l, which telescopes to the last ``θ_{l+m}``."""

Mixture: TypeAlias = Mapping[int, float]
"""Layer of the source -> its coefficient in a merged layer's projections."""


def merged_mixture(base: Mixture, others: Sequence[Mixture], rule: MergeRule) -> Mixture:
    """Return the coefficients after merging ``others``, in order, into ``base``."""
    if rule == "reference":
        return dict(others[-1])
    mixture = {layer: (1 - len(others)) * share for layer, share in base.items()}
    for other in others:
        for layer, share in other.items():
            mixture[layer] = mixture.get(layer, 0.0) + share
    return mixture


class LayerMerger:
    """Merges layers of a model in place and undoes that; no copy of the model is made.

    The ``reference`` rule lets the base layer point at the other layer's weights and copies
    nothing. ``rdsc`` makes the projections of one layer for each merge not undone.
    """

    def __init__(self, model: Any, rule: MergeRule) -> None:
        self._rule = rule
        self._model = model
        self._weights: list[dict[str, nn.Parameter]] = [
            {name: p for name, p in layer.named_parameters() if is_linear_weight(name, p.dim())}
            for layer in decoder_layers(model)
        ]
        self._undone: list[tuple[int, dict[str, Tensor]]] = []
        require_equal_shapes(
            [{name: tuple(p.shape) for name, p in layer.items()} for layer in self._weights]
        )

    @property
    def depth(self) -> int:
        """Number of merges that could be undone."""
        return len(self._undone)

    @contextmanager
    def held(self, layer: int) -> Iterator[None]:
        """Have a layer's weights in it, with the merges."""
        yield

    def merge(self, base: int, others: Sequence[int]) -> None:
        """Merge layers ``others`` into layer ``base``; the caller leaves them out of the pass."""
        own = self._weights[base]
        self._undone.append((base, {name: weight.data for name, weight in own.items()}))
        for name, weight in own.items():
            weight.data = self._merged(name, base, others)

    def undo(self, depth: int = 0) -> None:
        """Take back the latest merges until ``depth`` are left."""
        while len(self._undone) > depth:
            base, saved = self._undone.pop()
            for name, tensor in saved.items():
                self._weights[base][name].data = tensor

    def _merged(self, name: str, base: int, others: Sequence[int]) -> Tensor:
        if self._rule == "reference":
            return self._weights[others[-1]][name].data
        start = self._weights[base][name].data
        merged = start * (1 - len(others))
        for other in others:
            merged += self._weights[other][name].data
        return merged


class StreamedMerger(LayerMerger):
    """Does the same with a streamed model: merges are carried out when a layer is read."""

    def __init__(self, model: Any, rule: MergeRule) -> None:
        super().__init__(model, rule)
        self._merges: list[tuple[int, tuple[int, ...]]] = []

    @property
    def depth(self) -> int:
        return len(self._merges)

    def merge(self, base: int, others: Sequence[int]) -> None:
        self._merges.append((base, tuple(others)))

    def undo(self, depth: int = 0) -> None:
        del self._merges[depth:]

    @contextmanager
    def held(self, layer: int) -> Iterator[None]:
        with held_layer(self._model, layer) as host:
            if any(base == layer for base, _ in self._merges):
                self._carry_out(layer, host)
            yield

    def _carry_out(self, layer: int, host: nn.Module) -> None:
        with ExitStack() as stack:
            sources = self._sources(layer, self.depth)
            hosts = {n: stack.enter_context(held_layer(self._model, n)) for n in sorted(sources)}
            # All are computed before the first one is replaced, by which others may be.
            merged = {
                name: self._value(hosts, name, layer, self.depth).clone()
                for name in self._weights[layer]
            }
            for name, tensor in merged.items():
                host.get_parameter(name).data = tensor

    def _last_merge(self, layer: int, before: int) -> int | None:
        """Return the number of the last merge into a layer, among the first ``before``."""
        return next((i for i in reversed(range(before)) if self._merges[i][0] == layer), None)

    def _sources(self, layer: int, before: int) -> set[int]:
        number = self._last_merge(layer, before)
        if number is None:
            return {layer}
        _, others = self._merges[number]
        of = (others[-1],) if self._rule == "reference" else (layer, *others)
        return set().union(*(self._sources(each, number) for each in of))

    def _value(self, hosts: Mapping[int, nn.Module], name: str, layer: int, before: int) -> Tensor:
        """Return a projection of a layer after the first ``before`` merges."""
        number = self._last_merge(layer, before)
        if number is None:
            return hosts[layer].get_parameter(name).data
        _, others = self._merges[number]
        if self._rule == "reference":
            return self._value(hosts, name, others[-1], number)
        merged = self._value(hosts, name, layer, number) * (1 - len(others))
        for other in others:
            merged += self._value(hosts, name, other, number)
        return merged


def require_equal_shapes(layers: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
    """Check that all layers have the same projections.

    Raises:
        ArchitectureError: one differs (mixtures with dense layers, for example).
    """
    for index, shapes in enumerate(layers):
        if shapes != layers[0]:
            odd = sorted(set(shapes.items()) ^ set(layers[0].items()))[0][0]
            raise ArchitectureError(
                f"Layer {index} differs from layer 0 in '{odd}', so that layers cannot be merged; "
                "use a method that drops layers."
            )
