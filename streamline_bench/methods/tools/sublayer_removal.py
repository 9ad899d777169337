"""What methods share that remove attention or MLP of single layers: how many, and what remains."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from streamline_bench.core.architecture import architecture_of, decoder_layers, depth_of
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import (
    LayersEntangled,
    PartialForward,
    hidden_of,
    replaced_forward,
    with_hidden,
)
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.surgery import ModelSizes, SizePlan, model_sizes, pruned_config
from streamline_bench.errors import ArchitectureError, CheckpointError, SparsityError
from streamline_bench.methods.base import Compressed, Compression
from streamline_bench.methods.tools.layer_removal import config_json, drop_layers
from streamline_bench.modeling.sublayers import (
    KINDS,
    Nothing,
    RemovedSublayers,
    Sublayer,
    SublayerKind,
    cache_places,
    layer_kinds_of,
    modules_of,
    require_sublayers,
)

log = logging.getLogger(__name__)


class SublayerParameters(Frozen):
    """Parameters of methods that remove sub-layers.

    Attributes:
        drop: which are candidates: ``attention``, ``mlp``, or both (``joint``).
        sublayers: how many to remove, in place of a sparsity.
    """

    drop: Literal["attention", "mlp", "joint"] = "joint"
    sublayers: int | None = Field(None, ge=1)

    @property
    def kinds(self) -> tuple[SublayerKind, ...]:
        """The kinds of the candidates."""
        return KINDS if self.drop == "joint" else (self.drop,)


class Removal:
    """How many of a model's sub-layers are to go, and which may.

    Args:
        work: the compression; its recipe has a sparsity, or the parameter ``sublayers``.
        options: the parameters.

    Attributes:
        candidates: in the order of layers, attention first.

    Raises:
        ArchitectureError: the layers of this model have no such sub-layers.
        SparsityError: neither or both sizes are given, or they are out of reach.
    """

    def __init__(self, work: Compression, options: SublayerParameters) -> None:
        self._work, self._sparsity = work, work.recipe.sparsity
        self.number = options.sublayers
        if (self._sparsity is None) == (self.number is None):
            raise SparsityError(
                "Give a sparsity (share of parameters to remove) or the parameter sublayers "
                "(number of sub-layers to remove), and not both."
            )
        self._row = architecture_of(work.config)
        for kind in options.kinds:
            require_sublayers(work.config, self._row, kind)
        self.depth = depth_of(work.config)
        self._kinds = layer_kinds_of(work.config, self._row)
        self.candidates: list[Sublayer] = [
            (layer, kind) for layer in range(self.depth) for kind in options.kinds
        ]
        for layer, kind in self.candidates:
            if not self.tensors[layer, kind]:
                raise ArchitectureError(
                    f"Layer {layer} of this '{self._row.model_type}' model has no "
                    f"'{getattr(self._row, kind)}'; use a method that removes whole layers."
                )
        self.chosen(self.candidates)  # out of reach: refused before anything is computed

    @cached_property
    def _sizes(self) -> ModelSizes:
        return model_sizes(self._work.reader)

    @cached_property
    def tensors(self) -> dict[Sublayer, tuple[str, ...]]:
        """Names of a sub-layer's tensors in the checkpoint, those of its norms included."""
        pattern = re.compile(
            re.escape(layers_prefix(self._work.reader, self._row)) + r"\.(\d+)\.(.+)"
        )
        found: dict[Sublayer, list[str]] = {}
        owners = {f"{path}.": kind for kind in KINDS for path in modules_of(self._row, kind)}
        for name in self._work.reader.names:
            match = pattern.fullmatch(name)
            for path, kind in owners.items() if match else ():
                if match is not None and match[2].startswith(path):
                    found.setdefault((int(match[1]), kind), []).append(name)
        return {
            (layer, kind): tuple(found.get((layer, kind), ()))
            for layer in range(self.depth)
            for kind in KINDS
        }

    def parameters(self, removed: Iterable[Sublayer]) -> int:
        """Return how many parameters go with some sub-layers; a layer without both goes whole."""
        counts, gone = self._work.reader.parameter_counts, set(removed)
        whole = whole_layers(gone)
        total = sum(self._sizes.layers[layer] for layer in whole)
        parts = (self.tensors[each] for each in gone if each[0] not in whole)
        return total + sum(counts.get(name, 0) for names in parts for name in names)

    def allowed(self, removed: Collection[Sublayer]) -> bool:
        """Whether the rest is a model: a layer, and an attention that counts a cache's tokens."""
        kept = [layer for layer in range(self.depth) if layer not in whole_layers(removed)]
        if not kept:
            return False
        without = [place for place, layer in enumerate(kept) if (layer, "attention") in removed]
        try:
            cache_places([self._kinds[layer] for layer in kept], without)
        except CheckpointError:
            return False
        return True

    def reached(self, removed: Iterable[Sublayer]) -> float:
        """Return the share of the model's parameters that goes."""
        return self.parameters(removed) / self._sizes.total

    def enough(self, order: Sequence[Sublayer]) -> bool:
        """Whether nothing needs to follow on some sub-layers."""
        if self.number is not None:
            return len(order) >= self.number
        return self.reached(order) >= (self._sparsity or 0.0)

    def chosen(self, order: Iterable[Sublayer]) -> list[Sublayer]:
        """Return the first of a ranking that are to go; what would leave no model is passed over.

        As many go as come closest to the sparsity, the smaller number of equals.

        Raises:
            SparsityError: out of reach.
        """
        taken: list[Sublayer] = []
        for each in order:
            if not self.enough(taken) and self.allowed([*taken, each]):
                taken.append(each)
        if self.number is not None:
            if len(taken) < self.number:
                raise SparsityError(
                    f"Cannot remove {self.number} sub-layers of this model; choose from 1 to "
                    f"{len(taken)}."
                )
            return taken
        assert self._sparsity is not None
        wanted = self._sparsity
        step = self.reached(taken) - self.reached(taken[:-1])
        # min() keeps the first of equals: the smaller number. Rounding hides noise of floats.
        best = min(
            (taken[:-1], taken), key=lambda some: round(abs(self.reached(some) - wanted), 12)
        )
        if not best or self.reached(best) < wanted - step / 2 - 1e-9:
            low, high = self.reached(taken[:1]), self.reached(taken)
            raise SparsityError(
                f"Sparsity {wanted} is out of reach: removing these sub-layers of this model "
                f"reaches {low:.4f} to {high:.4f}; choose a share in that range, give "
                "parameters.sublayers, or another parameters.drop."
            )
        return best

    def result(
        self,
        order: Sequence[Sublayer],
        *,
        facts: Mapping[str, Any],
        tokens: CalibrationTokens | None,
    ) -> Compressed:
        """Return the model without some sub-layers; layers that lose both are dropped."""
        work, removed, whole = self._work, set(order), whole_layers(order)
        sizes, gone = self._sizes, self.parameters(order)
        plan = SizePlan(
            n_layers=len(whole), removed=gone, total=sizes.total,
            requested=self._sparsity, embeddings=sizes.embeddings,
            added_parameters=0, num_layers=self.depth,
        )  # fmt: skip
        listed = {kind: sorted(i for i, of in removed if of == kind) for kind in KINDS}
        chosen = {"removed_sublayers": listed, "order": [list(each) for each in order], **facts}
        result = drop_layers(work, sorted(whole), plan, chosen=chosen, tokens=tokens)
        size = {**dataclasses.asdict(plan), "n_sublayers": len(removed)}
        result = dataclasses.replace(result, chosen={**result.chosen, "size": size})
        partly = [each for each in removed if each[0] not in whole]
        if not partly:
            return result
        return self._without(result, partly, [i for i in range(self.depth) if i not in whole])

    def _without(
        self, result: Compressed, partly: Sequence[Sublayer], keep: Sequence[int]
    ) -> Compressed:
        from streamline_bench.modeling import streamline_config

        lost = {name for each in partly for name in self.tensors[each]}
        places = {
            kind: tuple(keep.index(layer) for layer, of in sorted(partly) if of == kind)
            for kind in KINDS
        }
        config = streamline_config(
            pruned_config(self._work.config, keep), removed_sublayers=RemovedSublayers(**places)
        )
        names = {new: old for new, old in result.names.items() if old not in lost}
        return dataclasses.replace(result, config=config_json(config), names=names)


