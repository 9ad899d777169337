"""Rotates a model's residual stream into its principal axes and slices it, from point to point.

The points are behind the embeddings and behind each layer's attention and MLP; behind the whole
layer where both read the same input. The layers below a
point compute its signal as they already are: rotated and sliced
(SliceGPT, arXiv 2401.15024, section 3.3). Signals are kept in the model's own basis: a sub-layer
first gets its inputs rotated, its shortcut leads back to the whole width, and its output is rotated
once the axes behind it are known. The tokens pass through every sub-layer once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import PartialForward, sent
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.state_store import BatchStore
from streamline_bench.core.streaming import held_layer
from streamline_bench.errors import CalibrationError, NumericsError
from streamline_bench.methods.tools.normal_equations import WIDENED_ROWS, widened
from streamline_bench.modeling.rotations import (
    attention_inputs,
    mlp_inputs,
    output_maps,
    pad_embeddings,
    set_shortcut,
    set_weight,
    stream_embeddings,
    weight_of,
)


class RotationOptions(Frozen):
    """How axes are found.

    Attributes:
        signal: what the axes are those of: the ``stream`` itself, as in the authors' code, or the
            ``normalised`` stream, which is what the paper's equations name.
        final_orientation: ``pca``, or ``random``: the kept axes are turned among themselves.
        damping: see :meth:`Covariance.axes`.
        batch_size: sequences per pass.
    """

    signal: Literal["stream", "normalised"] = "stream"
    final_orientation: Literal["pca", "random"] = "pca"
    damping: float = Field(0.01, ge=0)
    batch_size: int = Field(1, ge=1)


class RotatedParts(Protocol):
    """What a streamed model's layers need: they have weights only while they are rotated."""

    def begin(self, layer: Any) -> None:
        """Make a layer ready that was just read."""

    def end(self, index: int, layer: Any) -> None:
        """Keep a layer that was rotated; its weights go afterwards."""

    def head(self) -> AbstractContextManager[None]:
        """Hold the LM head, made ready, with embeddings kept; at the end it is kept, too."""


