"""States at the two ends of a removed block, and what LinearPatch and the ridge map share.

For a block of layers ``s .. s + n - 1`` the stream that reaches what follows is ``h_s`` where it
used to be ``h_{s+n}``. Layer ``s - 1`` wrote its MLP's output M into it last: ``h_s = Y + c M``,
with c = 1 in most families. Rows stream by batch after batch; nothing is kept, and pads are left
out.

A :class:`BoundaryMap` replaces every run of removed layers by an affine map of the whole residual
stream. No stock layer can take it up; the result is of model type ``streamline`` with one
attachment of kind ``linear`` for each run.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of, decoder_layers, depth_of
from streamline_bench.core.boundaries import boundary_passes, latest_outputs
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import PassEnded, hidden_of, run_base, run_until, sent
from streamline_bench.core.recipe.schema import Recipe, ReplacementSpec
from streamline_bench.core.replacement import network_parameters
from streamline_bench.errors import ArchitectureError, NumericsError
from streamline_bench.methods.base import Compressed, Compression, Size
from streamline_bench.methods.tools.layer_removal import attached, drop_layers
from streamline_bench.methods.tools.normal_equations import NormalEquations
from streamline_bench.methods.tools.selection import AnySelection, OnSelection, cuts_of
from streamline_bench.methods.tools.sizes import whole_layers


class BoundaryMapParameters(AnySelection):
    """Parameters that all boundary maps have, those of the choice of layers among them.

    Attributes:
        validation_share: share of the sequences kept out of the fit to measure it.
        batch_size: sequences per forward pass.
    """

    validation_share: float = Field(0.05, gt=0, lt=1)
    batch_size: int = Field(1, ge=1)


@dataclass(frozen=True)
class AffineMap:
    """``x ↦ x W + b`` on row vectors, in float64.

    Attributes:
        weight: ``[hidden, hidden]``.
        bias: ``[hidden]`` or None for zero.
        facts: about the map, for the manifest.
    """

    weight: Tensor
    bias: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class MapFit(ABC):
    """Sums over rows of states at the two ends of a cut, and the map that they give."""

    @abstractmethod
    def add(self, stream: Tensor, target: Tensor) -> None:
        """Take up some tokens: what enters the cut and what left it, ``[rows, hidden]``."""

    @abstractmethod
    def solve(self) -> AffineMap:
        """Return the map from the stream before the cut to that behind it."""


class BoundaryMap(OnSelection):
    """Put a fitted affine map in the place of each run of removed layers.

    All maps are fitted in one pass, on states of the dense model.
    """

    parameters: ClassVar[type[BaseModel]] = BoundaryMapParameters
    passes = frozenset({"maps"})

    def stock(self, recipe: Recipe) -> bool:
        """No stock class has a map between two layers."""
        return False

    @abstractmethod
    def fit(self, hidden: int, options: Any, device: str) -> MapFit:
        """Return the sums of one cut, still empty."""

    def prepare(self, hidden: int) -> None:
        """Refuse, before anything costly, a hidden size that the method cannot handle."""

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield whole layers less, with a map for each run of removed layers."""
        options: Any = self.parameters.model_validate(work.recipe.parameters)
        one = network_parameters(ReplacementSpec(kind="linear"), work.config)
        depth = depth_of(work.config)
        yield from whole_layers(work, options, added=lambda n: one * options.most_cuts(depth, n))

    def compress(self, work: Compression) -> Compressed:
        """Choose the layers, fit the maps on one part of the tokens, attach them."""
        options: Any = self.parameters.model_validate(work.recipe.parameters)
        hidden = int(work.config.hidden_size)
        self.prepare(hidden)
        linear = ReplacementSpec(kind="linear")
        plan, found = options.with_networks(work, network_parameters(linear, work.config))
        cuts = cuts_of(found.layers)
        tokens = found.tokens or work.tokens(work.recipe.calibration)
        fit, held_out = tokens.split(options.validation_share, work.recipe.seed)
        fits = [self.fit(hidden, options, work.device) for _ in cuts]
        errors = [NormalEquations(hidden, work.device) for _ in cuts]
        rows_of = partial(
            boundary_rows, work.model, blocks=cuts, batch_size=options.batch_size,
            work=work.work, progress=work.progress,
        )  # fmt: skip
        for batch in rows_of(tokens=fit, description="fit"):
            for rows, of_cut in zip(batch, fits, strict=True):
                of_cut.add(rows.stream, rows.target)
        for batch in rows_of(tokens=held_out, description="held out"):
            for rows, sums in zip(batch, errors, strict=True):
                sums.add(rows.stream, rows.target)
        maps = [each.solve() for each in fits]
        if not all(bool(each.weight.isfinite().all()) for each in maps):
            raise NumericsError(f"The map of {self.name} is not finite; check the model's states.")
        facts = [
            {"boundary_mse": sums.errors(each.weight, each.bias), **each.facts}
            for each, sums in zip(maps, errors, strict=True)
        ]
        chosen = {
            **found.facts, **_of_one_or_all(cuts, facts), "tokens_fitted": fit.num_tokens,
            "tokens_held_out": held_out.num_tokens,
        }  # fmt: skip
        result = drop_layers(work, found.layers, plan, chosen=chosen, tokens=tokens)
        config, tensors = attached(work, cuts, linear, [_state(each) for each in maps])
        return dataclasses.replace(result, config=config, tensors={**result.tensors, **tensors})


