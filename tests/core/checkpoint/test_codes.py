"""Codes and scales of every format give the weights that loops over the specification give."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamline_bench.core.checkpoint.codes import coded_weights
from streamline_bench.core.checkpoint.folder import TensorEntry
from streamline_bench.errors import CheckpointError

DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
GENERATOR = torch.Generator().manual_seed(3)


def decoded(stored: Mapping[str, Tensor], method: str, settings: Any = None) -> dict[str, Tensor]:
    entries = {
        n: TensorEntry(n, Path(), DTYPES[t.dtype], tuple(t.shape)) for n, t in stored.items()
    }
    found = coded_weights(entries, method, settings or {}, stored.__getitem__)
    return {
        name: weight.decoded(stored.__getitem__, settings or {}) for name, weight in found.items()
    }


def drawn(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR) + 0.5


def words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack rows of four-bit codes, code ``i`` of eight into nibble ``order[i]``."""
    packed = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for row, column in itertools.product(range(len(codes)), range(codes.shape[1])):
        packed[row, column // 8] |= int(codes[row, column]) << 4 * order[column % 8]
    return packed.where(packed < 2**31, packed - 2**32).int()


def test_blocks_of_fp8_also_those_cut_off_at_the_edge() -> None:
    weight, scale = torch.randn(40, 24, generator=GENERATOR).to(torch.float8_e4m3fn), scales(3, 2)
    found = decoded(
        {"m.weight": weight, "m.weight_scale_inv": scale}, "fp8", {"weight_block_size": [16, 16]}
    )["m.weight"]
    for i, j in itertools.product(range(40), range(24)):
        assert found[i, j] == float(weight[i, j]) * scale[i // 16, j // 16]


def test_fp8_as_transformers_decodes_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = torch.randn(32, 48, generator=GENERATOR).to(torch.float8_e4m3fn), scales(2, 3)
    found = decoded({"m.weight": weight, "m.weight_scale_inv": scale}, "fp8")["m.weight"]
    assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32))


def test_mxfp4_as_transformers_decodes_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = drawn(0, 256, 2, 12, 3, 16).to(torch.uint8)
    exponents = drawn(120, 134, 2, 12, 3).to(torch.uint8)
    stored = {"m.experts.down_proj_blocks": blocks, "m.experts.down_proj_scales": exponents,
              "m.experts.down_proj_bias": torch.zeros(2, 12)}  # fmt: skip
    found = decoded(stored, "mxfp4")
    assert found.keys() == {"m.experts.down_proj"}
    expected = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    assert torch.equal(found["m.experts.down_proj"], expected)


@pytest.mark.parametrize("per", ["tensor", "row", "group"])
def test_whole_numbers_and_floats_with_scales(per: str) -> None:
    shape = {"tensor": (1,), "row": (6, 1), "group": (6, 2)}[per]
    codes, scale, zero = drawn(-128, 128, 6, 8).to(torch.int8), scales(*shape), drawn(-3, 4, *shape)
    stored = {
        "m.weight": codes,
        "m.weight_scale": scale,
        "m.weight_zero_point": zero.to(torch.int8),
    }
    groups = {"config_groups": {"g": {"weights": {"group_size": 4}}}}
    found = decoded(stored, "compressed-tensors", groups)["m.weight"]
    for i, j in itertools.product(range(6), range(8)):
        at = {"tensor": (0,), "row": (i, 0), "group": (i, j // 4)}[per]
        assert found[i, j] == (float(codes[i, j]) - float(zero[at])) * scale[at]


def test_pack_quantized() -> None:
    codes, scale = drawn(-8, 8, 6, 16), scales(6, 2)
    stored = {"m.weight_packed": words(codes + 8), "m.weight_scale": scale,
              "m.weight_shape": torch.tensor([6, 16])}  # fmt: skip
    found = decoded(stored, "compressed-tensors")["m.weight"]
    for i, j in itertools.product(range(6), range(16)):
        assert found[i, j] == float(codes[i, j]) * scale[i, j // 8]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_with_columns_in_another_order(version: str) -> None:
    codes, zero, scale = drawn(0, 16, 16, 8), drawn(1, 16, 2, 8), scales(2, 8).half()
    group = drawn(0, 2, 16)
    stored = {
        "m.qweight": words(codes.T.contiguous()).T.contiguous(), "m.scales": scale,
        "m.qzeros": words(zero - int(version == "gptq")), "m.g_idx": group.int(),
    }  # fmt: skip
    settings = {"bits": 4, "checkpoint_format": version}
    found = decoded(stored, "gptq", settings)["m.weight"]
    for i, o in itertools.product(range(16), range(8)):
        g = int(group[i])
        assert found[o, i] == float(codes[i, o] - zero[g, o]) * float(scale[g, o])


def test_awq() -> None:
    codes, zero, scale = drawn(0, 16, 16, 8), drawn(0, 16, 2, 8), scales(2, 8).half()
    # AutoAWQ's pack: columns 0, 2, 4, 6, 1, 3, 5, 7 lie in nibbles 0 to 7.
    order = tuple([0, 2, 4, 6, 1, 3, 5, 7].index(i) for i in range(8))
    stored = {"m.qweight": words(codes, order), "m.qzeros": words(zero, order), "m.scales": scale}
    found = decoded(stored, "awq", {"bits": 4, "version": "gemm"})["m.weight"]
    for i, o in itertools.product(range(16), range(8)):
        assert found[o, i] == float(codes[i, o] - zero[i // 8, o]) * float(scale[i // 8, o])
    assert not decoded(stored, "awq", {"bits": 4, "version": "gemv"})


def test_bitsandbytes() -> None:
    codes, most = drawn(-128, 128, 6, 8).to(torch.int8), scales(6)
    found = decoded({"m.weight": codes, "m.SCB": most}, "bitsandbytes")["m.weight"]
    assert torch.equal(found, codes.float() * (most / 127)[:, None])
    table, nibbles, absmax = torch.randn(16, generator=GENERATOR), drawn(0, 16, 48), scales(3)
    state = {"shape": [6, 8], "blocksize": 16, "dtype": "bfloat16", "quant_type": "nf4"}
    packed = (nibbles[0::2] << 4 | nibbles[1::2]).to(torch.uint8)[:, None]
    stored = {
        "m.weight": packed, "m.weight.absmax": absmax, "m.weight.quant_map": table,
        "m.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }  # fmt: skip
    found = decoded(stored, "bitsandbytes")["m.weight"].reshape(-1)
    for i in range(48):
        assert found[i] == table[nibbles[i]] * absmax[i // 16]


def test_nvfp4() -> None:
    nibbles, scale = drawn(0, 16, 4, 32), scales(4, 2).to(torch.float8_e4m3fn)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    stored = {"m.weight": packed, "m.weight_scale": scale, "m.weight_scale_2": torch.tensor(0.25)}
    found = decoded(stored, "modelopt")["m.weight"]
    for i, j in itertools.product(range(4), range(32)):
        assert found[i, j] == FP4[nibbles[i, j]] * float(scale[i, j // 16]) * 0.25


def test_codes_and_scales_that_do_not_fit_are_refused() -> None:
    weight = torch.zeros(6, 8, dtype=torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"m\.weight"):
        decoded({"m.weight": weight, "m.weight_scale_inv": scales(7, 9)}, "fp8")


def test_plain_weights_and_lonely_scales_are_no_codes() -> None:
    assert not decoded({"m.weight": torch.zeros(2, 2), "m.k_scale": torch.tensor(1.0)}, "fp8")
