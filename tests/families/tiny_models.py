"""A tiny random model of any causal language model type that transformers knows.

The config class of the type is asked for its defaults, and every width, size and count among them
is made small. So a new type needs no line here. What the rule cannot know is in ``SPECIAL``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 100

_SMALL: dict[str, tuple[int, str]] = {
    "hidden": (32, "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size "
               "input_embedding_size output_embedding_size attention_hidden_size lru_width "
               "embedding_dim pronunciation_embed_dim shape_embed_dim mamba_d_ssm"),
    "inner": (48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
              "d_inner dff dim_ff feed_forward_size intermediate_size_mlp dense_intermediate_size "
              "n_inner"),
    "expert": (16, "moe_intermediate_size shared_expert_intermediate_size "
               "shared_experts_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
               "moe_shared_expert_intermediate_size router_hidden_size"),
    "heads": (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
              "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
              "attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads "
              "mamba_n_heads mamba_num_heads n_mamba_heads"),
    "groups": (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
               "num_query_groups index_n_heads n_groups o_groups"),
    "head": (8, "head_dim d_head dim_head attention_head_size kv_channels swa_head_dim "
             "qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim "
             "linear_value_head_dim linear_head_dim global_head_dim query_pre_attn_scalar"),
    "rotated": (4, "rotary_dim qk_rope_head_dim"),
    "rank": (8, "q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank hc_lowrank laurel_rank "
             "adapter_rank time_step_rank mamba_dt_rank d_rel"),
    "state": (8, "state_size ssm_state_size mamba_d_state"),
    "channels": (16, "mamba_d_head mamba_head_dim mamba_headdim attention_head_dim"),
    "experts": (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    "chosen": (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    "expert groups": (2, "n_group num_expert_group"),
    "one": (1, "topk_group zero_expert_num num_shared_experts_dummy"),
    "window": (4, "sliding_window sliding_window_size window_size local_attention "
               "attention_window_size attention_chunk_size"),
    "chunk": (8, "chunk_size mamba_chunk_size block_size index_block_size"),
    "positions": (64, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length "
                  "context_length original_max_position_embeddings max_target_positions "
                  "rel_extent mem_len "
                  # What selects tokens selects others with a cache, in transformers' own models.
                  "index_topk keep_window_size"),
    "per layer": (8, "hidden_size_per_layer_input"),
    "vocabulary": (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size "
                   "unpadded_vocab_size"),
}  # fmt: skip
_WIDTHS = "hidden inner expert head rotated rank channels".split()
_DEPTHS = (
    "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers num_blocks"
).split()
_PREFIXES = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")


def _alternating(*kinds: str) -> Callable[[int], list[str]]:
    return lambda layers: [kinds[index % len(kinds)] for index in range(layers)]


def _drafting(text_type: str) -> Callable[[int], dict[str, Any]]:
    """The text config of a head that drafts for another model, whose keys and values it reads."""
    own = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    return lambda layers: {**_entries(text_type, layers, 1), **own, "num_kv_shared_layers": layers,
                           "model_type": text_type}  # fmt: skip


_ZAMBA = {
    "attention_hidden_size": 64,
    "layers_block_type": _alternating("linear_attention", "linear_attention", "hybrid"),
}
SPECIAL: dict[str, dict[str, Any]] = {
    # Nested settings that are no models of their own.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # Defaults that the class itself cannot build.
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": _alternating("sliding_attention", "full_attention"),
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
              "first_k_dense_replace": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"layer_types": _alternating("linear_attention", "indexed_attention"),
                       "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 8, "indexer_compress_ratio": 4},
    "gemma4_assistant": {"text_config": _drafting("gemma4_text")},
    "gemma4_unified_assistant": {"text_config": _drafting("gemma4_unified_text")},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91,
                                **{f"<|visual token {i:06}|>": 20 + i for i in range(64)}}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
                   "attn_resolutions": [], "hidden_size": 32, "codebook_size": 64},
    # A tower of the package timm, and towers whose widths must be those of the text model.
    "gemma3n_vision": {"architecture": "test_efficientnet", "hidden_size": 256},
    "dots3_note_vision_encoder": {"mlp_layer_types": _alternating("dense"), "adapter_in_dim": 32,
                                  "adapter_out_dim": 32, "per_layer_config": {}},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32,
                                 "downsample_hidden_size": 16},
    # One kind of layer only by default; the real models have these.
    "lfm2": {"layer_types": _alternating("conv", "full_attention"), "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": _alternating("conv", "full_attention")},
    "qwen2_moe": {"mlp_only_layers": [1, 4]},
    **{name: {"layer_types": _alternating("linear_attention", "full_attention")}
       for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid",
                    "bailing_hybrid", "kimi_linear")},
    "olmo3": {"layer_types": _alternating("sliding_attention", "full_attention")},
    "granitemoehybrid": {"layer_types": _alternating("linear_attention", "full_attention")},
    "bamba": {"attn_layer_indices": [1, 4]},
    # Patterns whose length is not that of the depth by itself.
    "gpt_neo": {"attention_types": lambda layers: [[["global", "local"], (layers + 1) // 2]],
                "intermediate_size": 48},
    "zamba": {**_ZAMBA, "num_key_value_heads": 4},
    "zamba2": {**_ZAMBA, "num_query_groups": 4},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0,
                     "layer_types": _alternating("sliding_attention", "full_attention"),
                     "activation_sparsity_pattern": None},
    "nemotron_h": {"layers_block_type": _alternating(
        "linear_attention", "full_attention", "moe", "mlp")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    # Widths of some layers, which have entries of their own.
    "dots3_note_text": {
        "per_layer_config": lambda layers: {i: {"head_dim": 12, "kv_lora_rank": 16}
                                            for i in range(2, layers) if i % 4 != 1},
    },
    "gemma4_text": {"global_head_dim": 16, "hidden_size_per_layer_input": 0,
                    "layer_types": _alternating("sliding_attention", "full_attention")},
    "gemma4_unified_text": {"global_head_dim": 16,
                            "layer_types": _alternating("sliding_attention", "full_attention")},
    # Sizes that depend on each other in ways of their own.
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "minimax_m3_vl_text": {"index_topk_blocks": 1},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    # It halves states every so many layers, against overflow; that shows by an epsilon.
    "rwkv": {"rescale_every": 0},
    # A causal model only when asked to be one.
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
                 "attn_layers": _alternating("local", "lsh")},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""Model type -> entries of its config that the rule does not make right; callables take the depth.
"""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-scaled-rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text-untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "phi-half-rotated": ("phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-no-biases": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "smollm3-tied": ("smollm3", {"tie_word_embeddings": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True, "parallel_attn": False}),
    "olmo-clipped": ("olmo", {"clip_qkv": 0.5}),
    "granite-scaled": ("granite", {"residual_multiplier": 0.5, "logits_scaling": 4.0,
                                   "embedding_multiplier": 3.0}),
}  # fmt: skip
"""Name -> model type, and what differs from its defaults: ties, windows, biases, orders."""

