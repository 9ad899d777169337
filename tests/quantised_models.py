"""Tiny quantised checkpoints, each beside the plain model that it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = 16
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4, "intermediate_size": 32, "dtype": "bfloat16", "hidden_size": 32
}  # fmt: skip


def _power(value: torch.Tensor) -> torch.Tensor:
    """Scales that are powers of two, so that bfloat16 holds every decoded weight."""
    return value.clamp_min(1e-6).log2().ceil().exp2()


def _fp8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scale = _power(blocks.abs().amax((1, 3)) / 448)
    codes = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
    plain = codes.float().view_as(blocks) * scale[:, None, :, None]
    return {name: codes, f"{name}_scale_inv": scale}, plain.view_as(weight)


def _mxfp4(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponent = (groups.abs().amax(-1).clamp_min(1e-6) / 6).log2().ceil()
    wide = exponent.exp2()[..., None]
    codes = ((groups / wide)[..., None] - FP4).abs().argmin(-1)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    stored = {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).to(torch.uint8)}
    return stored, (FP4[codes] * wide).flatten(2).transpose(1, 2).contiguous()


def _gptq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    module, wide = name.removesuffix(".weight"), weight.float().T
    scale = _power(wide.abs().amax(0) / 7)
    codes = (wide / scale).round().clamp(-8, 7) + 8
    shifts = 4 * torch.arange(8)[None, :, None]
    packed = (codes.long().view(-1, 8, wide.shape[1]) << shifts).sum(1)
    zeros = torch.full((1, wide.shape[1] // 8), 0x77777777, dtype=torch.int32)
    stored = {
        f"{module}.qweight": packed.where(packed < 2**31, packed - 2**32).int(),
        f"{module}.qzeros": zeros, f"{module}.scales": scale[None].half(),
    }  # fmt: skip
    return stored, ((codes - 8) * scale).T.contiguous()


def _awq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    module, wide = name.removesuffix(".weight"), weight.float().T
    scale = _power(wide.abs().amax(0) / 7)
    codes = (wide / scale).round().clamp(-8, 7) + 8
    nibbles = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where a word holds each of eight columns
    words = codes.long().unflatten(1, (-1, 8)) << 4 * nibbles
    packed = words.sum(-1)
    stored = {
        f"{module}.qweight": packed.where(packed < 2**31, packed - 2**32).int(),
        f"{module}.qzeros": torch.full((1, wide.shape[1] // 8), -0x77777778, dtype=torch.int32),
        f"{module}.scales": scale[None].half(),
    }
    return stored, ((codes - 8) * scale).T.contiguous()


def _nf4(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    table, blocks = torch.arange(-8, 8) / 8, weight.float().reshape(-1, 64)
    largest = _power(blocks.abs().amax(1))
    codes = ((blocks / largest[:, None])[..., None] - table).abs().argmin(-1)
    state = {"shape": list(weight.shape), "blocksize": 64, "dtype": "bfloat16",
             "quant_type": "nf4"}  # fmt: skip
    flat = codes.reshape(-1)
    stored = {
        name: (flat[0::2] << 4 | flat[1::2]).to(torch.uint8)[:, None],
        f"{name}.absmax": largest, f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }  # fmt: skip
    return stored, (table[codes] * largest[:, None]).view_as(weight)


def _nvfp4(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = weight.float().unflatten(1, (-1, 16))
    scale = _power(groups.abs().amax(-1) / 6)
    codes = ((groups / scale[..., None])[..., None] - FP4).abs().argmin(-1)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).flatten(1)
    stored = {
        f"{name}_packed": packed, f"{name}_scale": (scale * 16).to(torch.float8_e4m3fn),
        f"{name}_global_scale": torch.tensor([16.0]),
    }  # fmt: skip
    return stored, (FP4[codes] * scale[..., None]).flatten(1)


FORMATS: dict[str, Any] = {
    "awq": ("llama", _awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm",
                            "zero_point": True, "modules_to_not_convert": None}),
    "bitsandbytes": ("llama", _nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                     "bnb_4bit_quant_type": "nf4"}),
    "deepseek": ("deepseek_v3", _fp8, {"quant_method": "fp8", "fmt": "e4m3",
                                       "weight_block_size": [BLOCK, BLOCK],
                                       "activation_scheme": "dynamic"}),
    "nvfp4": ("llama", _nvfp4, {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "format": "nvfp4-pack-quantized",
                                      "weights": {"num_bits": 4, "type": "float",
                                                  "group_size": 16}}}}),
    "fp8": ("llama", _fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
                            "modules_to_not_convert": ["lm_head", "model.layers.0"]}),
    "mxfp4": ("gpt_oss", _mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    "gptq": ("llama", _gptq, {"quant_method": "gptq", "bits": 4, "group_size": -1}),
}  # fmt: skip
OF_THE_MODEL: dict[str, dict[str, Any]] = {
    "mxfp4": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8,
              "sliding_window": 16},
    "deepseek": {"num_key_value_heads": 4, "n_routed_experts": 2, "num_experts_per_tok": 1,
                 "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "kv_lora_rank": 16,
                 "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
                 "v_head_dim": 16, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
}  # fmt: skip
LOADED = ("fp8", "mxfp4", "deepseek")
"""Formats that transformers decodes by itself on a CPU."""


def _chosen(method: str, name: str, weight: torch.Tensor) -> bool:
    if method == "mxfp4":
        return name.endswith(("gate_up_proj", "down_proj"))
    inside = ".layers." in name and weight.dim() == 2
    plain = name.endswith(("mlp.gate.weight", "embed_tokens.weight", "head.weight"))
    return inside and not plain and (method != "fp8" or ".layers.0." not in name)


def _with_prediction_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add what DeepSeek-V3 stores behind its decoder: a layer and what joins two tokens to one."""
    last = {n: w for n, w in weights.items() if ".layers.3." in n}
    table = weights["model.embed_tokens.weight"]
    own = {
        "embed_tokens.weight": table, "shared_head.head.weight": table.clone(),
        "eh_proj.weight": torch.cat([table[:32], table[:32]], 1), "enorm.weight": table[0],
        "hnorm.weight": table[0], "shared_head.norm.weight": table[0],
    }  # fmt: skip
    copies = {n.replace(".layers.3.", ".layers.4."): w.clone() for n, w in last.items()}
    return weights | copies | {f"model.layers.4.{n}": w.clone() for n, w in own.items()}


def make_twins(method: str, make_tiny_model: Callable[..., Path]) -> tuple[Path, Path]:
    """Return the folder of a tiny model as codes, and of the plain weights they stand for."""
    model_type, encode, settings = FORMATS[method]
    coded = make_tiny_model(model_type, **SIZES, **OF_THE_MODEL.get(method, {}))
    plain = Path(shutil.copytree(coded, coded.with_name(f"{coded.name}-plain")))
    stored, weights = {}, {}
    state = load_file(coded / "model.safetensors")
    state = _with_prediction_layer(state) if method == "deepseek" else state
    for name, weight in state.items():
        weight = weight.bfloat16()
        stored[name] = weights[name] = weight
        if _chosen(method, name, weight):
            del stored[name]
            parts, decoded = encode(name, weight.float() * 8)
            stored |= {n: part.contiguous() for n, part in parts.items()}
            weights[name] = decoded.bfloat16()
    for folder, tensors in ((coded, stored), (plain, weights)):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] = settings
    (coded / "config.json").write_text(json.dumps(config))
    return coded, plain
