"""Maps of an MLP's output that make up for the layers removed behind it (ReplaceMe's fits)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import sent
from streamline_bench.core.similarity import LastState
from streamline_bench.core.state_store import create_mapped
from streamline_bench.errors import CalibrationError, NumericsError, SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.maps.boundary_map import BoundaryRows, boundary_rows, mlp_scale
from streamline_bench.methods.tools.normal_equations import (
    NormalEquations,
    warn_of_few_rows,
    widened,
)
from streamline_bench.methods.tools.selection import SelectedBy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gap:
    """A removed block and the layer that takes its map.

    Attributes:
        block: the removed layers, neighbours.
        host: layer whose MLP takes the map.
        follows: the block before is adjacent, so that the map acts on the whole stream.
        scale: c of ``h_s = Y + c M``.
    """

    block: range
    host: int
    follows: bool
    scale: float


def find_gaps(work: Compression, blocks: Sequence[range], tokens: CalibrationTokens) -> list[Gap]:
    """Return which layer takes the map of each block; blocks in order of their places.

    Raises:
        ArchitectureError: a layer before a block does not simply add its MLP's output.
        SparsityError: no layer is before a block.
    """
    gaps: list[Gap] = []
    for block in blocks:
        if block.start == 0:
            raise SparsityError(
                "Layer 0 is removed, and before it there is no MLP that could take a map; choose "
                "other layers, or use linear_patch or ridge_map."
            )
        follows = bool(gaps) and gaps[-1].block.stop == block.start
        host = gaps[-1].host if follows else block.start - 1
        scale = 1.0 if follows else mlp_scale(work.model, host, tokens)
        gaps.append(Gap(block, host, follows, scale))
        log.info("block: layers %d to %d, map in layer %d", block.start, block.stop - 1, host)
    return gaps


def _parts(gap: Gap, rows: BoundaryRows) -> tuple[Tensor, Tensor]:
    """Return (M, Y) of a block: what the map acts on and what it leaves alone."""
    if gap.follows or rows.mlp is None:
        return rows.stream, torch.zeros_like(rows.stream)
    return rows.mlp, rows.stream - rows.mlp


def _all_rows(
    work: Compression, gaps: list[Gap], tokens: CalibrationTokens, batch_size: int, what: str
) -> Iterator[list[BoundaryRows]]:
    return boundary_rows(
        work.model,
        tokens,
        [gap.block for gap in gaps],
        scales=[gap.scale for gap in gaps],
        batch_size=batch_size,
        work=work.work,
        progress=work.progress,
        description=what,
    )


def fit_maps(
    work: Compression, gaps: list[Gap], tokens: CalibrationTokens, options: ReplaceMeParameters
) -> tuple[list[Tensor], list[list[float]]]:
    """Return a map per block, float64 ``[hidden, hidden]``, and the losses of its epochs.

    Raises:
        CalibrationError: too few tokens to determine a map, or more than the file of activations
            may hold.
        NumericsError: the system is singular, or the loss is not finite.
    """
    if options.objective == "cosine":
        return _fit_by_cosine(work, gaps, tokens, options)
    sums, _ = _sums(work, gaps, tokens, options.batch_size, "fit")
    solved = [
        one.solve_diagonal(options.ridge) if options.diagonal else one.solve(options.ridge)
        for one in sums
    ]
    return solved, [[] for _ in gaps]


def _fit_by_cosine(
    work: Compression, gaps: list[Gap], tokens: CalibrationTokens, options: ReplaceMeParameters
) -> tuple[list[Tensor], list[list[float]]]:
    count, hidden = tokens.num_tokens, int(work.config.hidden_size)
    shape = (count, 3 if options.accurate else 2, hidden)
    dtype = next(work.model.parameters()).dtype
    size = math.prod(shape) * dtype.itemsize / 1e9
    if size > options.cache_gb:
        raise CalibrationError(
            f"The cosine objective keeps {size:.3g} GB of activations of {count} tokens and "
            f"parameters.cache_gb allows {options.cache_gb:.3g}; raise it, give fewer calibration "
            "samples, or take objective lstsq, which keeps none."
        )
    maps, curves = [], []
    for number, gap in enumerate(gaps):
        path = work.work / f"rows-{number}.bin"
        stored, used = create_mapped(path, shape, dtype), 0
        try:
            for (rows,) in _all_rows(work, [gap], tokens, options.batch_size, "activations"):
                m, y = _parts(gap, rows)
                parts = (m, rows.target, y) if options.accurate else (m, rows.target - y)
                stored[used : used + len(m)] = torch.stack([p.to("cpu", dtype) for p in parts], 1)
                used += len(m)
            found, losses = _fit_cosine(stored[:used], work, options)
        finally:
            del stored
            path.unlink(missing_ok=True)
        maps.append(found)
        curves.append(losses)
    return maps, curves


def _sums(
    work: Compression, gaps: list[Gap], tokens: CalibrationTokens, batch_size: int, what: str
) -> tuple[list[NormalEquations], dict[int, NormalEquations]]:
    """Return the sums of each gap, and host -> those across its several adjacent blocks."""
    hidden = int(work.config.hidden_size)
    sums = [NormalEquations(hidden, work.device) for _ in gaps]
    hosts = {gap.host for gap in gaps if gap.follows}
    whole = {host: NormalEquations(hidden, work.device) for host in hosts}
    for batch in _all_rows(work, gaps, tokens, batch_size, what):
        parts = [_parts(gap, rows) for gap, rows in zip(gaps, batch, strict=True)]
        for (m, y), rows, one in zip(parts, batch, sums, strict=True):
            one.add(m, widened(rows.target) - widened(y))
        for host, one in whole.items():
            chain = [number for number, gap in enumerate(gaps) if gap.host == host]
            m, y = parts[chain[0]]
            one.add(m, widened(batch[chain[-1]].target) - widened(y))
    return sums, whole


def composed_maps(gaps: list[Gap], maps: list[Tensor]) -> dict[int, Tensor]:
    """Return host -> the product of its maps, in the order of their blocks."""
    composed: dict[int, Tensor] = {}
    for gap, a in zip(gaps, maps, strict=True):
        composed[gap.host] = composed[gap.host] @ a if gap.host in composed else a
    return composed


def map_errors(
    work: Compression, gaps: list[Gap], maps: list[Tensor], tokens: CalibrationTokens, batch: int
) -> tuple[list[dict[str, float]], dict[int, dict[str, float]]]:
    """Return mean squared errors at boundaries on held-out tokens, each without and with the map.

    Returns:
        (per block, of its own map on what the intact model computes there; host of several adjacent
        blocks -> of the product of their maps, which is what is folded, behind the last of them).
    """
    sums, whole = _sums(work, gaps, tokens, batch, "held out")
    composed = composed_maps(gaps, maps)
    return (
        [one.errors(a) for one, a in zip(sums, maps, strict=True)],
        {host: one.errors(composed[host]) for host, one in whole.items()},
    )


class ReplaceMeParameters(SelectedBy):
    """Parameters of the method ``replaceme``.

    Without ``selection``, blocks of least angular distance are removed.

    Attributes:
        objective: ``lstsq`` minimises ``|M A + Y - h|²``; ``cosine`` maximises
            ``cos(M A, h - Y)`` by Adam.
        accurate: with ``cosine``, maximise ``cos(M A + Y, h)`` instead.
        diagonal: A is diagonal.
        ridge: share of the mean diagonal of ``MᵀM`` added to it (lstsq).
        blocks: number of blocks of equal size that the removed layers are divided into.
        merge_consecutive: adjacent blocks are fitted as one. Otherwise the later one is fitted on
            the whole stream and its map follows the earlier one's in the same MLP, as published.
        last_state: state after the last layer that the selection compares.
        epochs, lr, batch_rows: Adam's schedule (cosine).
        cache_gb: budget of the activation file (cosine).
        validation_share: share of the sequences kept out of the fit to measure it.
        batch_size: sequences per forward pass.
    """

    objective: Literal["lstsq", "cosine"] = "lstsq"
    accurate: bool = False
    diagonal: bool = False
    ridge: float = Field(1e-6, ge=0)
    blocks: int = Field(1, ge=1)
    merge_consecutive: bool = True
    last_state: LastState = "postnorm"
    epochs: int = Field(10, ge=1)
    lr: float = Field(1e-4, gt=0)
    batch_rows: int = Field(1024, ge=1)
    cache_gb: float = Field(16.0, ge=0)
    validation_share: float = Field(0.05, gt=0, lt=1)
    batch_size: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_choice(self) -> ReplaceMeParameters:
        if self.selection is not None and self.blocks > 1:
            raise ValueError("give blocks or selection, not both: a selection says where it cuts")
        return self

    def words(self) -> str:
        """The choice of layers in words."""
        return super().words() or f"ReplaceMe's {'block' if self.blocks == 1 else 'blocks'}"


def _fit_cosine(
    rows: Tensor, work: Compression, options: ReplaceMeParameters
) -> tuple[Tensor, list[float]]:
    """Minimise ``mean(1 - cos(x A + y, z))`` over A, from the identity.

    Args:
        rows: x, z and maybe y, ``[rows, 2 or 3, hidden]``.

    Returns:
        (A as float64 ``[hidden, hidden]``, mean loss of each epoch).

    Raises:
        NumericsError: the loss is not finite.
    """
    hidden, batch = int(work.config.hidden_size), options.batch_rows
    if not options.diagonal:
        warn_of_few_rows(len(rows), hidden)
    start = torch.ones(hidden) if options.diagonal else torch.eye(hidden)
    weight = start.to(work.device).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=options.lr)
    generator = torch.Generator().manual_seed(work.recipe.seed)
    losses: list[float] = []
    steps = options.epochs * -(-len(rows) // batch)
    with tqdm(total=steps, desc="cosine map", delay=2, disable=not work.progress) as bar:
        for _ in range(options.epochs):
            found = list[Tensor]()
            shuffled = torch.split(torch.randperm(len(rows), generator=generator), batch)
            for chosen in shuffled:
                x, z, *y = sent(rows[chosen].float(), weight.device).unbind(1)
                mapped = sum(y, x * weight if options.diagonal else x @ weight)
                loss = (1 - torch.nn.functional.cosine_similarity(mapped, z, dim=-1)).mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                found.append(loss.detach())
                bar.update()
            total = 0.0
            means = torch.stack(found).tolist()  # the device is waited for once an epoch
            for mean, each in zip(means, shuffled, strict=True):
                total += mean * len(each)
            losses.append(total / len(rows))
    trained = weight.detach().to("cpu", torch.float64)
    if not bool(trained.isfinite().all()):
        raise NumericsError("The cosine objective gave a map that is not finite; lower lr.")
    return torch.diag(trained) if options.diagonal else trained, losses
