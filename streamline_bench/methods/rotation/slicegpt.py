"""SliceGPT (arXiv 2401.15024): removes the directions of the residual stream with least energy.

The gains of norms move into the linear maps behind them. Behind every sub-layer the stream is
turned into its principal axes, and the last axes are cut from all that reads or writes them. The
result is of model type ``streamline``, with the widths in ``rotations`` and shortcut matrices in
its layers.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from streamline_bench.core.architecture import architecture_of, depth_of
from streamline_bench.core.checkpoint.folder import open_shard
from streamline_bench.core.checkpoint.shard import Part, write_shard
from streamline_bench.core.checkpoint.writer import LazyTensors, layer_dtype
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.core.state_store import BatchStore
from streamline_bench.core.streaming import HEAD, held_layer, is_streamed
from streamline_bench.core.surgery import model_sizes
from streamline_bench.errors import (
    ArchitectureError,
    OutputError,
    SparsityError,
    library_errors,
)
from streamline_bench.methods.base import Compressed, Compression, Method, Size
from streamline_bench.methods.rotation.norm_fusion import NormFusion, fuse_norms
from streamline_bench.methods.rotation.stream_rotation import (
    RotationOptions,
    StreamRotation,
    require_tokens,
)
from streamline_bench.methods.tools.layer_removal import config_json
from streamline_bench.methods.tools.sizes import Stored
from streamline_bench.modeling import register, streamline_config
from streamline_bench.modeling.rotations import Rotations, require_rotatable, stream_embeddings

log = logging.getLogger(__name__)

_GIB = 2**30
_FAST_STEP = 8
_LEAST_STEPS = 50


class SliceGPTParameters(RotationOptions):
    """Parameters of SliceGPT.

    Attributes:
        slicing: share of the channels to cut, as the paper counts; instead of the recipe's
            sparsity, which is the share of parameters.
        round_to: widths are multiples of this; ``auto``: 8, as in the authors' code, but 1 where 8
            channels are more than a fiftieth of the stream.
        slice_head: slice the stream before the LM head as well.
        activation_gb: signals larger than this (GiB) are kept on disk instead of in memory.
    """

    slicing: float | None = Field(None, ge=0, lt=1)
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    slice_head: bool = False
    activation_gb: float = Field(16.0, ge=0)


class SliceGPT(Method):
    """Rotate the residual stream to its principal axes and slice it."""

    name = "slicegpt"
    passes = frozenset({"axes"})
    streamed = True
    parameters: ClassVar[type[BaseModel]] = SliceGPTParameters
    keeps_stream = False
    removes = "channels of the residual stream"

    def reads_seed(self, parameters: Mapping[str, Any]) -> bool:
        return SliceGPTParameters.model_validate(parameters).final_orientation == "random"

    def stock(self, recipe: Recipe) -> bool:
        """No stock class has shortcut matrices."""
        return False

    def sizes(self, work: Compression) -> Iterator[Size]:
        """Yield every width at which the model is smaller, shortcut matrices counted."""
        options = SliceGPTParameters.model_validate(work.recipe.parameters)
        stored, item = Stored.of(work.reader), _stored_dtype(work).itemsize
        for plan in _sizes(work, options).every():
            yield replace(
                stored.less({"parameters.slicing": plan.slicing}, parameters=0),
                parameters=plan.parameters,
                nbytes=plan.parameters * item,
            )

    def compress(self, work: Compression) -> Compressed:
        """Solve for the width, fuse the norms, rotate and slice one sub-layer after the other."""
        options = SliceGPTParameters.model_validate(work.recipe.parameters)
        hidden = int(work.config.hidden_size)
        sizes = _sizes(work, options)
        plan = _plan(work, sizes, options)
        tokens = work.tokens(work.recipe.calibration)
        require_tokens(tokens.num_tokens, hidden)
        log.info("width: %d of %d channels", plan.width, hidden)
        # The model is changed in place, so that memory holds one. A later use of work.model loads
        # the source again.
        model = work.model
        work.release_model()
        if is_streamed(model):
            tensors, kept = _sliced_by_layer(work, model, tokens, plan, options)
        else:
            _fuse(model, tokens)
            kept = _rotate(work, model, tokens, plan, options)
            dtype, state = _stored_dtype(work), model.state_dict()
            tensors = LazyTensors(state, lambda name: state[name].to("cpu", dtype).contiguous())
        config = streamline_config(sliced_host(work.config), rotations=sizes.rotations(plan.width))
        return Compressed(
            config=config_json(config),
            names={},
            tensors=tensors,
            layers_after=depth_of(work.config),
            chosen={"size": asdict(plan), "signal": options.signal, "energy_kept": kept},
            calibration=tokens.summary(),
        )


def _stored_dtype(work: Compression) -> torch.dtype:
    return layer_dtype(work.reader, architecture_of(work.config), 0)


def _sizes(work: Compression, options: SliceGPTParameters) -> SlicedSizes:
    # Fast on hardware, and fine enough to reach a share.
    wide = int(work.config.hidden_size) >= _LEAST_STEPS * _FAST_STEP
    step = _FAST_STEP if wide else 1
    return SlicedSizes(
        work.config,
        round_to=step if options.round_to == "auto" else options.round_to,
        slice_head=options.slice_head,
        total=work.reader.num_parameters,
    )


def _plan(work: Compression, sizes: SlicedSizes, options: SliceGPTParameters) -> SlicePlan:
    if (work.recipe.sparsity is None) == (options.slicing is None):
        raise SparsityError(
            "Give SliceGPT either a sparsity (share of parameters) or parameters.slicing (share "
            f"of channels); the recipe has {work.recipe.sparsity} and {options.slicing}."
        )
    if options.slicing is not None:
        return sizes.of_slicing(options.slicing)
    assert work.recipe.sparsity is not None
    return sizes.of_sparsity(work.recipe.sparsity)


def _cannot(model_type: str) -> str:
    return f"The residual stream of this '{model_type}' model cannot be rotated and sliced"


_PROBE_TOKENS = 16
_FUSED_ERROR = 0.05
"""Share of the logits' size by which fused norms may change them. Rounding of bfloat16 stays below;
what is not understood (a factor, a third branch) changes them by a multiple."""


def _fuse(model: Any, tokens: CalibrationTokens) -> None:
    """Fuse the norms; where the family was inferred, check that the model computes what it did.

    Raises:
        ArchitectureError: it does not, or cannot be run that way.
    """
    family = architecture_of(model.config)
    if not family.inferred:
        fuse_norms(model)
        return
    ids = tokens.input_ids[:1, :_PROBE_TOKENS].to(model.get_input_embeddings().weight.device)
    what = _cannot(family.model_type)
    unknown = f"{what}: its layers call their parts in a way that is not known here"
    with library_errors(unknown, "choose a depth method", ArchitectureError), torch.no_grad():
        before = model(ids, use_cache=False).logits.float()
        fuse_norms(model)
        after = model(ids, use_cache=False).logits.float()
    error = float((after - before).norm() / before.norm())
    if not error < _FUSED_ERROR:
        raise ArchitectureError(
            f"{what}: with its norms fused it computes other logits (by {error:.0%}), so that its "
            "layers do more than this method knows of; choose a depth method."
        )


def _sliced_by_layer(
    work: Compression,
    model: Any,
    tokens: CalibrationTokens,
    plan: SlicePlan,
    options: SliceGPTParameters,
) -> tuple[LazyTensors, list[float]]:
    """Fuse, rotate and slice a streamed model; its tensors are kept in files, layer by layer.

    Raises:
        ArchitectureError: the family was inferred, so that the whole model has to be compared.
    """
    family = architecture_of(model.config)
    if family.inferred:
        raise ArchitectureError(
            f"Whether the residual stream of this '{family.model_type}' model can be rotated is "
            "checked on the whole model; use placement resident."
        )
    parts = _SlicedParts(work, model)
    parts.fusion.stream()
    kept = _rotate(work, model, tokens, plan, options, parts)
    return LazyTensors(model.state_dict(), parts.tensor), kept


class _SlicedParts:
    """Keeps the parts of a sliced model in files of a folder, as :class:`RotatedParts`."""

    def __init__(self, work: Compression, model: Any) -> None:
        self.fusion = NormFusion(model)
        self._folder, self._model, self._dtype = work.work / "sliced", model, _stored_dtype(work)
        self._reader = work.reader
        self._family = architecture_of(model.config)
        head: Any = model.get_submodule(self._family.lm_head)
        self._tied = head.weight is model.get_input_embeddings().weight
        shutil.rmtree(self._folder, ignore_errors=True)  # left by an interrupted attempt
        self._folder.mkdir()

    def begin(self, layer: Any) -> None:
        self.fusion.check(layer)
        self.fusion.layer(layer)

    def end(self, index: int, layer: Any) -> None:
        prefix = f"{self._family.layers}.{index}."
        self._save(f"layer-{index}", {prefix + n: t for n, t in layer.state_dict().items()})
        for module in layer.modules():  # what the rotation put in does not go by itself
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.to("meta"))

    @contextmanager
    def head(self) -> Iterator[None]:
        self._keep("outside")
        like = self._model.get_input_embeddings().weight.new_empty(0)
        done = stream_embeddings(self._model, self._family)
        if self._tied:
            done.append(self._model.get_submodule(self._family.lm_head))
        for module in done:
            module.weight = torch.nn.Parameter(module.weight.to("meta"))
        with held_layer(self._model, HEAD) as head:
            if self._tied:  # read anew: the embeddings were turned in place
                table = self._reader.tensor(self._reader.embeddings_name, like.dtype)
                head.weight = torch.nn.Parameter(table.to(like, copy=True))
            self.fusion.head()
            yield
            self._keep("head")

    def tensor(self, name: str) -> Tensor:
        """Return a kept tensor by its name in the model."""
        tensor: Tensor = open_shard(self._file(self._part(name)), "pt").get_tensor(name)
        return tensor

    def _part(self, name: str) -> str:
        within = f"{self._family.layers}."
        if name.startswith(within):
            return f"layer-{name.removeprefix(within).partition('.')[0]}"
        return "head" if name.startswith(f"{self._family.lm_head}.") else "outside"

    def _keep(self, part: str) -> None:
        state = self._model.state_dict().items()
        self._save(part, {name: tensor for name, tensor in state if self._part(name) == part})

    def _save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._file(part)
        with library_errors(f"{path} cannot be written", "free space", OutputError):
            write_shard(path, [Part.of(n, t, self._dtype) for n, t in tensors.items()])

    def _file(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"


def _rotate(
    work: Compression,
    model: Any,
    tokens: CalibrationTokens,
    plan: SlicePlan,
    options: SliceGPTParameters,
    parts: _SlicedParts | None = None,
) -> list[float]:
    size = tokens.input_ids.numel() * int(work.config.hidden_size) * model.dtype.itemsize
    budget, device = int(options.activation_gb * _GIB), torch.device(work.device)
    store = BatchStore(work.work / "signals", size, budget, device)
    rotation = StreamRotation(
        model, tokens, store, options, seed=work.recipe.seed, progress=work.progress, parts=parts
    )
    known = not architecture_of(work.config).inferred
    what = f"{_cannot(work.config.model_type)}: a sliced model of this type does not run"
    try:
        with (
            nullcontext()
            if known
            else library_errors(what, "choose a depth method", ArchitectureError)
        ):
            rotation.run(plan.width, plan.head_width)
    finally:
        store.close()
    return [round(share, 6) for share in rotation.kept]


@dataclass(frozen=True)
class SlicePlan:
    """A width and what it amounts to. Shares are of the source model's parameters.

    Attributes:
        width: channels kept behind every sub-layer.
        head_width: channels kept before the LM head.
        slicing: share of the channels cut, ``1 - width / hidden``.
        parameters: of the result, shortcut matrices counted.
        total: parameters of the source.
        reached: ``1 - parameters / total``.
        requested: the share of parameters asked for; None if the slicing was given.
    """

    width: int
    head_width: int
    slicing: float
    parameters: int
    total: int
    reached: float
    requested: float | None


class SlicedSizes:
    """Sizes of a model as a function of the width of its stream.

    Args:
        config: of the source, any rotatable family.
        round_to: widths are multiples of this.
        slice_head: the stream is sliced before the LM head as well.
        total: parameters of the source; None: counted from the config.

    Raises:
        ArchitectureError: the residual stream of this model cannot be rotated.
    """

    def __init__(
        self, config: Any, *, round_to: int = 8, slice_head: bool = False, total: int | None = None
    ) -> None:
        register()
        require_rotatable(config)
        self._config = config
        self._hidden = int(config.hidden_size)
        self._round_to = round_to
        self._slice_head = slice_head
        self.total = model_sizes(config).total if total is None else total

    def of_slicing(self, slicing: float) -> SlicePlan:
        """Return the plan that cuts at least the share ``slicing`` of the channels.

        Raises:
            SparsityError: no channel is left.
        """
        # The paper's rule; the tiny term keeps (1 - 0.25) * 4096 from rounding to 3071.
        width = math.floor((1 - slicing) * self._hidden + 1e-6)
        width -= width % self._round_to
        if width < 1:
            raise SparsityError(
                f"Slicing {slicing} leaves no channel of {self._hidden} in steps of "
                f"{self._round_to}; give a smaller slicing or round_to."
            )
        return self._plan(width, None)

    def of_sparsity(self, sparsity: float) -> SlicePlan:
        """Return the plan whose share of removed parameters is nearest to ``sparsity``.

        Raises:
            SparsityError: no width comes near it.
        """
        low, high = 1, max((self._hidden - 1) // self._round_to, 1)
        if self._hidden <= self._round_to:
            raise SparsityError(
                f"A stream of {self._hidden} channels cannot be sliced in steps of "
                f"{self._round_to}; give a smaller round_to."
            )
        smallest, largest = self._reached(high), self._reached(low)
        while high - low > 1:
            middle = (low + high) // 2
            if self._reached(middle) >= sparsity:
                low = middle
            else:
                high = middle
        step = abs(self._reached(low) - self._reached(high)) or 1.0
        best = min((low, high), key=lambda steps: abs(self._reached(steps) - sparsity))
        reached = self._reached(best)
        if reached <= 0 or abs(reached - sparsity) > step:
            # Shortcut matrices can outweigh the first steps: the model would grow.
            least = f"{smallest:.4f} to" if smallest > 0 else "shares above 0 up to"
            raise SparsityError(
                f"Sparsity {sparsity} is out of reach: slicing this model's stream, shortcut "
                f"matrices counted, reaches {least} {largest:.4f}; choose a share in that range."
            )
        return self._plan(best * self._round_to, sparsity)

    def every(self) -> Iterator[SlicePlan]:
        """Yield the plans that make the model smaller, the widest first.

        Parameters are a polynomial of degree two in the width: each matrix has at most two sides
        along the stream. Three widths give all.
        """
        widths = range((self._hidden - 1) // self._round_to, 0, -1)
        at = [Fraction(self._parameters(width)) for width in (1, 2, 3)]
        square = (at[2] - 2 * at[1] + at[0]) / 2
        line = at[1] - at[0] - 3 * square
        for width in (steps * self._round_to for steps in widths):
            parameters = int(square * width**2 + line * width + at[0] - square - line)
            if parameters < self.total:
                yield self._of_width(width, parameters, None)

    def rotations(self, width: int) -> Rotations:
        """Return the spec of the model with that width."""
        return Rotations.uniform(
            depth_of(self._config),
            width,
            norm_divisor=self._hidden,
            head_width=width if self._slice_head else self._hidden,
            head_bias=self._head_bias,
            parallel=architecture_of(self._config).is_parallel(self._config),
        )

    def _plan(self, width: int, requested: float | None) -> SlicePlan:
        return self._of_width(width, self._parameters(width), requested)

    def _of_width(self, width: int, parameters: int, requested: float | None) -> SlicePlan:
        return SlicePlan(
            width=width, head_width=width if self._slice_head else self._hidden,
            slicing=1 - width / self._hidden, parameters=parameters, total=self.total,
            reached=1 - parameters / self.total, requested=requested,
        )  # fmt: skip

    def _reached(self, steps: int) -> float:
        return 1 - self._parameters(steps * self._round_to) / self.total

    def _parameters(self, width: int) -> int:
        config = streamline_config(sliced_host(self._config), rotations=self.rotations(width))
        try:
            return model_sizes(config).total
        except ArchitectureError as error:
            if not architecture_of(self._config).inferred:
                raise
            raise ArchitectureError(
                f"{_cannot(self._config.model_type)}: its modules lie in places that are not known "
                f"here ({error.__cause__ or error}); choose a depth method."
            ) from None

    @cached_property
    def _head_bias(self) -> bool:
        from streamline_bench.core.architecture_inference import meta_model

        norm = meta_model(self._config).get_submodule(architecture_of(self._config).final_norm)
        return getattr(norm, "bias", None) is not None


def sliced_host(config: Any) -> Any:
    """Return the host's config as a sliced model has it: untied, without factors of sub-layers."""
    entries = config.to_dict() | {"tie_word_embeddings": False}
    if "residual_multiplier" in entries:
        entries["residual_multiplier"] = 1.0
    return type(config).from_dict(entries)
