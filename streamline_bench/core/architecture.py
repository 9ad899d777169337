"""Where a model family keeps its layers, norms, attention and MLP projections: data, not branches.

Every place that needs to reach into a model asks for its row. A family that is not in the table
has its row inferred from the model itself (:mod:`.architecture_inference`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamline_bench.errors import ArchitectureError

if TYPE_CHECKING:  # shards are copied in processes that never load torch
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One model family. All paths are dotted; those of a layer are relative to the layer.

    An empty path means that the family has no such module (or, for ``mlp``, that the projections
    lie in the layer itself).

    Attributes:
        model_type: ``config.model_type`` of transformers.
        base: attribute of the causal LM that holds the model without its head; checkpoints saved
            from the bare model lack it in their tensor names.
        layers: path of the ``ModuleList`` of decoder layers, from the causal LM.
        embeddings: paths of all modules run before the first layer that hold weights; some may be
            absent in a particular model (OPT's ``project_in``).
        embedding_output: path of the module that runs last before the first layer, where the model
            gives its last states the width of that module's output (GPT-2); otherwise empty.
        final_norm: path of the norm between the last layer and the LM head.
        lm_head: path of the LM head.
        depth_key: name of the config entry that counts the layers.
        attention, query, key, value, output: attention module and its projections; where they
            are fused, ``fused_qkv`` names the one projection and the three others are empty.
        fused_by_head: the fused projection holds queries, keys and values of head 0, then those of
            head 1, and so on; otherwise all queries, then all keys, then all values.
        latent: attention is multi-head latent: ``q_a_proj`` and ``q_b_proj`` (``q_proj`` where the
            config has no ``q_lora_rank``), ``kv_a_proj_with_mqa`` and ``kv_b_proj``.
        head_vectors: parameters of the attention module with one number per head.
        mlp, gate, up, down: MLP module and its projections; ``gate`` is empty for a plain MLP,
            ``fused_gate_up`` names a fused one.
        experts, router: inside ``mlp``, the module of routed experts and the one choosing them.
            Layers of a mixture may still be dense: they then have ``gate``, ``up`` and ``down``.
        input_norm: norm before attention; mlp_norm: norm before the MLP (empty if shared).
        attention_output_norm, mlp_output_norm: norms between a sub-layer's output and the
            residual stream.
        layer_lists: config entries with one item per layer (sliced when layers are removed).
        index_lists: config entries that list layer indices (renumbered when layers are removed).
        prefix_counts: config entries that count leading layers of a kind
            (e.g. ``first_k_dense_replace``).
        periods: config entry with a period -> index list that expresses the same for arbitrary
            layers: layer i is regular if ``(i + 1) % period == 0`` and i is not listed.
        extra_layers: config entry that counts layers beyond the decoder (multi-token prediction);
            they depend on the last layers and are left out of pruned checkpoints.
        refused: config entry -> why layers cannot be removed while it is set.
        stored_as: path of a module -> the path its tensors have in checkpoints, where they differ.
            Inside layers, mixtures store one tensor per expert and may name the MLP otherwise.
        buffers: endings of tensor names that are not parameters.
        parallel_residual: attention and MLP read the same input (see :meth:`is_parallel`).
        transposed: projections store their weight as ``[in, out]`` (GPT-2's ``Conv1D``).
        intermediate_key: name of the config entry that holds the MLP's inner width.
        fixed_heads, fixed_channels: why heads or channels of the MLPs cannot be removed; empty if
            they can. (Channels of mixtures never can.)
        any_heads: model type of a stock family with the same modules that takes any number of
            heads, where this one insists that it divides the hidden size.
        notes: remarks on settings of the family, by config entry.
        inferred: found by looking at the model, not written by hand.
    """

    model_type: str
    base: str = "model"
    layers: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    embedding_output: str = ""
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    depth_key: str = "num_hidden_layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused_qkv: str = ""
    fused_by_head: bool = False
    latent: bool = False
    head_vectors: tuple[str, ...] = ()
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_gate_up: str = ""
    experts: str = ""
    router: str = ""
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_output_norm: str = ""
    mlp_output_norm: str = ""
    layer_lists: tuple[str, ...] = ("layer_types",)
    index_lists: tuple[str, ...] = ()
    prefix_counts: tuple[str, ...] = ()
    periods: Mapping[str, str] = field(default_factory=dict)
    extra_layers: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    stored_as: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    parallel_residual: bool = False
    transposed: bool = False
    intermediate_key: str = "intermediate_size"
    fixed_heads: str = ""
    fixed_channels: str = ""
    any_heads: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    inferred: bool = False

    @property
    def output_norms(self) -> bool:
        """Whether norms sit between a sub-layer's output and the residual stream."""
        return bool(self.attention_output_norm or self.mlp_output_norm)

    def is_parallel(self, config: Any) -> bool:
        """Whether attention and MLP of a model with this config read the same input."""
        return self.parallel_residual and bool(config_entry(config, "use_parallel_residual", True))

    def stored_path(self, path: str) -> str:
        """Return how checkpoints of the family spell the path of a module outside the layers."""
        return self.stored_as.get(path, path)

    @property
    def stack(self) -> str:
        """Path of the module that owns the list of layers (``model.decoder`` for OPT)."""
        return self.layers.rpartition(".")[0]