def _of_one_or_all(cuts: Sequence[range], facts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the facts of the only cut, or those of all under ``cuts``."""
    if len(cuts) == 1:
        return facts[0]
    each = zip(cuts, facts, strict=True)
    return {"cuts": [{"layers": [*cut], **known} for cut, known in each]}


def _state(found: AffineMap) -> dict[str, Tensor]:
    bias = torch.zeros(len(found.weight)) if found.bias is None else found.bias
    return {"proj.weight": found.weight.T, "proj.bias": bias}


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
    blocks: Sequence[range],
    *,
    scales: Sequence[float] | None = None,
    batch_size: int = 1,
    work: Path | None = None,
    progress: bool = True,
    description: str = "boundaries",
) -> Iterator[list[BoundaryRows]]:
    """Run the model over the tokens and yield, per batch, the rows of every block.

    Args:
        model: the intact causal LM, in evaluation mode. Its LM head is not run.
        blocks: layers to look around, each a run of neighbours.
        scales: c of :func:`mlp_scale` per block; None: the MLPs are not looked at.
        work: folder for states of a streamed model that exceed the memory.
    """
    hosts = [block.start - 1 for block in blocks] if scales is not None else []
    with (
        torch.no_grad(),
        boundary_passes(
            model,
            tokens,
            batch_size,
            wanted={end for block in blocks for end in (block.start, block.stop)},
            watched=[(host, mlp_module(model, host)) for host in hosts],
            work=work,
            progress=progress,
        ) as passes,
        tqdm(
            total=tokens.num_tokens, unit="tok", desc=description, delay=2, disable=not progress
        ) as bar,
    ):
        for each in passes:
            kept, rows = each.mask.reshape(-1).nonzero()[:, 0], []
            _require_one_stream(model, each.states[blocks[0].start])
            for number, block in enumerate(blocks):
                stream = _rows(each.states[block.start], kept)
                mlp = None
                if scales is not None:
                    mlp = _rows(each.outputs[number], kept) * scales[number]
                rows.append(BoundaryRows(stream, _rows(each.states[block.stop], kept), mlp))
            yield rows
            bar.update(len(kept))


def _require_one_stream(model: Any, states: Tensor) -> None:
    hidden, width = int(model.config.hidden_size), states.shape[-1]
    if width != hidden:
        raise ArchitectureError(
            f"The layers of this '{architecture_of(model.config).model_type}' model have states of "
            f"{width} channels for each token ({width // hidden} streams of {hidden}), which one "
            "map cannot take; use a method that removes layers."
        )


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
    kept, module = mask.reshape(-1).nonzero()[:, 0], mlp_module(model, layer)
    with torch.no_grad():
        with latest_outputs([module]) as outputs:
            whole = _rows(_behind(model, layer, ids, mask), kept)
        mlp = _rows(outputs[0], kept).double()
        epsilon = torch.finfo(whole.dtype).eps
        whole = whole.double()
        with latest_outputs([module], silenced=True):
            rest = _rows(_behind(model, layer, ids, mask), kept).double()
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


def mlp_module(model: Any, layer: int) -> nn.Module:
    """Return the MLP of a layer, or its last projection where it has no MLP module."""
    family = architecture_of(model.config)
    return decoder_layers(model)[layer].get_submodule(family.mlp or family.down)


def _behind(model: Any, layer: int, ids: Tensor, mask: Tensor) -> Tensor:
    """Run a model up to a layer, and return what the layer gives, ``[batch, seq, hidden]``."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(hidden_of(output))
        raise PassEnded

    handle = decoder_layers(model)[layer].register_forward_hook(stop)
    run_until(lambda: run_base(model, ids, mask), [handle])
    return found[0]


def _rows(states: Tensor, kept: Tensor) -> Tensor:
    """Return a copy of some states as ``[rows, hidden]``; ``kept``: their places, on the CPU."""
    return states.reshape(-1, states.shape[-1])[sent(kept, states.device)]
