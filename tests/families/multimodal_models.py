"""Tiny random multimodal models, built from their config classes with towers of two layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

TEXT: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = 90
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "patch_size": 8, "vision_use_head": False}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "num_hidden_layers": 3, "patch_size": 8,
         "projection_dim": 16}  # fmt: skip
_QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
         "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}  # fmt: skip
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92,
           "vision_end_token_id": 93}  # fmt: skip
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "decoder_sparse_step": 1}  # fmt: skip
_HYBRID = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
           "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2,
           "layer_types": ["linear_attention", "full_attention"] * 2}  # fmt: skip


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    base = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": {**base, **more}}


_INTERLEAVED = _mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=1.0)
_GLM = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "image_size": 16, "out_hidden_size": 32, "spatial_merge_size": 2}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 8, "layer_types": [
            "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
        "vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
        "boi_token_index": 91, "eoi_token_index": 92,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"}, "image_token_index": IMAGE,
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
    },
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": _CLIP,
              "image_token_index": IMAGE, "image_seq_length": 4},
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"}, "image_token_id": IMAGE,
        "vision_config": {**_TOWER, "model_type": "internvl_vision", "image_size": [16, 16],
                          "patch_size": [4, 4]},
        "downsample_ratio": 0.5,
    },
    "smolvlm": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": _TOWER,
                "scale_factor": 2, "image_token_id": IMAGE},
    "idefics3": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": _TOWER,
                 "scale_factor": 2, "image_token_id": IMAGE},
    "qwen2_vl": {
        "text_config": {**TEXT, **_mrope(1, 1, 2)}, **_TOKENS,
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2,
                          "patch_size": 4, "mlp_ratio": 2, "spatial_merge_size": 2,
                          "temporal_patch_size": 2},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, **_mrope(1, 1, 2)}, **_TOKENS,
        "vision_config": {**_QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, **_INTERLEAVED}, **_TOKENS,
        "vision_config": {**_QWEN, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, **_MIXTURE, **_INTERLEAVED}, **_TOKENS,
        "vision_config": {**_QWEN, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0]},
    },
    "qwen3_5": {
        "text_config": {**TEXT, **_HYBRID, **_INTERLEAVED}, **_TOKENS,
        "vision_config": {**_QWEN, "num_position_embeddings": 16},
    },
    "qwen3_5_moe": {
        "text_config": {**TEXT, **_HYBRID, **_MIXTURE, **_INTERLEAVED,
                        "shared_expert_intermediate_size": 16}, **_TOKENS,
        "vision_config": {**_QWEN, "num_position_embeddings": 16},
    },
    "lfm2_vl": {
        "text_config": {**{k: v for k, v in TEXT.items() if k != "head_dim"}, "model_type": "lfm2",
                        "layer_types": ["conv", "full_attention"] * 2,
                        "block_auto_adjust_ff_dim": False},
        "vision_config": {**{k: v for k, v in _TOWER.items() if k != "image_size"},
                          "model_type": "siglip2_vision_model", "num_patches": 16},
        "image_token_id": IMAGE, "projector_hidden_size": 32,
    },
    "llama4": {
        "text_config": {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2,
                        "interleave_moe_layer_step": 2, "attention_chunk_size": 8,
                        "no_rope_layers": [1, 1, 0, 1]},
        "vision_config": {**_TOWER, "intermediate_size": 64, "vision_output_dim": 32,
                          "projector_input_dim": 32, "projector_output_dim": 32,
                          "pixel_shuffle_ratio": 0.5},
        "image_token_index": IMAGE,
    },
    "cohere2_vision": {
        "text_config": {**TEXT, "model_type": "cohere2", "logit_scale": 0.25},
        "vision_config": _SIGLIP, "downsample_factor": 2, "image_token_id": IMAGE,
        "alignment_intermediate_size": 32,
    },
    "glm4v": {
        "text_config": {**TEXT, **_mrope(1, 1, 2, partial_rotary_factor=1.0)}, **_TOKENS,
        "vision_config": _GLM, "image_start_token_id": 92, "image_end_token_id": 93,
    },
    "gemma4": {
        "text_config": {**TEXT, "global_head_dim": 8, "num_kv_shared_layers": 0,
                        "hidden_size_per_layer_input": 0, "sliding_window": 8,
                        "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": {**_TOWER, "num_key_value_heads": 2, "head_dim": 8,
                          "position_embedding_size": 64, "pooling_kernel_size": 2},
        "image_token_id": IMAGE, "audio_config": None,
    },
}  # fmt: skip
"""Model type -> entries of its config."""


def build(model_type: str, folder: Path, **changes: Any) -> Any:
    """Save a random model, its weights wide enough to show every mistake, and return it."""
    torch.manual_seed(0)
    entries = copy.deepcopy(CONFIGS[model_type]) | changes
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**entries))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05 if parameter.ndim > 1 else 0.5)
    model.float().eval().save_pretrained(folder)
    return model


def image_inputs(model_type: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return token ids with one image of 16 × 16 pixels, and the image, as a processor gives it."""
    ids = torch.tensor([[1, 4, *[IMAGE] * 4, 5, 6]])
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16)}
    mask = (ids == IMAGE).int()
    if model_type in ("gemma3", "gemma4"):
        pixels["token_type_ids" if model_type == "gemma3" else "mm_token_type_ids"] = mask
    if model_type == "mistral3":
        pixels["image_sizes"] = torch.tensor([[16, 16]])
    if model_type in ("smolvlm", "idefics3"):
        return ids, {"pixel_values": torch.randn(1, 1, 3, 16, 16),
                     "pixel_attention_mask": torch.ones(1, 1, 16, 16)}  # fmt: skip
    if model_type == "lfm2_vl":
        return ids, {"pixel_values": torch.randn(1, 16, 48),
                     "spatial_shapes": torch.tensor([[4, 4]]),
                     "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}  # fmt: skip
    if model_type == "cohere2_vision":
        ids = torch.tensor([[1, 4, IMAGE, 5, 6]])
    if model_type == "gemma4":
        places = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
        return ids, {"pixel_values": torch.randn(1, 16, 48), "image_position_ids": places,
                     "mm_token_type_ids": mask}  # fmt: skip
    if model_type.startswith(("qwen", "glm")):
        return ids, {"pixel_values": torch.randn(16, 96), "mm_token_type_ids": mask,
                     "image_grid_thw": torch.tensor([[1, 4, 4]])}  # fmt: skip
    return ids, pixels