def _gemma(model_type: str) -> Architecture:
    return Architecture(
        model_type,
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    )


# fmt: off
_ROWS = (
    Architecture("llama", any_heads="mistral"),
    Architecture("mistral"),
    Architecture("qwen2", prefix_counts=("max_window_layers",)),
    Architecture("qwen3", prefix_counts=("max_window_layers",)),
    _gemma("gemma2"),
    _gemma("gemma3_text"),
    Architecture(
        "phi", final_norm="model.final_layernorm", output="dense", gate="", up="fc1", down="fc2",
        mlp_norm="", parallel_residual=True,
    ),
    Architecture(
        "phi3", query="", key="", value="", fused_qkv="qkv_proj", gate="", up="",
        fused_gate_up="gate_up_proj",
    ),
    Architecture(
        "opt", layers="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions",
                    "model.decoder.project_in"),
        final_norm="model.decoder.final_layer_norm", output="out_proj", mlp="", gate="", up="fc1",
        down="fc2", input_norm="self_attn_layer_norm", mlp_norm="final_layer_norm",
        intermediate_key="ffn_dim",
        notes={"do_layer_norm_before": "OPT-350m has post-norm layers and no final norm"},
    ),
    Architecture(
        "gpt2", base="transformer", layers="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"), embedding_output="transformer.drop",
        final_norm="transformer.ln_f",
        depth_key="n_layer", attention="attn", query="", key="", value="", output="c_proj",
        fused_qkv="c_attn", gate="", up="c_fc", down="c_proj", input_norm="ln_1", mlp_norm="ln_2",
        refused={"scale_attn_by_inverse_layer_idx": "attention is scaled by the layer's index, "
                 "which changes when layers before it are removed"},
        buffers=(".attn.bias", ".attn.masked_bias"), transposed=True, intermediate_key="n_inner",
    ),
    Architecture(
        "gpt_neox", base="gpt_neox", layers="gpt_neox.layers", embeddings=("gpt_neox.embed_in",),
        final_norm="gpt_neox.final_layer_norm", attention="attention", query="", key="", value="",
        output="dense", fused_qkv="query_key_value", fused_by_head=True, gate="",
        up="dense_h_to_4h", down="dense_4h_to_h", stored_as={"lm_head": "embed_out"},
        buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
        parallel_residual=True,
        notes={"use_parallel_residual": "False in a few models: the layer is then sequential"},
    ),
    Architecture(
        "olmo2", input_norm="", attention_output_norm="post_attention_layernorm", mlp_norm="",
        mlp_output_norm="post_feedforward_layernorm",
        fixed_heads="its query and key norms run over all heads at once, so that removing one "
        "changes the others",
    ),
    Architecture("smollm3", layer_lists=("layer_types", "no_rope_layers")),
    Architecture("granite"),
    Architecture("mixtral", gate="", up="", down="", experts="experts", router="gate"),
    Architecture(
        "qwen3_moe", experts="experts", router="gate", index_lists=("mlp_only_layers",),
        prefix_counts=("max_window_layers",), periods={"decoder_sparse_step": "mlp_only_layers"},
    ),
    Architecture(
        "deepseek_v3", query="", key="", value="", latent=True, experts="experts", router="gate",
        layer_lists=("layer_types", "mlp_layer_types"), prefix_counts=("first_k_dense_replace",),
        extra_layers="num_nextn_predict_layers",
        buffers=(".rotary_emb.inv_freq", ".e_score_correction_bias"),
        notes={"attention": "multi-head latent attention: low-rank q_a/q_b and kv_a/kv_b"},
    ),
    Architecture(
        "gpt_oss", head_vectors=("sinks",), gate="", up="", down="", experts="experts",
        router="router",
    ),
)
# fmt: on

ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in _ROWS}


