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
from streamline_bench.methods.tools.normal_equations import WIDENED_ROWS, widened
from streamline_bench.modeling.rotations import (
    attention_inputs,
    mlp_inputs,
    output_maps,
    pad_embeddings,
    replace_final_norm,
    replace_layer_norms,
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
    fusion = NormFusion(model)
    layers = decoder_layers(model)
    for layer in layers:
        fusion.check(layer)
    fusion.head()
    fusion.stream()
    for layer in layers:
        fusion.layer(layer)


class NormFusion:
    """Fuses the norms of a model part by part: what is outside the layers, and each layer.

    The head may be the last where it has weights of its own by then.

    Raises:
        ArchitectureError: the residual stream of this model cannot be rotated.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._family = require_rotatable(model.config)
        norms = [norm for layer in decoder_layers(model) for norm, _ in self._readers(layer)]
        self._norm = model.get_submodule(self._family.final_norm)
        self._head: Any = model.get_submodule(self._family.lm_head)
        _check_norm(self._norm, [self._head], self._family)
        norms.append(self._norm)
        self._centres = any(isinstance(norm, nn.LayerNorm) for norm in norms)
        self._factor = float(getattr(model.config, "residual_multiplier", 1.0))
        self._parallel = self._family.is_parallel(model.config)
        self._hidden = int(model.config.hidden_size)

    @torch.no_grad()
    def head(self) -> None:
        """Fuse the final norm into the LM head, which has its weights; untie it."""
        if self._head.weight is self._model.get_input_embeddings().weight:
            self._head.weight = nn.Parameter(self._head.weight.detach().clone())
        _absorb(self._norm, self._head, is_head=True)

    @torch.no_grad()
    def stream(self) -> None:
        """Centre the embeddings; the final norm has no weights from now on."""
        model, family = self._model, self._family
        model.config.tie_word_embeddings = False
        if self._centres:
            for embedding in stream_embeddings(model, family):
                wide = widened(embedding.weight)
                embedding.weight.copy_(wide - wide.mean(1, keepdim=True))
        if self._factor != 1.0:
            model.config.residual_multiplier = 1.0
        replace_final_norm(model, self._hidden)
        pad_embeddings(model, self._hidden)

    def check(self, layer: Any) -> None:
        """Refuse a layer whose norms cannot be fused."""
        for norm, readers in self._readers(layer):
            _check_norm(norm, readers, self._family)

    @torch.no_grad()
    def layer(self, layer: Any) -> None:
        """Fuse the norms of a layer, which has its weights."""
        if self._centres:
            _centre(output_maps(layer, self._family))
        if self._factor != 1.0:  # of each sub-layer's output (Granite): into its last map
            for linear in output_maps(layer, self._family):
                linear.weight.mul_(self._factor)
                if linear.bias is not None:
                    linear.bias.mul_(self._factor)
        for norm, readers in self._readers(layer):
            for reader in readers:
                _absorb(norm, reader, is_head=False)
        replace_layer_norms(layer, self._family, self._hidden)
        rotate_layer_class(layer, self._family, parallel=self._parallel)

    def _readers(self, layer: Any) -> list[tuple[Any, list[Any]]]:
        """Return the norms of a layer, each with the linear maps that read it."""
        family = self._family
        attention, mlp = attention_inputs(layer, family), mlp_inputs(layer, family)
        norm = layer.get_submodule(family.input_norm)
        if not family.mlp_norm:  # one norm for both
            return [(norm, attention + mlp)]
        return [(norm, attention), (layer.get_submodule(family.mlp_norm), mlp)]


@torch.no_grad()
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
    shift = getattr(norm, "bias", None)
    if shift is not None:
        moved = widened(weight_of(reader)) @ widened(shift)
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
        for rows in torch.split(weight_of(reader), WIDENED_ROWS):
            rows.copy_(widened(rows) * widened(norm.weight))


def _centre(writers: Iterable[Any]) -> None:
    """Take the mean over channels out of all that linear maps write to the stream."""
    for linear in writers:
        wide = widened(weight_of(linear))
        weight_of(linear).copy_(wide - wide.mean(0, keepdim=True))
        if linear.bias is not None:
            linear.bias.copy_(linear.bias - linear.bias.mean())