def whole_layers(removed: Iterable[Sublayer]) -> set[int]:
    """Return the layers of which both sub-layers are among some."""
    gone = set(removed)
    return {layer for layer, _ in gone if all((layer, kind) in gone for kind in KINDS)}


@contextmanager
def silenced(model: Any) -> Iterator[set[Sublayer]]:
    """Yield a set that is empty at first; sub-layers in it add nothing to the stream."""
    row, gone = architecture_of(model.config), set[Sublayer]()

    def switched(module: nn.Module, each: Sublayer, itself: bool) -> Any:
        own = module.forward
        other: Any = Nothing(each[1]).forward if itself else lambda hidden_states: hidden_states

        def forward(*args: Any, **kwargs: Any) -> Any:
            if each in gone and itself and each[1] == "mlp" and row.experts:
                output = own(*args, **kwargs)  # some give their routing as well
                return with_hidden(output, torch.zeros_like(hidden_of(output)))
            return (other if each in gone else own)(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        for layer, modules in enumerate(decoder_layers(model)):
            for kind in KINDS:
                for path, itself in modules_of(row, kind).items():
                    module = modules.get_submodule(path)
                    forward = switched(module, (layer, kind), itself)
                    stack.enter_context(replaced_forward(module, forward))
        yield gone


def require_two_sublayers(model: Any, tokens: CalibrationTokens) -> None:
    """Check on the first sequence that only attention and MLP add to the stream.

    Raises:
        ArchitectureError: without both, a layer does not hand on the stream unchanged.
    """
    ids, mask = next(tokens.batches(1, trim=True))
    depth, wrong = len(decoder_layers(model)), ""
    with silenced(model) as gone, PartialForward(model) as forward:
        gone.update((layer, kind) for layer in range(depth) for kind in KINDS)
        try:
            state = forward.embedded(ids, mask)
            for layer in range(depth):
                output = forward.layer(layer, ids, mask, state)
                if not output.equal(state):
                    wrong = f"layer {layer} adds something else to the stream"
        except (LayersEntangled, TypeError, ValueError, AttributeError, RuntimeError) as error:
            wrong = f"its layers are not of two parts ({type(error).__name__}: {error})"
    if wrong:
        raise ArchitectureError(
            f"Sub-layers of this '{architecture_of(model.config).model_type}' model cannot be "
            f"removed: {wrong}; use a method that removes whole layers."
        )