class StreamRotation:
    """Works through a causal LM whose norms were fused (:func:`.norm_fusion.fuse_norms`), in place.

    Args:
        model: causal LM, in evaluation mode.
        tokens: calibration tokens; pads do not count.
        store: where the signals of one point are held.
        seed: of the random orientation.
        parts: what a streamed model's layers need before and after they are rotated.

    Attributes:
        kept: share of the signal's energy kept at each point: behind the embeddings, then per
            layer behind attention and behind the MLP (or behind both, where they read the same
            input).
    """

    def __init__(
        self,
        model: Any,
        tokens: CalibrationTokens,
        store: BatchStore,
        options: RotationOptions,
        *,
        seed: int = 0,
        progress: bool = True,
        parts: RotatedParts | None = None,
    ) -> None:
        self.kept: list[float] = []
        self._parts = parts
        self._model = model
        self._tokens = tokens
        self._store = store
        self._options = options
        self._seed = seed
        self._progress = progress
        self._row = architecture_of(model.config)
        self._parallel = self._row.is_parallel(model.config)
        self._layers: list[Any] = list(decoder_layers(model))
        self._norm: Any = model.get_submodule(self._row.final_norm)

    @torch.no_grad()
    def run(self, width: int, head_width: int) -> None:
        """Rotate everything; keep ``width`` axes, and ``head_width`` before the LM head.

        Raises:
            CalibrationError: there are fewer tokens than channels.
            NumericsError: a signal is zero or not finite; the layer is named.
        """
        steps = (1 if self._parallel else 2) * len(self._layers) + 1
        with (
            PartialForward(self._model) as forward,
            tqdm(total=steps, desc="rotating", delay=2, disable=not self._progress) as bar,
        ):
            basis = self._embed(forward, width)
            bar.update()
            for index in range(len(self._layers)):
                is_last = index == len(self._layers) - 1
                last_width = head_width if is_last else width
                with held_layer(self._model, index) as layer:
                    if self._parts is not None:
                        self._parts.begin(layer)
                    if self._parallel:
                        basis = self._both(forward, index, basis, last_width)
                    else:
                        basis = self._attention(forward, index, basis, width)
                        bar.update()
                        basis = self._mlp(index, basis, last_width)
                    if self._parts is not None:
                        self._parts.end(index, layer)
                bar.update()
        with nullcontext() if self._parts is None else self._parts.head():
            _turn_table(self._model.get_submodule(self._row.lm_head), basis)
            pad_embeddings(self._model, head_width)

    def _embed(self, forward: PartialForward, width: int) -> Tensor:
        everything = range(len(self._layers))

        def signal(number: int, ids: Tensor, mask: Tensor) -> Tensor:
            forward.hidden(ids, mask, skip=everything, record=True)
            return forward.states[0]

        basis = self._axes(signal, width, "of the embeddings")
        for embedding in stream_embeddings(self._model, self._row):
            _turn_table(embedding, basis)
        return basis

    def _attention(self, forward: PartialForward, index: int, basis: Tensor, width: int) -> Tensor:
        layer = self._layers[index]
        _turn_inputs(attention_inputs(layer, self._row), basis)
        set_shortcut(layer, "attention_shortcut", basis.to(self._like()))
        layer.feed = lambda hidden: 0.0
        try:
            signal = self._layer_signal(forward, index, basis)
            found = self._axes(signal, width, f"behind attention of layer {index}")
        finally:
            del layer.feed
        _turn_output(output_maps(layer, self._row)[0], found)
        set_shortcut(layer, "attention_shortcut", (found.T @ basis).to(self._like()))
        return found

    def _both(self, forward: PartialForward, index: int, basis: Tensor, width: int) -> Tensor:
        """Turn a layer whose attention and MLP read the same input: nothing lies between them."""
        layer = self._layers[index]
        _turn_inputs(attention_inputs(layer, self._row) + mlp_inputs(layer, self._row), basis)
        set_shortcut(layer, "attention_shortcut", basis.to(self._like()))
        signal = self._layer_signal(forward, index, basis)
        found = self._axes(signal, width, f"behind layer {index}")
        for linear in output_maps(layer, self._row):
            _turn_output(linear, found)
        set_shortcut(layer, "attention_shortcut", (found.T @ basis).to(self._like()))
        return found

    def _layer_signal(
        self, forward: PartialForward, index: int, basis: Tensor
    ) -> Callable[[int, Tensor, Tensor], Tensor]:
        """Return a function that runs one layer on the signals stored last."""
        others = [other for other in range(len(self._layers)) if other != index]

        def signal(number: int, ids: Tensor, mask: Tensor) -> Tensor:
            # A pass for layer 0 begins at the embeddings, which are run again.
            state = {"start": index, "state": self._turned(number, basis)} if index else {}
            forward.hidden(ids, mask, skip=others, record=True, **state)
            return forward.states[len(self._layers)]

        return signal

    def _mlp(self, index: int, basis: Tensor, width: int) -> Tensor:
        layer = self._layers[index]
        _turn_inputs(mlp_inputs(layer, self._row), basis)
        set_shortcut(layer, "mlp_shortcut", basis.to(self._like()))

        def signal(number: int, ids: Tensor, mask: Tensor) -> Tensor:
            states = self._turned(number, basis)
            fed: Tensor = layer.mlp_shortcut(states) + layer.feed(states)
            return fed

        found = self._axes(signal, width, f"behind the MLP of layer {index}")
        _turn_output(output_maps(layer, self._row)[1], found)
        set_shortcut(layer, "mlp_shortcut", (found.T @ basis).to(self._like()))
        return found

    def _axes(
        self, signal_of: Callable[[int, Tensor, Tensor], Tensor], width: int, where: str
    ) -> Tensor:
        """Return the first ``width`` axes ``[hidden, width]``, float64; the signals are stored."""
        options = self._options
        device = self._like().device
        covariance = Covariance(int(self._model.config.hidden_size), device)
        for number, (ids, mask) in enumerate(self._tokens.batches(options.batch_size, trim=True)):
            signal = signal_of(number, ids, mask)
            self._store[number] = signal
            # Places are counted on the host, so that an accelerator is not waited for.
            rows = signal.flatten(0, 1)
            if not bool(mask.all()):
                rows = rows[sent(mask.flatten().nonzero()[:, 0], signal.device)]
            covariance.add(self._norm(rows) if options.signal == "normalised" else rows)
        found = covariance.axes(options.damping, where)
        axes = found.axes
        if options.final_orientation == "random":
            axes = turned_at_random(axes, width, self._seed + len(self.kept))
        self.kept.append(found.kept(width))
        return axes[:, :width]

    def _turned(self, number: int, basis: Tensor) -> Tensor:
        like = self._like()
        return self._store.load(number, like.device) @ basis.to(like)

    def _like(self) -> Tensor:
        """Return a tensor with the dtype and device of the model's weights."""
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight


