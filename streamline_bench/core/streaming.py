"""A causal LM whose layers are read from its checkpoint when they run, and let go afterwards.

The model is built without weights. Embeddings, norms and whatever else is outside the layers are
read at once; the LM head and each layer when they are called, or when somebody holds them:

    for index in range(depth):
        with held_layer(model, index):
            ...  # all batches go through this layer

The model's own forward pass runs, so that masks, rotary embeddings and per-layer types are right
for every family. On an accelerator the next layer is read into pinned memory meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.architecture_guard import facts_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.machine.environment import give_back_freed
from streamline_bench.errors import ArchitectureError, CheckpointError

_STREAM = "_layer_stream"
HEAD = -1
"""Stands for the LM head where a layer's index is asked for."""


def streamed_model(
    folder: Path,
    config: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    prefetch: bool | None = None,
) -> Any:
    """Return a causal LM in evaluation mode that reads each layer when it runs.

    Args:
        folder: of the checkpoint.
        config: its transformers config.
        device: where layers run; on the CPU in the stored dtype they are views of the mapped
            file, not copies.
        dtype: of the weights in memory.
        prefetch: read the next layer in a thread; None: on an accelerator only. It takes the
            memory of one more layer.

    Raises:
        CheckpointError: the checkpoint is damaged or lacks weights of the model.
        ArchitectureError: the family is not known, or its layers share weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    reader = CheckpointReader(folder)
    reader.refuse_quantised("the streamed pass reads its weights without their scales")
    family = architecture_of(config)
    if any(facts_of(config, family).shared):
        raise ArchitectureError(
            f"Layers of this '{family.model_type}' model share weights, so that they cannot be "
            "read one by one; use placement resident."
        )
    # Buffers are made for real: rotary frequencies are computed, not stored.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=dtype
        )
    model.eval()
    device = torch.device(device)
    ahead = device.type != "cpu" if prefetch is None else prefetch
    stream = _LayerStream(model, reader, device, ahead)
    stream.attach()
    model.__dict__[_STREAM] = stream
    return model


def is_streamed(model: Any) -> bool:
    """Whether a model is one of :func:`streamed_model`."""
    return _STREAM in model.__dict__


@contextlib.contextmanager
def held_layer(model: Any, index: int, ahead: int | None = None) -> Iterator[Any]:
    """Keep a layer's weights where it computes; yields the layer.

    Of a model in memory they are there anyway.

    Args:
        index: of the layer; :data:`HEAD` for the LM head.
        ahead: which layer comes next, to be read meanwhile.
    """
    stream = model.__dict__.get(_STREAM)
    if stream is None:
        head = architecture_of(model.config).lm_head
        yield model.get_submodule(head) if index == HEAD else decoder_layers(model)[index]
        return
    with stream.held(index, ahead):
        yield stream.module(index)


def layer_copy(model: Any, index: int) -> nn.Module:
    """Return a deep copy of a layer with its weights, which no longer follows the model's."""
    with held_layer(model, index) as layer:
        copied: nn.Module = copy.deepcopy(layer)
    if is_streamed(model):
        del copied.forward  # which loads and runs the model's own layer
    return copied


def settle(model: Any, device: str | torch.device) -> None:
    """Read all weights of a streamed model, to stay; it is a model like any other afterwards.

    No parameter asks for gradients.
    """
    stream: _LayerStream = model.__dict__.pop(_STREAM)
    stream.settle(torch.device(device))


