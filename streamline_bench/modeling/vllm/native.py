"""vLLM's own classes of Llama-like families, with attention-free networks between their layers.

A network hangs behind the decoder layer before it (or before layer 0), as it does in the
checkpoint: ``layers`` then holds attention layers only and key-value caches stay one to one with
them. Layers get their network by having their class replaced with a subclass of it; everything
else is the host's, CUDA graphs, torch.compile and tensor parallelism included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer, maybe_prefix

from streamline_bench.modeling.vllm.networks import Stream, build_served_network, parameter_name

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _WithNetworks(nn.Module):
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
            network = build_served_network(
                attachment, self.config, vllm_config.quant_config, maybe_prefix(prefix, path)
            )
            layer.__class__ = _layer_class(type(layer))
            layer.add_module(path.rpartition(".")[2], network)

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
            yield (parameter_name(name, attachment) if attachment else name), tensor


class StreamlineLlamaForCausalLM(_WithNetworks, LlamaForCausalLM):  # type: ignore[misc]
    """Llama with networks."""


class StreamlineMistralForCausalLM(_WithNetworks, MistralForCausalLM):  # type: ignore[misc]
    """Mistral with networks."""


class StreamlineQwen2ForCausalLM(_WithNetworks, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen 2 with networks."""


class StreamlineQwen3ForCausalLM(_WithNetworks, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen 3 with networks."""


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