def _turn_inputs(modules: list[Any], basis: Tensor) -> None:
    """Let linear maps read the stream in another basis ``[d, width]``."""
    for module in modules:
        weight = weight_of(module)
        turned = module.weight.new_empty(len(weight), basis.shape[1])
        _turn_rows(weight, turned, basis)
        set_weight(module, turned)


def _turn_table(module: Any, basis: Tensor) -> None:
    """Do the same with embeddings or the LM head, within the memory of the table."""
    weight = module.weight.detach()
    turned = weight.reshape(-1)[: len(weight) * basis.shape[1]].view(len(weight), -1)
    _turn_rows(weight, turned, basis)
    set_weight(module, turned)


def _turn_rows(weight: Tensor, turned: Tensor, basis: Tensor) -> None:
    """Fill ``turned``, which may begin where ``weight`` does: its rows are not longer."""
    pairs = (torch.split(each, WIDENED_ROWS) for each in (weight, turned))
    for rows, place in zip(*pairs, strict=True):
        place.copy_(widened(rows) @ basis)


def _turn_output(linear: Any, basis: Tensor) -> None:
    """Let a linear map write the stream in another basis ``[d, width]``."""
    weight, bias = weight_of(linear), linear.bias
    turned = linear.weight.new_empty(basis.shape[1], weight.shape[1])
    pairs = (torch.split(each, WIDENED_ROWS, dim=1) for each in (weight, turned))
    for columns, place in zip(*pairs, strict=True):
        place.copy_(basis.T @ widened(columns))
    set_weight(linear, turned)
    if bias is not None:
        linear.bias = torch.nn.Parameter((widened(bias) @ basis).to(bias))


@dataclass(frozen=True)
class PrincipalAxes:
    """An orthogonal basis, the axis of most energy first.

    Attributes:
        axes: float64 ``[d, d]``, one axis per column.
        energies: float64 ``[d]``, mean square of the signal along each axis, descending.
    """

    axes: Tensor
    energies: Tensor

    def kept(self, width: int) -> float:
        """Return the share of the signal's energy along the first ``width`` axes."""
        return float(self.energies[:width].sum() / self.energies.sum())


class Covariance:
    """``Σ xᵀx`` of rows ``[n, d]``; not centred (SliceGPT, arXiv 2401.15024, section 3.3).

    Attributes:
        num_rows: rows added so far.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.num_rows = 0
        self._sum = widened(torch.zeros(size, size, device=device))

    def add(self, rows: Tensor) -> None:
        """Add rows ``[n, d]`` of any float dtype; leave pads out."""
        wide = widened(rows)
        self._sum.addmm_(wide.T, wide)
        self.num_rows += len(rows)

    def axes(self, damping: float, where: str) -> PrincipalAxes:
        """Return the principal axes.

        Args:
            damping: share of the mean of the diagonal that is added to it. It moves no axis and
                guards the solver where channels are dead.
            where: what the signal is, for messages.

        Raises:
            CalibrationError: there are fewer rows than axes.
            NumericsError: the signal has NaN or infinity, or is zero.
        """
        size = len(self._sum)
        require_tokens(self.num_rows, size)
        if not bool(self._sum.isfinite().all()):
            raise NumericsError(
                f"The signal {where} holds NaN or infinity, so that it has no principal axes; "
                "load the model in float32 or bfloat16 and check its weights."
            )
        level = self._sum.diagonal().mean()
        if float(level) == 0.0:
            raise NumericsError(
                f"The signal {where} is zero on all {self.num_rows} calibration tokens; check the "
                "model's weights."
            )
        shift = damping * level
        damped = self._sum.clone()
        damped.diagonal().add_(shift)
        energies, axes = torch.linalg.eigh(damped)
        energies = (energies - shift).clamp_min(0) / self.num_rows
        return PrincipalAxes(axes.flip(1), energies.flip(0))


def require_tokens(tokens: int, size: int) -> None:
    """Refuse to look for ``size`` principal axes in fewer tokens.

    Raises:
        CalibrationError: there are fewer tokens than axes.
    """
    if tokens < size:
        raise CalibrationError(
            f"The principal axes of {size} channels need at least {size} calibration tokens and "
            f"got {tokens}; give more samples or longer ones."
        )


def turned_at_random(axes: Tensor, width: int, seed: int) -> Tensor:
    """Return ``axes`` with the first ``width`` columns turned at random among themselves.

    They span the same space; energy is then spread evenly, which helps quantisation.
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(gaussian)
    basis = basis * upper.diagonal().sign()  # without it the signs are not uniform
    turned = axes.clone()
    turned[:, :width] = axes[:, :width] @ basis.to(axes)
    return turned
