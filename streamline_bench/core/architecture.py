"""Where a model family keeps its layers, norms, attention and MLP projections: data, not branches.

Every place that needs to reach into a model asks this table. A family that is not in it is
refused with the list of those that are; adding one means adding a row (see CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from streamline_bench.errors import ArchitectureError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "decoder_layers", "get_submodule"]


@dataclass(frozen=True)
class Architecture:
    """One model family. All paths are dotted; those of a layer are relative to the layer.

    Attributes:
        model_type: ``config.model_type`` of transformers.
        base: attribute of the causal LM that holds the decoder stack's owner.
        layers: path of the ``ModuleList`` of decoder layers, from the causal LM.
        embeddings: paths of all modules run before the first layer that hold weights.
        final_norm: path of the norm between the last layer and the LM head, if any.
        lm_head: path of the LM head.
        depth_key: name of the config entry that counts the layers.
        attention, query, key, value, output: attention module and its projections; where they
            are fused, ``fused_qkv`` names the one projection and the three others are empty.
        mlp, gate, up, down: MLP module and its projections; ``gate`` is empty for a plain MLP,
            ``fused_gate_up`` names a fused one.
        input_norm: norm before attention; mlp_norm: norm before the MLP (empty if shared).
        layer_lists: config entries with one item per layer (sliced when layers are removed).
        index_lists: config entries that list layer indices (renumbered when layers are removed).
        prefix_counts: config entries that count leading layers of a kind
            (e.g. ``first_k_dense_replace``).
        parallel_residual: attention and MLP read the same input.
        output_norms: norms sit between a sub-layer's output and the residual stream.
        experts: the MLP is (or may be) a mixture of experts.
    """

    model_type: str
    base: str = "model"
    layers: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    depth_key: str = "num_hidden_layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused_qkv: str = ""
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str = ""
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    layer_lists: tuple[str, ...] = ("layer_types",)
    index_lists: tuple[str, ...] = ()
    prefix_counts: tuple[str, ...] = ()
    parallel_residual: bool = False
    output_norms: bool = False
    experts: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)


_ROWS = (
    Architecture("llama"),
    Architecture("mistral"),
    Architecture("qwen2"),
    Architecture("qwen3"),
)

ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in _ROWS}


def architecture_of(config: Any) -> Architecture:
    """Return the table row of a transformers config.

    Raises:
        ArchitectureError: the family is not in the table.
    """
    model_type = getattr(config, "host_model_type", None) or config.model_type
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ArchitectureError(
            f"Model type '{model_type}' is not supported; supported are: {known}."
        ) from None


def get_submodule(module: nn.Module, path: str) -> nn.Module:
    """Return ``module.path``; an empty path is the module itself."""
    return module.get_submodule(path)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a causal LM (shared, not a copy)."""
    layers = get_submodule(model, architecture_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers
