"""What a training depends on, as one hash: a checkpoint of another training is never taken up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import decoder_layers

__all__ = ["key_of", "weights_digest"]

_VERSION = 1  # raised when the same settings would give another result


def weights_digest(model: nn.Module, stop: int | None) -> str:
    """Return the SHA-256 (hex) of a model's weights, without those of layers ``stop`` and later.

    Layers behind the block play no part in hidden-state training, so hashing them is left out.
    """
    unused = set()
    if stop is not None:
        unused = {id(t) for layer in decoder_layers(model)[stop:] for t in layer.parameters()}
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        if id(tensor) not in unused:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


def key_of(**facts: Any) -> str:
    """Return the SHA-256 (hex) of facts that JSON can express."""
    payload = json.dumps({**facts, "version": _VERSION}, sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
