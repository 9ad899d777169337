"""One pass over the calibration tokens: the similarity of every pair of layer boundaries.

For each token the ``L + 1`` states form a Gram matrix ``H Hᵀ`` of size ``[L + 1, L + 1]``; scaled
by its diagonal it holds all cosines at once. A batched product over the tokens thus serves every
block size, at ``(L + 1)² d`` multiplications per token against some ``12 L d²`` of the model
itself. Only the states of one batch are held. The LM head is not run.

The model may be streamed (:func:`streamed_model`): it is built without weights, embeddings and
norms are read at once, and each layer is mapped from its shards when it runs and released after
it. The model's own forward pass runs, so that masks, rotary embeddings and per-layer types are
right for every family.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_bench.core.architecture import architecture_of, config_entry, decoder_layers
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.forward import evaluating, hidden_of, run_base
from streamline_bench.core.similarity import LastState, Similarity
from streamline_bench.errors import ArchitectureError, CheckpointError, NumericsError

_CHUNK_BYTES = {"cpu": 1 << 22}  # fits a cache; accelerators get more
_CHUNK_BYTES_ACCELERATOR = 1 << 28


def scan(
    model: Any,
    tokens: CalibrationTokens,
    *,
    last_state: LastState = "raw",
    batch_size: int = 1,
    progress: bool = True,
) -> Similarity:
    """Run the model once over the tokens and compare all boundaries.

    Cosines are taken in float32 (float64 for a float64 model) whatever the model's dtype, and
    their sums in float64. Memory does not depend on the number of samples: it is that of one
    forward pass plus ``(L + 1) * batch_size * T * hidden`` values.

    Args:
        model: a causal LM of a known family, on any device; its mode and weights are left alone.
        last_state: ``raw`` compares the last layer's own output; ``postnorm`` the final norm's,
            as implementations that read ``output_hidden_states`` do.
        batch_size: sequences per forward pass; the result does not depend on it beyond rounding.

    Raises:
        ArchitectureError: the family is not in the table.
        NumericsError: a hidden state is NaN or infinite; its layer and sample are named.
    """
    sums = _Sums()
    with (
        torch.no_grad(),
        evaluating(model),
        BoundaryRecorder(model, last_state) as recorder,
        tqdm(
            total=tokens.num_tokens, unit="tok", desc="scan", delay=2, disable=not progress
        ) as bar,
    ):
        for ids, mask in tokens.batches(batch_size, trim=True):
            run_base(model, ids, mask)
            mask = mask.to(recorder.states.device)
            sums.add(recorder.states, None if bool(mask.all()) else mask, _last_tokens(mask))
            bar.update(int(mask.sum()))
    return sums.similarity(tokens, last_state, {"calibration": tokens.summary()})


class BoundaryRecorder:
    """Context in which each forward pass of a model fills :attr:`states`.

    Own hooks instead of ``output_hidden_states``: they see the raw output of the last layer, work
    whether a layer returns a tensor or a tuple, and copy into one buffer that every pass reuses.

    ``states`` is ``[L + 1, batch, seq, hidden]`` in the dtype of the hidden states, on the first
    layer's device; it is valid until the next pass.

    Raises:
        ArchitectureError: the states of this model cannot be compared with each other.
    """

    def __init__(self, model: nn.Module, last_state: LastState = "raw") -> None:
        if config_entry(model.config, "rotations"):
            raise ArchitectureError(
                "The hidden states of a sliced model (SliceGPT) have another basis and width at "
                "every boundary and cannot be compared; give the original model."
            )
        self._layers = decoder_layers(model)
        path = architecture_of(model.config).final_norm
        # OPT-350m has no final norm: the attribute is there and None.
        norm = model.get_submodule(path.rpartition(".")[0])._modules.get(path.rpartition(".")[2])
        self._norm = norm if last_state == "postnorm" else None
        self._buffer: Tensor | None = None
        self._shape: torch.Size = torch.Size()
        self._handles: list[Any] = []

    @property
    def states(self) -> Tensor:
        """The states of the last pass, ``[L + 1, batch, seq, hidden]``."""
        if self._buffer is None:
            raise RuntimeError("no forward pass has been recorded")
        return self._buffer[:, : self._shape.numel()].view(-1, *self._shape)

    def __enter__(self) -> BoundaryRecorder:
        first = self._layers[0].register_forward_pre_hook(self._before_first, with_kwargs=True)
        self._handles.append(first)
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._after(index + 1)))
        if self._norm is not None:
            self._handles.append(self._norm.register_forward_hook(self._after(len(self._layers))))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before_first(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._shape = hidden.shape
        rows = len(self._layers) + 1
        if self._buffer is None or self._buffer.shape[1] < hidden.numel():
            self._buffer = None  # freed before the larger one is made
            self._buffer = hidden.new_empty((rows, hidden.numel()))
        self._store(0, hidden)

    def _after(self, boundary: int) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            self._store(boundary, hidden_of(output))

        return hook

    def _store(self, boundary: int, hidden: Tensor) -> None:
        assert self._buffer is not None
        self._buffer[boundary, : hidden.numel()].copy_(hidden.reshape(-1))


class _Sums:
    """Float64 sums over tokens (cosine) and samples (angular distance)."""

    def __init__(self) -> None:
        self._cosine: Tensor | None = None
        self._angular: Tensor | None = None
        self._samples = 0

    def add(self, states: Tensor, mask: Tensor | None, last: Tensor) -> None:
        """Add a batch: states ``[L + 1, B, T, d]``, mask ``[B, T]`` or None, last ``[B]``."""
        cosine = _cosine_sums(states, mask)
        angular = _angular_sums(states, last)
        if not bool(torch.isfinite(cosine).all()):
            raise _not_finite(states, mask, self._samples)
        self._cosine = cosine if self._cosine is None else self._cosine + cosine
        self._angular = angular if self._angular is None else self._angular + angular
        self._samples += states.shape[1]

    def similarity(
        self, tokens: CalibrationTokens, last_state: LastState, details: dict[str, Any]
    ) -> Similarity:
        assert self._cosine is not None
        assert self._angular is not None
        cosine = (self._cosine / tokens.num_tokens).clamp(-1.0, 1.0)
        angular = self._angular / self._samples
        # By definition; rounding leaves 1 - 1e-7 and arccos makes that 1e-4.
        cosine.fill_diagonal_(1.0)
        angular.fill_diagonal_(0.0)
        return Similarity(
            ((cosine + cosine.T) / 2).numpy(),
            ((angular + angular.T) / 2).numpy(),
            tokens.num_tokens,
            len(tokens),
            last_state,
            details,
        )


def _cosine_sums(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum over unmasked tokens of all pairs' cosines, float64 ``[L + 1, L + 1]``."""
    boundaries, batch, length, hidden = states.shape
    flat = states.reshape(boundaries, batch * length, hidden)
    kept = None if mask is None else mask.reshape(-1)
    dtype = torch.promote_types(states.dtype, torch.float32)
    budget = _CHUNK_BYTES.get(states.device.type, _CHUNK_BYTES_ACCELERATOR)
    chunk = max(budget // (boundaries * hidden * dtype.itemsize), 16)
    # MPS has no float64: there the sum of a chunk is taken in float32.
    wide = torch.float32 if states.device.type == "mps" else torch.float64
    total = torch.zeros(boundaries, boundaries, dtype=wide, device=states.device)
    with _full_precision(states.device):
        for start in range(0, batch * length, chunk):
            h = flat[:, start : start + chunk].to(dtype).transpose(0, 1)
            gram = torch.bmm(h, h.transpose(1, 2))
            inverse = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(dtype).tiny).rsqrt()
            cosine = gram.mul_(inverse[:, :, None]).mul_(inverse[:, None, :])
            if kept is not None:
                cosine = cosine[kept[start : start + chunk]]
            total += cosine.sum(0, dtype=wide)
    return total.to("cpu", torch.float64)