def config_of(kind: Any, entries: Mapping[str, Any]) -> Any:
    """Return a config of a class from what ``config.json`` holds, infinities included.

    JSON has no infinity: transformers writes ``{"__float__": "Infinity"}`` for it.
    """
    return kind.from_dict(kind._decode_special_floats(copy.deepcopy(dict(entries))))


def config_entry(config: Any, key: str, default: Any = None) -> Any:
    """Return one entry of a transformers config or of the dict read from ``config.json``.

    Where the file is silent, the family's config class decides, as it does in transformers.
    """
    if not isinstance(config, Mapping):
        return getattr(config, key, default)
    return config[key] if key in config else _class_default(config, key, default)


def _class_default(config: Mapping[str, Any], key: str, default: Any) -> Any:
    # Seconds, and needed for files that are silent only.
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    model_type = config.get("host_model_type") or config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return default
    kind = CONFIG_MAPPING[model_type]
    alias = kind.attribute_map.get(key, key)
    if alias in config:
        return config[alias]
    value = getattr(kind, alias, default)
    if not isinstance(value, property):
        return value
    if hasattr(PreTrainedConfig, alias):  # such as ``dtype``: it has no value of its own
        return default
    return getattr(config_of(kind, config), alias)  # a depth that is the length of a list


@dataclass(frozen=True)
class RopeGroups:
    """Which sequences may be run in one batch without changing each other's rotary frequencies.

    transformers takes the frequencies from the longest sequence of a batch: with ``longrope`` one
    set up to ``limit`` tokens and another one above, with ``dynamic`` those of each length its own
    above the limit.

    Attributes:
        limit: length up to which frequencies are those of a short sequence; None: of any length.
        by_length: above the limit, every length has frequencies of its own.
    """

    limit: int | None = None
    by_length: bool = False

    def __call__(self, length: int) -> int:
        """Return a number that the sequences of a batch, or of a packed row, must share."""
        if self.limit is None or length <= self.limit:
            return 0
        return length if self.by_length else 1

    def growing(self, length: int, most: int) -> int:
        """The same for sequences that grow by up to ``most`` tokens.

        Those that cross the limit on the way must cross it together, so that they have one length.
        """
        if self.limit is None or length + most <= self.limit:
            return 0
        return self(length) or -length


ANY_LENGTHS = RopeGroups()
"""Of a model whose rotary frequencies do not depend on lengths, as almost all."""


def rope_groups(config: Any) -> RopeGroups:
    """Return which lengths a model must not be given together."""
    found = {
        RopeGroups(int(limit), by_length=key == "max_position_embeddings")
        for key, settings in _length_dependent_ropes(config)
        if (limit := settings.get(key) or config_entry(config, key))
    }
    if len(found) > 1:  # kinds of layers with limits of their own: equal lengths share them all
        return RopeGroups(min(each.limit or 0 for each in found), by_length=True)
    return found.pop() if found else ANY_LENGTHS


def sequence_limit(config: Any) -> int | None:
    """Return how many tokens a model reads with the rotary frequencies of a short sequence.

    It is the model's own limit, or that of :class:`RopeGroups` where it is smaller.
    """
    limits = [rope_groups(config).limit, config_entry(config, "max_position_embeddings")]
    return min((limit for limit in limits if limit), default=None)


