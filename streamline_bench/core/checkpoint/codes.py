"""Weights stored as codes and scales, and the weights that they stand for.

The tensors themselves tell the format: each has names of its own. What is read here needs no
package. A format that is not in :data:`_RULES` is copied and never read.

=================  =================================================================  =========
format             tensors of a module                                                as
=================  =================================================================  =========
FP8, INT8          ``weight``, ``weight_scale_inv`` or ``weight_scale``               DeepSeek-V3
MXFP4              ``…_blocks``, ``…_scales`` of fused experts                        gpt-oss
pack-quantized     ``weight_packed``, ``weight_scale``, ``weight_shape``              llm-compressor
NVFP4              ``weight``, ``weight_scale``, ``weight_scale_2``; or packed        modelopt
GPTQ, AWQ          ``qweight``, ``qzeros``, ``scales``, ``g_idx``                     AutoGPTQ
bitsandbytes       ``weight``, ``weight.absmax``, ``weight.quant_map``; or ``SCB``    bitsandbytes
=================  =================================================================  =========
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from streamline_bench.core.checkpoint.folder import TensorEntry
from streamline_bench.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Settings: TypeAlias = Mapping[str, Any]
Stored: TypeAlias = Callable[[str], "Tensor"]
"""Gives a stored tensor by its whole name."""

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen codes of E2M1 (OCP Microscaling Formats, section 5.3.3)."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in an AWQ word of eight columns -> which nibble holds it."""
_NF4_STATE = re.compile(r"weight\.quant_state\.bitsandbytes__(nf4|fp4)")