CAUSAL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The model types of transformers' own list of causal language models."""


def tiny_config(model_type: str, layers: int = 6, wider: int = 1, **changes: Any) -> Any:
    """Return a config of that type with ``layers`` layers, every width small.

    Args:
        wider: factor of all widths (engines have smallest head sizes).
    """
    return AutoConfig.for_model(model_type, **{**_entries(model_type, layers, wider), **changes})


@cache
def _values(wider: int) -> dict[str, int]:
    return {
        key: value * (wider if kind in _WIDTHS else 1)
        for kind, (value, keys) in _SMALL.items()
        for key in keys.split()
    }


def _entries(model_type: str, layers: int, wider: int) -> dict[str, Any]:
    special = SPECIAL.get(model_type, {})
    entries = {}
    if model_type in CONFIG_MAPPING:
        entries = _shrunk(CONFIG_MAPPING[model_type], layers, wider)
    for key, value in special.items():
        entries[key] = value(layers) if callable(value) else value
    return entries


def _shrunk(kind: Any, layers: int, wider: int) -> dict[str, Any]:
    defaults, values = _defaults(kind), _values(wider)
    entries: dict[str, Any] = {}
    latent = isinstance(defaults.get("kv_lora_rank"), int)
    for key, value in defaults.items():
        if key in _DEPTHS:
            entries[key] = layers
        elif key in _PREFIXES and value:
            entries[key] = min(value, 2)
        elif latent and key == "num_key_value_heads":
            entries[key] = values["num_attention_heads"]
        elif latent and key == "head_dim" and value == defaults.get("qk_rope_head_dim"):
            entries[key] = values["qk_rope_head_dim"]
        elif latent and key == "qk_head_dim":
            entries[key] = values["qk_rope_head_dim"] + values["qk_nope_head_dim"]
        elif key in values and isinstance(value, int) and value > 0:
            entries[key] = min(value, values[key])
        elif key.endswith("_token_id") and isinstance(value, (int, list)):
            entries[key] = {"pad_token_id": 0, "bos_token_id": 1}.get(key, 2)
    if any(entries.get(key, 1) > 1 for key in _SMALL["expert groups"][1].split()):
        counts = _SMALL["experts"][1].split()  # a group of two loses none
        entries |= {key: 2 * entries[key] for key in counts if key in entries}
    for key, value in defaults.items():
        if key in getattr(kind, "sub_configs", {}) and isinstance(value, Mapping):
            entries[key] = _entries(value["model_type"], layers, wider)
            entries[key]["model_type"] = value["model_type"]
    return entries


@cache
def _defaults(kind: Any) -> dict[str, Any]:
    try:
        return kind().to_dict()
    except Exception:  # a few have no valid defaults
        return {key: value for key, value in vars(kind).items() if not key.startswith("_")}


def tiny_model(
    model_type: str, layers: int = 6, seed: int = 0, wider: int = 1, **changes: Any
) -> Any:
    """Return a causal LM in evaluation mode whose every layer shows in its logits.

    Args:
        model_type: or the name of a variant.
    """
    torch.manual_seed(seed)
    model_type, own = VARIANTS.get(model_type, (model_type, {}))
    config = tiny_config(model_type, layers, wider, **{**own, **changes})
    model = AutoModelForCausalLM.from_config(config)
    if type(model.config) not in AutoModelForCausalLM._model_mapping:
        model = AutoModelForImageTextToText.from_config(config)  # it is published as this only
    draw_weights(model)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model.eval()


def draw_weights(model: Any) -> None:
    """Give matrices wide random weights and move all else a little away from its start."""
    with torch.no_grad():
        for tensor in model.parameters():
            wide = tensor.dim() >= 2
            tensor.copy_(
                (0 if wide else tensor) + (0.2 if wide else 0.05) * torch.randn_like(tensor)
            )
