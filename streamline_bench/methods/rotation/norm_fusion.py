"""Moves what norms do besides dividing by the root mean square into the linear maps around them.

A norm's gain (and bias) is moved into the maps that read it; where the norm is a LayerNorm, the
mean it subtracts is taken out of everything that writes to the residual stream. What remains
commutes with rotations of the stream (SliceGPT, arXiv 2401.15024, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from streamline_bench.core.architecture import Architecture, decoder_layers
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.tools.normal_equations import widened
from streamline_bench.modeling.rotations import (
    attention_inputs,
    mlp_inputs,
    output_maps,
    pad_embeddings,
    replace_norms,
    require_rotatable,
    rotate_layer_class,
    stream_embeddings,
    weight_of,
)

_PROBES = 4
_ROUNDING = 16  # units of the dtype's epsilon by which two ways to normalise may differ


@torch.no_grad()
def fuse_norms(model: Any) -> None:
    """Turn a causal LM, in place, into one with weightless norms and layers with shortcuts.

    The LM head is untied from the embeddings, and gets a bias where the final norm has one. The
    shortcuts pass their input on; the logits stay the same.

    Raises:
        ArchitectureError: the residual stream of this model cannot be rotated.
    """
    family = require_rotatable(model.config)
    head: Any = model.get_submodule(family.lm_head)
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    norms = list(_norms_and_readers(model, family))
    for norm, readers in norms:
        _check_norm(norm, readers, family)
    if any(isinstance(norm, nn.LayerNorm) for norm, _ in norms):
        _centre_writers(model, family)
    _fold_multiplier(model, family)
    for norm, readers in norms:
        for reader in readers:
            _absorb(norm, reader, is_head=reader is head)
    replace_norms(model, int(model.config.hidden_size))
    pad_embeddings(model, int(model.config.hidden_size))
    parallel = family.is_parallel(model.config)
    for layer in decoder_layers(model):
        rotate_layer_class(layer, family, parallel=parallel)


def _norms_and_readers(model: Any, family: Architecture) -> Iterable[tuple[Any, list[Any]]]:
    for layer in decoder_layers(model):
        attention, mlp = attention_inputs(layer, family), mlp_inputs(layer, family)
        if family.mlp_norm:
            yield layer.get_submodule(family.input_norm), attention
            yield layer.get_submodule(family.mlp_norm), mlp
        else:  # one norm for both
            yield layer.get_submodule(family.input_norm), attention + mlp
    yield model.get_submodule(family.final_norm), [model.get_submodule(family.lm_head)]


def _check_norm(norm: Any, readers: list[Any], family: Architecture) -> None:
    """Refuse a norm that is neither LayerNorm nor a gain times x over its root mean square."""
    if not all(isinstance(reader, (nn.Linear, Conv1D)) for reader in readers):
        kinds = sorted({type(reader).__name__ for reader in readers})
        raise ArchitectureError(
            f"The norms of this '{family.model_type}' model feed {', '.join(kinds)}, which cannot "
            "take their gain as a linear layer can; load the model unquantised."
        )
    if isinstance(norm, nn.LayerNorm):
        return
    weight = norm.weight.detach()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBES, len(weight), generator=generator).to(weight)
    wide = probe.double() if probe.device.type != "mps" else probe.float()
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    # Many families normalise in float32, whatever the dtype of the model.
    coarsest = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    error = (norm(probe).to(wide) - expected).abs().max()
    if float(error) > _ROUNDING * coarsest * max(float(expected.abs().max()), 1.0):
        raise ArchitectureError(
            f"{type(norm).__name__} of this '{family.model_type}' model does not compute gain * x "
            "/ RMS(x), so that its gain cannot be moved; choose a depth method."
        )


def _absorb(norm: Any, reader: Any, *, is_head: bool) -> None:
    """Move the gain and bias of a norm into a linear map that reads it."""
    weight = widened(weight_of(reader))
    shift = getattr(norm, "bias", None)
    if shift is not None:
        moved = weight @ widened(shift)
        if reader.bias is not None:
            reader.bias.copy_(widened(reader.bias) + moved)
        elif is_head:
            reader.bias = nn.Parameter(moved.to(reader.weight))
        elif bool(moved.any()):
            raise ArchitectureError(
                "The norms of this model have biases, and the linear maps after them have no bias "
                "to move them to; choose a depth method."
            )
    if getattr(norm, "weight", None) is not None:  # elementwise_affine=False has none
        weight_of(reader).copy_(weight * widened(norm.weight))


def _centre_writers(model: Any, family: Architecture) -> None:
    """Take the mean over channels out of all that is written to the stream."""
    for embedding in stream_embeddings(model, family):
        wide = widened(embedding.weight)
        embedding.weight.copy_(wide - wide.mean(1, keepdim=True))
    for layer in decoder_layers(model):
        for linear in output_maps(layer, family):
            wide = widened(weight_of(linear))
            weight_of(linear).copy_(wide - wide.mean(0, keepdim=True))
            if linear.bias is not None:
                linear.bias.copy_(linear.bias - linear.bias.mean())


def _fold_multiplier(model: Any, family: Architecture) -> None:
    """Move the factor of each sub-layer's output (Granite) into its last map."""
    factor = float(getattr(model.config, "residual_multiplier", 1.0))
    if factor == 1.0:
        return
    for layer in decoder_layers(model):
        for linear in output_maps(layer, family):
            linear.weight.mul_(factor)
            if linear.bias is not None:
                linear.bias.mul_(factor)
    model.config.residual_multiplier = 1.0