@dataclass(frozen=True)
class CodedWeight:
    """One weight of the model that is stored as codes.

    Attributes:
        name: of the weight, as a plain checkpoint has it.
        shape: of the weight.
        parts: role -> whole name of the stored tensor; the first one holds the codes.
        decode: gives the weight in float32.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Callable[[CodedWeight, Stored, Settings], Tensor]

    def decoded(self, stored: Stored, settings: Settings) -> Tensor:
        """Return the weight, float32.

        Raises:
            CheckpointError: codes and scales do not fit together.
        """
        try:
            weight = self.decode(self, stored, settings)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The codes of '{self.name}' and their scales do not fit together ({error}); "
                "download the model again."
            ) from None
        if tuple(weight.shape) != self.shape:
            raise CheckpointError(
                f"The codes of '{self.name}' give shape {tuple(weight.shape)} and not "
                f"{self.shape}; download the model again."
            )
        return weight


def coded_weights(
    entries: Mapping[str, TensorEntry], method: str, settings: Settings, stored: Stored
) -> dict[str, CodedWeight]:
    """Return the weights that are stored as codes in a known format, by name.

    Args:
        entries: all stored tensors.
        method: as :class:`.Quantisation` names it.
        settings: the quantisation settings.
        stored: reads the small tensors that hold shapes.
    """
    modules: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in entries.items():
        for module, role in _owners(name):
            modules[module][role] = entry
    found = (
        weight
        for module, roles in modules.items()
        for rule in _RULES
        if (weight := rule(module, roles, method, settings, stored)) is not None
    )
    return {weight.name: weight for weight in found}


def _owners(name: str) -> Iterable[tuple[str, str]]:
    """Return (module, role) of a tensor; fused experts have no module of their own."""
    module, _, role = name.rpartition(".")
    if state := re.search(r"\.(weight\.[\w.]+)$", name):
        module, role = name[: state.start()], state[1]
    yield module, role
    for ending in ("_blocks", "_scales", "_scale_inv", "_scale", "_bias"):
        if role.endswith(ending) and not role.startswith("weight"):
            yield name.removesuffix(ending), ending
    if not role.startswith(("weight", "bias")):
        yield name, ""


Rule: TypeAlias = Callable[
    [str, Mapping[str, TensorEntry], str, Settings, Stored], CodedWeight | None
]


def _whole(roles: Mapping[str, TensorEntry], *wanted: str) -> dict[str, str]:
    """Return role -> stored name: the wanted roles first, then what else belongs to the module."""
    others = [r for r in roles if r not in wanted and r not in ("bias", "_bias", "weight", "")]
    return {role: roles[role].name for role in (*wanted, *others) if role in roles}


def _mxfp4(
    module: str, roles: Mapping[str, TensorEntry], method: str, settings: Settings, stored: Stored
) -> CodedWeight | None:
    blocks = roles.get("_blocks")
    if blocks is None or "_scales" not in roles or len(blocks.shape) != 4:
        return None
    experts, out, groups, packed = blocks.shape
    parts = {role: roles[role].name for role in ("_blocks", "_scales")}
    return CodedWeight(module, (experts, groups * packed * 2, out), parts, _decode_mxfp4)


def _decode_mxfp4(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    values = _nibbles(stored(coded.parts["_blocks"]))  # [experts, out, groups, 32]
    exponents = stored(coded.parts["_scales"]).float() - 127
    return (values * exponents.exp2()[..., None]).flatten(2).transpose(1, 2).contiguous()


def _scaled(
    module: str, roles: Mapping[str, TensorEntry], method: str, settings: Settings, stored: Stored
) -> CodedWeight | None:
    for codes in ("weight", ""):
        entry = roles.get(codes)
        scale = next(
            (f"{codes}_{s}" for s in ("scale_inv", "scale") if f"{codes}_{s}" in roles), ""
        )
        if entry is None or not scale or entry.dtype not in ("I8", "F8_E4M3", "F8_E5M2"):
            continue
        if entry.dtype == "I8" and scale.endswith("_inv"):  # FP4 in bytes, of DeepSeek-V4
            continue
        parts = _whole(roles, codes, scale)
        name = f"{module}.weight" if codes else module
        return CodedWeight(name, entry.shape, parts, _decode_scaled)
    return None


def _decode_scaled(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    codes, scale_role = list(coded.parts)[:2]
    codes_of, scale = stored(coded.parts[codes]).float(), stored(coded.parts[scale_role])
    # Exponents in bytes: 2 ** (byte - 127).
    wide = (
        (scale.float() - 127).exp2()
        if scale.dtype.itemsize == 1 and _whole_numbers(scale)
        else (scale.float())
    )
    zero = coded.parts.get("weight_zero_point")
    if zero is not None:
        codes_of = codes_of - _spread(stored(zero).float(), codes_of.shape, settings)
    return codes_of * _spread(wide, codes_of.shape, settings)


def _whole_numbers(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point


def _spread(scale: Tensor, shape: torch.Size, settings: Settings) -> Tensor:
    """Return scales of blocks, rows, groups or the whole weight as one for each weight."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() < len(shape):
        if scale.shape[-1] != shape[-2]:
            return scale.reshape(*scale.shape, *[1] * (len(shape) - scale.dim()))
        scale = scale[..., None]  # one for each row
    given = settings.get("weight_block_size") or _group_block(settings)
    for axis, number in ((-2, 0), (-1, 1)):
        size, count = shape[axis], scale.shape[axis]
        if count in (1, size):
            continue
        block = int(given[number]) if given else -(-size // count)
        if -(-size // block) != count:
            block = -(-size // count)
        if -(-size // block) != count:
            raise ValueError(f"{count} scales for {size} weights")
        scale = scale.repeat_interleave(block, axis).narrow(axis % scale.dim(), 0, size)
    return scale


def _group_block(settings: Settings) -> Any:
    for group in (settings.get("config_groups") or {}).values():
        weights = (group.get("weights") if isinstance(group, Mapping) else None) or {}
        if weights.get("block_structure"):
            return weights["block_structure"]
        if weights.get("group_size"):
            return (1, weights["group_size"])
    return None


def _packed(
    module: str, roles: Mapping[str, TensorEntry], method: str, settings: Settings, stored: Stored
) -> CodedWeight | None:
    entry = roles.get("weight_packed")
    if (
        entry is None
        or entry.dtype != "I32"
        or not {"weight_scale", "weight_shape"} <= roles.keys()
    ):
        return None
    shape = tuple(int(size) for size in stored(roles["weight_shape"].name))
    parts = _whole(roles, "weight_packed", "weight_scale", "weight_shape")
    return CodedWeight(f"{module}.weight", shape, parts, _decode_packed)


def _decode_packed(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    rows, columns = coded.shape
    packed, scale = stored(coded.parts["weight_packed"]), stored(coded.parts["weight_scale"])
    bits = next(b for b in (2, 4, 8) if packed.shape[1] == -(-columns // (32 // b)))
    codes = _unpacked(packed, bits)[:, :columns].float()
    zero: Any = 2 ** (bits - 1)
    if "weight_zero_point" in coded.parts:
        points = stored(coded.parts["weight_zero_point"])
        if points.dtype.itemsize == 4:
            zero = _unpacked(points.T.contiguous(), bits)[:, :rows].T.float()
        else:
            zero = points.float() + zero
        zero = _of_columns(zero, coded, stored, columns)
    weight: Tensor = (codes - zero) * _of_columns(scale.float(), coded, stored, columns)
    return weight


def _of_columns(values: Tensor, coded: CodedWeight, stored: Stored, columns: int) -> Tensor:
    """Return ``[rows, groups]`` as ``[rows, columns]``; columns may have been reordered."""
    if "weight_g_idx" in coded.parts:
        return values[:, stored(coded.parts["weight_g_idx"]).long()]
    return values.repeat_interleave(columns // values.shape[1], 1)


def _nvfp4(
    module: str, roles: Mapping[str, TensorEntry], method: str, settings: Settings, stored: Stored
) -> CodedWeight | None:
    codes, whole = ("weight_packed", "weight_global_scale")
    if codes not in roles:
        codes, whole = ("weight", "weight_scale_2")
    entry = roles.get(codes)
    if entry is None or entry.dtype != "U8" or not {"weight_scale", whole} <= roles.keys():
        return None
    shape = (*entry.shape[:-1], entry.shape[-1] * 2)
    parts = _whole(roles, codes, "weight_scale", whole)
    return CodedWeight(f"{module}.weight", shape, parts, _decode_nvfp4)


def _decode_nvfp4(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    codes, scale, whole = (stored(name).clone() for name in list(coded.parts.values())[:3])
    values = _nibbles(codes)
    of_all = whole.float() if "weight_scale_2" in coded.parts else 1 / whole.float()
    groups = (scale.float() * of_all).repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
    return values * groups


def _qweight(
    module: str, roles: Mapping[str, TensorEntry], method: str, settings: Settings, stored: Stored
) -> CodedWeight | None:
    entry = roles.get("qweight")
    bits = settings.get("bits") or settings.get("w_bit")
    if entry is None or not {"qzeros", "scales"} <= roles.keys() or bits not in (2, 4, 8):
        return None
    rows, columns = entry.shape
    parts = _whole(roles, "qweight", "qzeros", "scales")
    name, each = f"{module}.weight", 32 // bits
    if method == "gptq":
        return CodedWeight(name, (columns, rows * each), parts, _decode_gptq)
    version = str(settings.get("version") or "gemm").lower()
    if method == "awq" and bits == 4 and version == "gemm":
        return CodedWeight(name, (columns * each, rows), parts, _decode_awq)
    return None


def _decode_gptq(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    bits = int(settings["bits"])
    rows = coded.shape[1]
    codes = _unpacked(stored(coded.parts["qweight"]).T.contiguous(), bits).T.float()
    zeros = _unpacked(stored(coded.parts["qzeros"]), bits).float()
    scales = stored(coded.parts["scales"]).float()
    # The first version of the format stores zeros less one.
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = (zeros + 1) % 2**bits
    if "g_idx" in coded.parts:
        group = stored(coded.parts["g_idx"]).long()
    else:
        import torch

        group = torch.arange(rows) // (rows // len(scales))
    return ((codes - zeros[group]) * scales[group]).T.contiguous()


def _decode_awq(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    scales = stored(coded.parts["scales"]).float()
    codes, zeros = (
        _unpacked(stored(coded.parts[role]), 4, _AWQ_ORDER).float()
        for role in ("qweight", "qzeros")
    )
    size = len(codes) // len(scales)
    wide = (part.repeat_interleave(size, 0) for part in (zeros, scales))
    return ((codes - next(wide)) * next(wide)).T.contiguous()


def _bitsandbytes(
    module: str, roles: Mapping[str, TensorEntry], method: str, settings: Settings, stored: Stored
) -> CodedWeight | None:
    entry = roles.get("weight")
    if entry is not None and entry.dtype == "I8" and "SCB" in roles:
        parts = _whole(roles, "weight", "SCB")
        return CodedWeight(f"{module}.weight", entry.shape, parts, _decode_int8)
    state = next((role for role in roles if _NF4_STATE.fullmatch(role)), None)
    if entry is None or state is None:
        return None
    shape = tuple(_quant_state(stored(roles[state].name))["shape"])
    parts = _whole(roles, "weight", "weight.absmax", "weight.quant_map")
    return CodedWeight(f"{module}.weight", shape, parts, _decode_4bit)


def _decode_int8(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    codes, most = stored(coded.parts["weight"]), stored(coded.parts["SCB"])
    return codes.float() * (most.float() / 127)[:, None]


def _decode_4bit(coded: CodedWeight, stored: Stored, settings: Settings) -> Tensor:
    state = _quant_state(
        next(stored(name) for role, name in coded.parts.items() if _NF4_STATE.fullmatch(role))
    )
    part = coded.parts
    scales = stored(part["weight.absmax"])
    if "weight.nested_absmax" in part:
        inner = stored(part["weight.nested_quant_map"])[scales.long()].reshape(-1)
        outer = stored(part["weight.nested_absmax"]).repeat_interleave(state["nested_blocksize"])
        scales = inner * outer[: len(inner)] + state["nested_offset"]
    packed = stored(part["weight"]).reshape(-1)
    # The first of two weights lies in the upper half of a byte.
    values = _nibbles(packed, stored(part["weight.quant_map"]), upper_first=True)
    wide = scales.float().repeat_interleave(state["blocksize"])[: len(values)]
    return (values * wide).reshape(coded.shape)


def _quant_state(tensor: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(tensor.tolist()))
    return found


def _nibbles(packed: Tensor, table: Tensor | None = None, upper_first: bool = False) -> Tensor:
    """Return the values of four-bit codes, two a byte, the lower half first."""
    import torch

    values = torch.tensor(_FP4) if table is None else table.float()
    halves = [values[(packed & 15).long()], values[(packed >> 4).long()]]
    return torch.stack(halves[::-1] if upper_first else halves, -1).flatten(-2)


def _unpacked(words: Tensor, bits: int, order: Iterable[int] | None = None) -> Tensor:
    """Return the codes in 32-bit words, ``[rows, words] -> [rows, words * (32 / bits)]``."""
    import torch

    shifts = torch.tensor(list(order) if order is not None else range(32 // bits)) * bits
    codes: Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


_RULES: tuple[Rule, ...] = (_mxfp4, _bitsandbytes, _packed, _nvfp4, _qweight, _scaled)