class _LayerStream:
    """Gives a layer its weights before it runs and takes them back after it."""

    def __init__(
        self, model: Any, reader: CheckpointReader, device: torch.device, prefetch: bool
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model = model
        self._reader = reader
        self._device = device
        # How stored names and layouts become the model's (fused experts, for example).
        self._conversions = get_model_conversion_mapping(model)
        self._outside, self._names = _sorted_names(model, reader)
        self._layers = decoder_layers(model)
        self._held: Counter[int] = Counter()
        self._empty: dict[int, list[tuple[nn.Module, str, Any]]] = {}
        # One thread reads, so that the files have one reader; it may read ahead.
        self._thread = ThreadPoolExecutor(1, "layers") if prefetch else None
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    def attach(self) -> None:
        row = architecture_of(self._model.config)
        self._put(self._read(self._outside))
        self._model.tie_weights()
        base = self._model.get_submodule(row.base)
        _require_weights(base, self._reader.folder, {id(p) for p in self._layers.parameters()})
        for module in base.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)
        indices = list(range(len(self._layers)))
        if any(p.is_meta for p in self._model.get_submodule(row.lm_head).parameters()):
            indices.append(HEAD)
        for index in indices:
            module = self.module(index)
            self._empty[index] = [
                (m, n, p) for m in module.modules() for n, p in m._parameters.items()
            ]
            module.forward = self._running(index, module)

    def module(self, index: int) -> Any:
        """Return a layer, or the LM head."""
        if index == HEAD:
            return self._model.get_submodule(architecture_of(self._model.config).lm_head)
        return self._layers[index]

    @contextlib.contextmanager
    def held(self, index: int, ahead: int | None) -> Iterator[None]:
        """Hold a layer's weights inside; nested calls load them once."""
        try:
            self._take(index, ahead)
            yield
        finally:
            self._let_go(index)

    def settle(self, device: torch.device) -> None:
        """Read each layer, and the LM head, onto a device, and leave it there."""
        self._device = device
        for index in self._empty:
            names = self._names[index]
            self._put({name: tensor.clone() for name, tensor in self._read(names).items()})
            module = self.module(index)
            _require_weights(module, self._reader.folder, set())
            del module.forward
        self._model.to(device).requires_grad_(False)

    def _running(self, index: int, module: Any) -> Callable[..., Any]:
        # Not a hook: those run where a layer is left out, too.
        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.held(index, index + 1 if index != HEAD else None):
                return type(module).forward(module, *args, **kwargs)  # its class may have changed

        return forward

    def _take(self, index: int, ahead: int | None) -> None:
        if index not in self._empty:
            return  # a head that is tied to the embeddings
        self._held[index] += 1
        if self._held[index] > 1:
            return
        waiting = self._ahead.pop(index, None)
        wait(self._ahead.values())  # the files have one reader at a time
        self._ahead.clear()
        self._put(self._read(self._names[index]) if waiting is None else waiting.result())
        _require_weights(self.module(index), self._reader.folder, set())
        if self._thread is not None and ahead in self._empty and ahead not in self._held:
            self._ahead[ahead] = self._thread.submit(self._read_ahead, self._names[ahead])

    def _let_go(self, index: int) -> None:
        if index not in self._empty:
            return
        self._held[index] -= 1
        if not self._held[index]:
            del self._held[index]
            for module, name, parameter in self._empty[index]:
                module._parameters[name] = parameter
            give_back_freed()  # what was in pieces between states stays with the process else

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        weights = {name: self._reader.tensor(name, self._model.dtype) for name in names}
        self._reader.release()  # when the last tensor goes, its pages leave this process
        return weights

    def _read_ahead(self, names: list[str]) -> dict[str, Tensor]:
        weights, pinned = self._read(names), self._device.type == "cuda"
        return {n: t.pin_memory() if pinned else t.clone() for n, t in weights.items()}

    def _put(self, weights: dict[str, Tensor]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        load = LoadStateDictConfig(
            device_map={"": self._device}, dtype=self._model.dtype, weight_mapping=self._conversions
        )
        with _no_progress():
            convert_and_load_state_dict_in_model(self._model, weights, load)


def _sorted_names(model: Any, reader: CheckpointReader) -> tuple[list[str], dict[int, list[str]]]:
    """Part tensor names into those outside, and those of each layer and of the LM head."""
    row = architecture_of(model.config)
    # Stored names may lack the base model's prefix: "h.0.ln_1.weight" for transformer.h.
    pattern = re.compile(rf"(?:^|\.){re.escape(row.layers.rpartition('.')[2])}\.(\d+)\.")
    heads = tuple(f"{path}." for path in (row.lm_head, row.stored_as.get(row.lm_head)) if path)
    outside: list[str] = []
    inside: dict[int, list[str]] = defaultdict(list)
    for name in reader.names:
        if found := pattern.search(name):
            inside[int(found[1])].append(name)
        elif not name.startswith(heads):
            outside.append(name)
        elif not reader.tied:
            inside[HEAD].append(name)
    return outside, inside


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
