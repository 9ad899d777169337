"""vLLM's own classes of Llama-like families, with attention-free networks between their layers, or
with layers that lack attention or MLP.

A network hangs behind the decoder layer before it (or before layer 0), as it does in the
checkpoint: ``layers`` then holds attention layers only and key-value caches stay one to one with
them. Layers get their network by having their class replaced with a subclass of it; everything
else is the host's, CUDA graphs, torch.compile and tensor parallelism included.

The networks are built of vLLM's own layers, sharded over tensor-parallel ranks. vLLM's decoder
layers pass on a pair whose sum is the residual stream, ``(hidden, residual)``, so that the next
norm can add and normalise in one kernel. The networks take and give such pairs; before layer 0
there is no residual yet and it is None.

An attention that is not there has no entry among those that caches are made for
(``static_forward_context``), so that none is made for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer, maybe_prefix

from streamline_bench.core.replacement import FeedForwardNetwork, ReplacementNetwork
from streamline_bench.modeling.attachments import Attachment
from streamline_bench.modeling.sublayers import SublayerKind

Stream = tuple[Tensor, Tensor | None]
"""``(hidden, residual)``, each ``[tokens, hidden size]``."""

_PLAIN_INPUT = ("up_proj.", "input_proj.")
"""vLLM's loaders of the host families stack every ``up_proj`` behind a gate; a plain
network has none, so that its input map is served under another name."""

_classes: dict[type[nn.Module], type[nn.Module]] = {}

_SUBLAYERS: dict[SublayerKind, tuple[str, str]] = {
    "attention": ("self_attn", "input_layernorm"),
    "mlp": ("mlp", "post_attention_layernorm"),
}
"""The modules of each sub-layer in layers of the host families."""


class _OnHost(nn.Module):
    """What our subclasses add to their hosts."""

    config: Any
    model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers = self.model.layers
        for attachment in self.config.parsed_attachments():
            layer = layers[max(attachment.after_layer, 0)]
            if isinstance(layer, PPMissingLayer):  # it lives on another pipeline stage
                continue
            path = attachment.tensor_prefix(self.config)[:-1]
            network = _served_network(
                attachment, self.config, vllm_config.quant_config, maybe_prefix(prefix, path)
            )
            layer.__class__ = _layer_class(type(layer))
            layer.add_module(path.rpartition(".")[2], network)
        caches = vllm_config.compilation_config.static_forward_context
        for index, kind in self.config.parsed_removed_sublayers() or ():
            if not isinstance(layers[index], PPMissingLayer):
                _take_out(layers[index], kind)
                gone = maybe_prefix(prefix, f"model.layers.{index}.{_SUBLAYERS[kind][0]}.")
                for name in [name for name in caches if name.startswith(gone)]:
                    del caches[name]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint; returns the names of all parameters that were set."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(self._renamed(weights))
        return loaded

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        attachments = {
            attachment.tensor_prefix(self.config): attachment
            for attachment in self.config.parsed_attachments()
        }
        for name, tensor in weights:
            place = ".".join(name.split(".")[:4]) + "."
            attachment = attachments.get(place)
            yield (_parameter_name(name, attachment) if attachment else name), tensor


class StreamlineLlamaForCausalLM(_OnHost, LlamaForCausalLM):  # type: ignore[misc]
    """Llama with networks, or without some attentions and MLPs."""


class StreamlineMistralForCausalLM(_OnHost, MistralForCausalLM):  # type: ignore[misc]
    """Mistral with networks, or without some attentions and MLPs."""


class StreamlineQwen2ForCausalLM(_OnHost, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen 2 with networks, or without some attentions and MLPs."""


class StreamlineQwen3ForCausalLM(_OnHost, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen 3 with networks, or without some attentions and MLPs."""


def _layer_class(host_class: type[nn.Module]) -> type[nn.Module]:
    """Return (making it on first use) the subclass of a decoder layer class that runs networks."""
    if host_class in _classes.values():  # a layer with both a prelude and an attachment
        return host_class
    if host_class not in _classes:
        _classes[host_class] = type(
            f"Streamline{host_class.__name__}",
            (host_class,),
            {"__module__": __name__, "forward": _make_forward(host_class)},
        )
    return _classes[host_class]


def _make_forward(host_class: type[nn.Module]) -> Any:
    def forward(
        self: nn.Module, positions: Tensor, hidden: Tensor, residual: Tensor | None, **kwargs: Any
    ) -> Stream:
        prelude = self._modules.get("prelude")
        if prelude is not None:
            hidden, residual = prelude(hidden, residual)
        stream: Stream = host_class.forward(self, positions, hidden, residual, **kwargs)
        attachment = self._modules.get("attachment")
        if attachment is None:
            return stream
        result: Stream = attachment(*stream)
        return result

    return forward


def _take_out(layer: nn.Module, kind: SublayerKind) -> None:
    """Take a sub-layer with its norm out of a layer, in place."""
    for name in _SUBLAYERS[kind]:
        delattr(layer, name)
    key = type(layer), kind
    if key not in _halves:
        forward = _without_attention if kind == "attention" else _without_mlp
        _halves[key] = type(
            f"Streamline{type(layer).__name__}Without{kind.capitalize()}",
            (type(layer),),
            {"__module__": __name__, "forward": forward},
        )
    layer.__class__ = _halves[key]


_halves: dict[tuple[type[nn.Module], SublayerKind], type[nn.Module]] = {}


def _without_attention(
    self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None, **kwargs: Any
) -> Stream:
    hidden, residual = _normed(self.post_attention_layernorm, hidden, residual)
    return self.mlp(hidden), residual


def _without_mlp(
    self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None, **kwargs: Any
) -> Stream:
    hidden, residual = _normed(self.input_layernorm, hidden, residual)
    return self.self_attn(positions=positions, hidden_states=hidden), residual


def _normed(norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the norm of the stream, and the stream."""
    if residual is None:
        return norm(hidden), hidden
    normed, residual = norm(hidden, residual)
    return normed, residual


def _served_network(
    attachment: Attachment, config: Any, quant_config: Any, prefix: str
) -> nn.Module:
    """Build the network of an attachment; ``forward(hidden, residual) -> Stream``."""
    with torch.device("meta"):
        plain = attachment.build(config)  # holds the sizes and the norm's epsilon
    if isinstance(plain, FeedForwardNetwork):
        return _FeedForward(plain, quant_config, prefix)
    return _Affine(plain, quant_config, prefix)


def _parameter_name(name: str, attachment: Attachment) -> str:
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
                hidden, inner, bias=True, quant_config=quant_config, prefix=f"{prefix}.input_proj"
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
        normed, stream = _normed(self.norm, hidden, residual)
        return self._inner(normed), stream

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