def _angular_sums(states: Tensor, last: Tensor) -> Tensor:
    """Return the sum over samples of ``arccos(cos) / pi`` at the last token, ``[L + 1, L + 1]``."""
    rows = torch.arange(states.shape[1], device=states.device)
    h = states[:, rows, last.to(states.device)].to("cpu", torch.float64)
    h = nn.functional.normalize(h, dim=-1, eps=1e-300).transpose(0, 1)
    cosine = torch.bmm(h, h.transpose(1, 2)).clamp_(-1.0, 1.0)
    return cosine.arccos().sum(0) / math.pi


def _last_tokens(mask: Tensor) -> Tensor:
    """Return the column of each row's last token, int64 ``[B]``."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (columns * mask).amax(dim=1)


def _not_finite(states: Tensor, mask: Tensor | None, first_sample: int) -> NumericsError:
    bad = ~torch.isfinite(states.float().square().sum(-1))
    if mask is not None:
        bad &= mask
    boundary, sample, token = bad.nonzero()[0].tolist()
    where = f"of layer {boundary - 1}" if boundary else "of the embeddings"
    return NumericsError(
        f"The output {where} is NaN, infinite or too large for calibration sample "
        f"{first_sample + sample}, token {token}; check the weights, or try another dtype."
    )


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, no bfloat16, no autocast: neighbouring cosines differ in the third decimal."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def scan_streamed(
    folder: Path | str,
    tokens: CalibrationTokens,
    *,
    last_state: LastState = "raw",
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Similarity:
    """Scan a checkpoint layer by layer: the result of :func:`scan`, less memory.

    At any time the weights of the embeddings and of one layer are held. Every batch reads all
    layers once, so that a larger ``batch_size`` means fewer reads; memory for states grows with
    it as in :func:`scan`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ArchitectureError: the family is not in the table.
        NumericsError: a hidden state is NaN or infinite.
    """
    model = streamed_model(
        Path(folder), device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return scan(model, tokens, last_state=last_state, batch_size=batch_size, progress=progress)


def streamed_model(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return a causal LM in evaluation mode that reads each layer when it runs.

    Only the base model can be called (``model.model`` for Llama): the LM head is left without
    weights. No gradients, no cache across calls is kept by it.

    Args:
        device: where layers run; on the CPU in the stored dtype they are views of the mapped
            file, not copies.
        dtype: of the weights in memory; None: that of the config.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks weights of the model.
        ArchitectureError: the family is not in the table.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = CheckpointReader(folder)
    reader.refuse_quantised("the streamed scan reads its weights without their scales")
    config = (
        reader.wrapper.text_config()
        if reader.wrapper
        else AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    )
    architecture_of(config)
    wanted = {} if dtype is None and config.dtype is None else {"dtype": dtype or config.dtype}
    # Buffers are made for real: rotary frequencies are computed, not stored.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **wanted
        )
    model.eval()
    _LayerStream(model, reader, torch.device(device)).attach()
    return model


class _LayerStream:
    """Hooks that give a layer its weights before it runs and take them back after it."""

    def __init__(self, model: Any, reader: CheckpointReader, device: torch.device) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model = model
        self._reader = reader
        self._device = device
        # How stored names and layouts become the model's (fused experts, for example).
        self._conversions = get_model_conversion_mapping(model)
        self._resident, self._of_layer = _sorted_names(model, reader)

    def attach(self) -> None:
        row = architecture_of(self._model.config)
        self._load(self._resident)
        layers = decoder_layers(self._model)
        outside = {id(p) for p in layers.parameters()}
        base = self._model.get_submodule(row.base)
        _require_weights(base, self._reader.folder, skip=outside)
        for module in base.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before(index))
            layer.register_forward_hook(self._after(layer), always_call=True)

    def _before(self, index: int) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            self._load(self._of_layer[index])
            _require_weights(layer, self._reader.folder, skip=set())

        return hook

    def _after(self, layer: nn.Module) -> Any:
        empty = [(m, n, p) for m in layer.modules() for n, p in m._parameters.items()]

        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            for module, name, parameter in empty:
                module._parameters[name] = parameter

        return hook

    def _load(self, names: list[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        weights = {name: self._reader.tensor(name, self._model.dtype) for name in names}
        self._reader.release()  # when the last tensor goes, its pages leave this process
        load = LoadStateDictConfig(
            device_map={"": self._device}, dtype=self._model.dtype, weight_mapping=self._conversions
        )
        with _no_progress():
            convert_and_load_state_dict_in_model(self._model, weights, load)


def _sorted_names(model: Any, reader: CheckpointReader) -> tuple[list[str], dict[int, list[str]]]:
    """Part tensor names into those outside the layers (LM head left out) and those of each."""
    row = architecture_of(model.config)
    # Stored names may lack the base model's prefix: "h.0.ln_1.weight" for transformer.h.
    pattern = re.compile(rf"(?:^|\.){re.escape(row.layers.rpartition('.')[2])}\.(\d+)\.")
    resident: list[str] = []
    of_layer: dict[int, list[str]] = defaultdict(list)
    for name in reader.names:
        if found := pattern.search(name):
            of_layer[int(found[1])].append(name)
        elif not name.startswith(f"{row.lm_head}."):
            resident.append(name)
    return resident, of_layer


def _require_weights(module: nn.Module, folder: Path, skip: set[int]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_meta and id(parameter) not in skip:
            raise CheckpointError(
                f"{folder} holds no weights for '{name}' of {type(module).__name__}; download or "
                "save it again."
            )


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """Hide the loader's own bar: it would show once per layer."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