def _length_dependent_ropes(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield settings whose frequencies depend on the length, and the key that holds the limit."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = config_entry(config, name)
        if not isinstance(settings, Mapping):
            continue
        nested = [each for each in settings.values() if isinstance(each, Mapping)]
        for each in (settings, *nested):  # a few families have settings per kind of layer
            kind = str(each.get("rope_type") or each.get("type"))
            if "dynamic" in kind:
                yield "max_position_embeddings", each
            elif kind == "longrope" or each.get("long_factor"):  # older Phi-3 files: su, yarn
                yield "original_max_position_embeddings", each


def architecture_of(config: Any) -> Architecture:
    """Return the row of a transformers config, or of a parsed ``config.json``.

    It is that of the table, or an inferred one (:mod:`.architecture_inference`), which each process
    makes once for each config.

    Raises:
        ArchitectureError: the type is unknown to transformers, or is not a causal decoder.
    """
    model_type = _written(config, "host_model_type") or _written(config, "model_type")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = _inferred.get(id(config))
    if known is not None and known[0]() is config:
        return known[1]
    if isinstance(config, Mapping) and model_type in _remote:
        return _remote[model_type]
    from streamline_bench.core.architecture_inference import infer  # torch and transformers

    row = infer(config)
    remember(config, row)
    return row


_inferred: dict[int, tuple[Callable[[], Any], Architecture]] = {}
_remote: dict[str, Architecture] = {}  # of types whose code came with a model that was loaded


def remember(config: Any, row: Architecture) -> None:
    """Let :func:`architecture_of` give this row for this very object as long as it lives."""
    if not isinstance(config, Mapping):
        key = id(config)
        _inferred[key] = (weakref.ref(config, lambda _: _inferred.pop(key, None)), row)
        if type(config).__module__.startswith("transformers_modules"):
            _remote[row.model_type] = row


def depth_of(config: Any) -> int:
    """Return the number of decoder layers of a transformers config."""
    return int(getattr(config, architecture_of(config).depth_key))


def require_removable_layers(config: Any) -> Architecture:
    """Return the table row of a config whose layers can be removed one by one.

    Raises:
        ArchitectureError: a feature in use forbids that; the message gives the reason.
    """
    row = architecture_of(config)
    _refuse(row.model_type, config, row.refused)
    return row


_FUSED = {
    **dict.fromkeys(("query", "key", "value"), ("fused_qkv", "latent")),
    **dict.fromkeys(("gate", "up"), ("fused_gate_up",)),
    "norms": ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"),
}


def undecided(row: Architecture, *roles: str) -> str:
    """Return why a method that needs these modules of a layer cannot work; empty if it can.

    Args:
        roles: names of fields (``query``, ``down``, ``input_norm``). Fused projections serve each
            of the roles that they hold; ``norms``: where any norm stands.
    """
    lacking = [
        role
        for role in roles
        if not any(getattr(row, name, "") for name in (role, *_FUSED.get(role, ())))
    ]
    reasons = []
    if "intermediate_key" in lacking:
        lacking.remove("intermediate_key")
        reasons.append("no entry of its config gives the inner width of its MLPs")
    if lacking:
        named = ", ".join(_SPOKEN.get(role, role) for role in lacking)
        reasons.insert(0, f"it is not known which of its modules are its {named}")
    return " and ".join(reasons)


_SPOKEN = {
    "query": "queries", "key": "keys", "value": "values", "output": "attention output",
    "gate": "MLP gate", "up": "MLP input", "down": "MLP output", "input_norm": "norm of attention",
}  # fmt: skip


def _written(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _refuse(model_type: str, config: Any, reasons: Mapping[str, str]) -> None:
    for part in (config, _written(config, "text_config")):
        for key, reason in reasons.items():
            value = _written(part, key)
            if value:
                raise ArchitectureError(
                    f"Model type '{model_type}' with {key}={value} is not supported: {reason}; "
                    "use a model without it."
                )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a causal LM (shared, not a copy).

    Raises:
        ArchitectureError: the family is not supported, or its layers are not where they should be.
    """
    from torch import nn

    row = architecture_of(model.config)
    try:
        layers = model.get_submodule(row.layers)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise ArchitectureError(
            f"{type(model).__name__} has no list of layers at '{row.layers}'; load it with "
            "AutoModelForCausalLM."
        )
    return layers
