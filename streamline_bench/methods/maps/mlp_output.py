"""Folds a linear map of the MLP's output into the tensors that produce it.

With row vectors an MLP ends in ``y = x Wᵀ + b``; the map ``y A`` is the same MLP with ``AᵀW`` and
``b A``. In a mixture of experts the output is a weighted sum, so that every expert and the shared
one takes the map. Works on the checkpoint's own tensors, whatever their names and layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import Architecture, decoder_layers, get_submodule
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.checkpoint.writer import layers_prefix
from streamline_bench.errors import ArchitectureError

__all__ = ["fold_into_mlp", "mlp_output_tensors", "refuse_normed_mlp"]

_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPERT_DOWN = ("down_proj", "w2")  # in a file; w2 is Mixtral's name there


def refuse_normed_mlp(row: Architecture) -> None:
    """Refuse families with a norm between the MLP and the residual stream.

    Raises:
        ArchitectureError: the family is one of them.
    """
    if row.mlp_output_norm:
        raise ArchitectureError(
            f"Model type '{row.model_type}' has a norm ('{row.mlp_output_norm}') between the MLP "
            "and the residual stream, so that a map of the MLP's output cannot be folded into its "
            "weights; use linear_patch or ridge_map, which put the map behind the layer."
        )


def mlp_output_tensors(
    reader: CheckpointReader, row: Architecture, model: Any, layer: int
) -> dict[str, int]:
    """Return the tensors that write a layer's MLP output: name -> the axis of the hidden size.

    Args:
        model: the loaded model; tells the number of experts and the layout of fused ones.

    Raises:
        ArchitectureError: they are not where the family keeps them, or are quantised.
    """
    prefix = f"{layers_prefix(reader, row)}.{layer}."
    names = {name[len(prefix) :] for name in reader.names if name.startswith(prefix)}
    experts = _experts(row, decoder_layers(model)[layer])
    found = _dense(row, names) if experts is None else _mixture(names, experts)
    if not found:
        raise ArchitectureError(
            f"Layer {layer} of this '{row.model_type}' checkpoint has no MLP output projection "
            "that a map could be folded into; use linear_patch or ridge_map."
        )
    for name in found:
        dtype = reader.entry(prefix + name).dtype
        if dtype not in _FLOATS:
            raise ArchitectureError(
                f"Tensor {prefix}{name} is stored as {dtype}; no map can be folded into quantised "
                "weights; give an unquantised checkpoint."
            )
    return {prefix + name: axis for name, axis in sorted(found.items())}


def fold_into_mlp(
    reader: CheckpointReader, tensors: Mapping[str, int], weight: Tensor
) -> dict[str, Tensor]:
    """Return the tensors with the map folded in, in their own dtype; computed in float64.

    Args:
        tensors: from :func:`mlp_output_tensors`.
        weight: A, ``[hidden, hidden]``, for row vectors (``y A``).
    """
    a = weight.to("cpu", torch.float64)
    folded = {}
    for name, axis in tensors.items():
        source = reader.tensor(name)
        wide = source.to(torch.float64)
        mapped = a.T @ wide if axis == -2 else wide @ a
        folded[name] = mapped.to(source.dtype).contiguous()
    return folded


def _dense(row: Architecture, names: set[str]) -> dict[str, int]:
    weight, bias = (
        ".".join(filter(None, (row.mlp, row.down, kind))) for kind in ("weight", "bias")
    )
    if weight not in names:
        return {}
    found = {weight: -1 if row.transposed else -2}
    if bias in names:
        found[bias] = -1
    return found


def _mixture(names: set[str], experts: nn.Module) -> dict[str, int]:
    down = "|".join(_EXPERT_DOWN)
    single = re.compile(rf"(?:.+\.)?experts\.(\d+)\.(?:{down})\.(weight|bias)")
    shared = re.compile(rf"(?:.+\.)?shared_experts?\.(?:{down})\.(weight|bias)")
    fused = re.compile(rf"(?:.+\.)?experts\.(?:{down})(_bias)?")
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name in names:
        if match := single.fullmatch(name):
            seen.add(int(match[1]))
            found[name] = -2 if match[2] == "weight" else -1
        elif match := shared.fullmatch(name):
            found[name] = -2 if match[1] == "weight" else -1
        elif match := fused.fullmatch(name):
            seen.update(range(_count(experts)))
            found[name] = -1 if match[1] or getattr(experts, "is_transposed", False) else -2
    if seen != set(range(_count(experts))):
        return {}
    return found


def _experts(row: Architecture, layer: nn.Module) -> nn.Module | None:
    """Return the module of routed experts, None in a dense layer."""
    if not row.experts:
        return None
    return get_submodule(layer, row.mlp)._modules.get(row.experts)


def _count(experts: nn.Module) -> int:
    count: Any = getattr(experts, "num_experts", None)
    return int(count if count is not None else len(list(experts.children())))
