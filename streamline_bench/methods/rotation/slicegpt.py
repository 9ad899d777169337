"""SliceGPT (arXiv 2401.15024): the residual stream loses the directions that carry least.

Norms give their gains to the linear maps behind them, the stream is turned into its principal axes
at every boundary, and the last axes are cut from all that reads or writes them. The result is of
model type ``streamline``, with the widths in ``rotations`` and shortcut matrices in its layers.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.lazy_tensors import LazyTensors
from streamline_bench.core.checkpoint.writer import layer_dtype
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.frozen import Frozen
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import Compressed, Compression, Method
from streamline_bench.methods.rotation.norm_fusion import fuse_norms
from streamline_bench.methods.rotation.principal_axes import require_tokens
from streamline_bench.methods.rotation.signal_store import SignalStore
from streamline_bench.methods.rotation.slice_plan import SlicedSizes, WidthPlan, sliced_host
from streamline_bench.methods.rotation.stream_rotation import RotationOptions, StreamRotation
from streamline_bench.methods.tools.layer_removal import config_json
from streamline_bench.modeling import streamline_config

__all__ = ["SliceGPT", "SliceGPTParameters"]

log = logging.getLogger(__name__)

_GIB = 2**30
_FAST_STEP = 8
_LEAST_STEPS = 50


class SliceGPTParameters(Frozen):
    """Parameters of SliceGPT.

    Attributes:
        slicing: share of the channels to cut, as the paper counts; instead of the recipe's
            sparsity, which is the share of parameters.
        round_to: widths are multiples of this; ``auto``: 8, as in the authors' code, but 1 where 8
            channels are more than a fiftieth of the stream.
        slice_head: slice the stream before the LM head as well.
        signal, final_orientation, damping, batch_size: see :class:`.RotationOptions`.
        activation_gb: signals larger than this (GiB) go to disk instead of memory.
    """

    slicing: float | None = Field(None, ge=0, lt=1)
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    slice_head: bool = False
    signal: Literal["stream", "normalised"] = "stream"
    final_orientation: Literal["pca", "random"] = "pca"
    damping: float = Field(0.01, ge=0)
    batch_size: int = Field(1, ge=1)
    activation_gb: float = Field(16.0, ge=0)


class SliceGPT(Method):
    """Rotate the residual stream to its principal axes and slice it."""

    name = "slicegpt"
    parameters: ClassVar[type[BaseModel]] = SliceGPTParameters

    def compress(self, work: Compression) -> Compressed:
        """Solve for the width, fuse the norms, rotate and slice one boundary after the other."""
        options = SliceGPTParameters.model_validate(work.recipe.parameters)
        hidden = int(work.config.hidden_size)
        sizes = SlicedSizes(
            work.config,
            round_to=_step(hidden) if options.round_to == "auto" else options.round_to,
            slice_head=options.slice_head,
            total=work.reader.num_parameters,
        )
        plan = _plan(work, sizes, options)
        tokens = work.tokens(work.recipe.calibration)
        require_tokens(tokens.num_tokens, hidden)
        log.info("width: %d of %d channels", plan.width, hidden)
        # The model is taken apart in place, so that there is never a second one; whoever asks for
        # the source after this loads it again.
        model = work.model
        work.release_model()
        fuse_norms(model)
        kept = _rotate(work, model, tokens, plan, options)
        config = streamline_config(sliced_host(work.config), rotations=sizes.rotations(plan.width))
        return Compressed(
            config=config_json(config),
            names={},
            tensors=_stored(work, model),
            layers_after=int(work.config.num_hidden_layers),
            chosen={"size": plan.to_dict(), "signal": options.signal, "energy_kept": kept},
            calibration=tokens.summary(),
        )


def _step(hidden: int) -> int:
    """Return what widths are multiples of: fast on hardware, and fine enough to reach a share."""
    return _FAST_STEP if hidden >= _LEAST_STEPS * _FAST_STEP else 1


def _plan(work: Compression, sizes: SlicedSizes, options: SliceGPTParameters) -> WidthPlan:
    if work.recipe.n_layers is not None:
        raise SparsityError(
            f"SliceGPT removes channels, not layers (n_layers={work.recipe.n_layers}); give a "
            "sparsity or parameters.slicing."
        )
    if (work.recipe.sparsity is None) == (options.slicing is None):
        raise SparsityError(
            "Give SliceGPT either a sparsity (share of parameters) or parameters.slicing (share "
            f"of channels); the recipe has {work.recipe.sparsity} and {options.slicing}."
        )
    if options.slicing is not None:
        return sizes.of_slicing(options.slicing)
    assert work.recipe.sparsity is not None
    return sizes.of_sparsity(work.recipe.sparsity)


def _rotate(
    work: Compression,
    model: Any,
    tokens: CalibrationTokens,
    plan: WidthPlan,
    options: SliceGPTParameters,
) -> list[float]:
    size = tokens.input_ids.numel() * int(work.config.hidden_size) * model.dtype.itemsize
    store = SignalStore(work.work / "signals", size, int(options.activation_gb * _GIB))
    rotation = StreamRotation(
        model,
        tokens,
        store,
        RotationOptions(
            signal=options.signal,
            orientation=options.final_orientation,
            damping=options.damping,
            batch_size=options.batch_size,
            seed=work.recipe.seed,
        ),
        progress=work.progress,
    )
    try:
        rotation.run(plan.width, plan.head_width)
    finally:
        store.close()
    return [round(share, 6) for share in rotation.kept]


def _stored(work: Compression, model: Any) -> LazyTensors:
    """Return the tensors to write, in the dtype that the source's layers are stored in."""
    dtype = layer_dtype(work.reader, architecture_of(work.config), 0)
    state: dict[str, Tensor] = model.state_dict()
    return LazyTensors(state, lambda name: state[name].to("cpu", dtype).contiguous())
