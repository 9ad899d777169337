"""The attention-free networks as vLLM's own layers, sharded over tensor-parallel ranks.

vLLM's decoder layers pass on a pair whose sum is the residual stream, ``(hidden, residual)``, so
that the next norm can add and normalise in one kernel. The networks take and give such pairs;
before layer 0 there is no residual yet and it is None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)

from streamline_bench.core.surgery.replacement import FeedForwardNetwork, ReplacementNetwork
from streamline_bench.modeling.attachments import Attachment

Stream = tuple[Tensor, Tensor | None]
"""``(hidden, residual)``, each ``[tokens, hidden size]``."""

_PLAIN_INPUT = ("up_proj.", "input_proj.")
"""Vllm's loaders of the host families stack whatever is named ``up_proj`` behind a gate; a plain
network has none, so that its input map is served under another name."""


def build_served_network(
    attachment: Attachment, config: Any, quant_config: Any, prefix: str
) -> nn.Module:
    """Build the network of an attachment; ``forward(hidden, residual) -> Stream``."""
    with torch.device("meta"):
        plain = attachment.build(config)  # holds the sizes and the norm's epsilon
    if isinstance(plain, FeedForwardNetwork):
        return _FeedForward(plain, quant_config, prefix)
    return _Affine(plain, quant_config, prefix)


def parameter_name(name: str, attachment: Attachment) -> str:
    """Return the name under which a tensor of the checkpoint's network is served."""
    if attachment.kind.startswith("ffn"):
        return name.replace(*_PLAIN_INPUT)
    return name


class _FeedForward(nn.Module):
    """``ffn``, ``swiglu`` and their residual forms (:class:`.FeedForwardNetwork`)."""

    def __init__(self, plain: FeedForwardNetwork, quant_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = plain.up_proj.in_features, plain.up_proj.out_features
        self.norm = None
        if plain.norm is not None:
            self.norm = RMSNorm(hidden, eps=plain.norm.eps)
        self.gated = plain.gate_proj is not None
        if self.gated:
            self.gate_up_proj = MergedColumnParallelLinear(
                hidden,
                [inner, inner],
                bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.gate_up_proj",
            )
            self.activation: nn.Module = SiluAndMul()
        else:
            self.input_proj = ColumnParallelLinear(
                hidden,
                inner,
                bias=True,
                quant_config=quant_config,
                prefix=f"{prefix}.input_proj",
            )
            self.activation = nn.ReLU()
        self.down_proj = RowParallelLinear(
            inner,
            hidden,
            bias=not self.gated,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Stream:
        if self.norm is None:
            return _alone(self._inner(_sum(hidden, residual)), residual)
        if residual is None:
            return self._inner(self.norm(hidden)), hidden
        normed, residual = self.norm(hidden, residual)
        return self._inner(normed), residual

    def _inner(self, states: Tensor) -> Tensor:
        project = self.gate_up_proj if self.gated else self.input_proj
        output: Tensor = self.down_proj(self.activation(project(states)[0]))[0]
        return output


class _Affine(nn.Module):
    """``linear``: one affine map of the stream."""

    def __init__(self, plain: ReplacementNetwork, quant_config: Any, prefix: str) -> None:
        super().__init__()
        proj: Any = plain.proj
        self.proj = ColumnParallelLinear(
            proj.in_features,
            proj.out_features,
            bias=True,
            gather_output=True,
            quant_config=quant_config,
            prefix=f"{prefix}.proj",
        )

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Stream:
        return _alone(self.proj(_sum(hidden, residual))[0], residual)


def _sum(hidden: Tensor, residual: Tensor | None) -> Tensor:
    return hidden if residual is None else hidden + residual


def _alone(output: Tensor, residual: Tensor | None) -> Stream:
    """The network's output is the whole stream: what it is added to is zero, or not there yet."""
    return output, None if residual is None else torch.zeros_like(output)
