"""What LinearPatch and the ridge map share: one block is replaced by an affine map.

The map acts on the whole residual stream, so that it cannot be folded into a stock layer; the
result is of model type ``streamline`` with one attachment of kind ``linear``.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Recipe, ReplacementSpec
from streamline_bench.core.scan.similarity import Block
from streamline_bench.core.surgery.layers import block_keep, pruned_config
from streamline_bench.core.surgery.replacement import network_parameters
from streamline_bench.errors import NumericsError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.maps.boundary_activations import BoundaryRows, boundary_rows
from streamline_bench.methods.tools.layer_removal import (
    BlockSearch,
    attached,
    drop_layers,
    scan_once,
    size_plan,
)
from streamline_bench.methods.tools.normal_equations import NormalEquations

log = logging.getLogger(__name__)


class BoundaryMapParameters(BlockSearch):
    """Parameters that all boundary maps have, those of the search for the block among them.

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


class BoundaryMap(Method):
    """Remove the block whose ends are most alike and put a fitted affine map in its place."""

    parameters: ClassVar[type[BaseModel]] = BoundaryMapParameters

    def stock(self, recipe: Recipe) -> bool:
        """No stock class has a map between two layers."""
        return False

    @abstractmethod
    def fit(
        self, rows: Iterable[BoundaryRows], hidden: int, options: Any, device: str
    ) -> AffineMap:
        """Return the map from the stream before the block to that behind it."""

    def prepare(self, hidden: int) -> None:
        """Refuse, before anything costly, a hidden size that the method cannot handle."""

    def compress(self, work: Compression) -> Compressed:
        """Scan, choose the block, fit the map on one part of the tokens, attach it."""
        options: Any = self.parameters.model_validate(work.recipe.parameters)
        hidden = int(work.config.hidden_size)
        self.prepare(hidden)
        plan = size_plan(work, network_parameters(ReplacementSpec(kind="linear"), work.config))
        tokens = work.tokens(work.recipe.calibration)
        block = options.choose(scan_once(work, tokens, options.last_state), plan.n_layers)
        fit, held_out = tokens.split(options.validation_share, work.recipe.seed)
        found = self.fit(_rows(work, block, fit, options, "fit"), hidden, options, work.device)
        if not bool(found.weight.isfinite().all()):
            raise NumericsError(f"The map of {self.name} is not finite; check the model's states.")
        removed = range(block.start, block.stop)
        chosen = {
            "start": block.start,
            "score": block.score,
            "metric": block.metric,
            "boundary_mse": _errors(work, block, found, held_out, options),
            "tokens_fitted": fit.num_tokens,
            "tokens_held_out": held_out.num_tokens,
            **found.facts,
        }
        result = drop_layers(work, removed, plan, chosen=chosen, tokens=tokens)
        return _attached(work, result, block, found)


def _rows(
    work: Compression, block: Block, tokens: CalibrationTokens, options: Any, what: str
) -> Iterable[BoundaryRows]:
    batches = boundary_rows(
        work.model,
        tokens,
        [block],
        batch_size=options.batch_size,
        progress=work.progress,
        description=what,
    )
    return (batch[0] for batch in batches)


def _errors(
    work: Compression, block: Block, found: AffineMap, tokens: CalibrationTokens, options: Any
) -> dict[str, float]:
    """Mean squared error at the boundary on held-out tokens, without and with the map."""
    hidden = len(found.weight)
    sums = NormalEquations(hidden, work.device)
    for rows in _rows(work, block, tokens, options, "held out"):
        sums.add(rows.stream, rows.target)
    return {
        "none": sums.mean_squared_error(torch.eye(hidden)),
        "mapped": sums.mean_squared_error(found.weight, found.bias),
    }


def _attached(work: Compression, result: Compressed, block: Block, found: AffineMap) -> Compressed:
    """Return the result with the map behind the layer before the block."""
    keep = block_keep(work.config.num_hidden_layers, block.start, block.n)
    bias = torch.zeros(len(found.weight)) if found.bias is None else found.bias
    state = {"proj.weight": found.weight.T, "proj.bias": bias}
    host, spec = pruned_config(work.config, keep), ReplacementSpec(kind="linear")
    config, tensors = attached(work, block.start, host, spec, state)
    return dataclasses.replace(result, config=config, tensors=tensors)
