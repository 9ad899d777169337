"""A causal LM whose decoder layers hold weights only while they run.

The model is built without weights. Embeddings and norms are read at once; each layer is mapped
from its safetensors shards when its turn comes and let go after it. The parent's own forward pass
runs, so that masks, rotary embeddings and per-layer types are right for every family.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.scan.scan import scan
from streamline_bench.core.scan.similarity import LastState, Similarity
from streamline_bench.errors import CheckpointError


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
    """Scan a checkpoint layer by layer: the result of :func:`.scan.scan`, less memory.

    At any time the weights of the embeddings and of one layer are held. Every batch reads all
    layers once, so that a larger ``batch_size`` means fewer reads; memory for states grows with
    it as in :func:`.scan.scan`.

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
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
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

        weights = {name: self._reader.tensor(name) for name in names}
        self._reader.release()  # when the last tensor goes, its pages leave this process
        load = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=self._model.dtype,
            weight_mapping=self._conversions,
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
