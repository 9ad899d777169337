"""Low-rank updates of projections (LoRA, arXiv 2106.09685) through peft, merged at the end."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import Architecture, architecture_of, decoder_layers
from streamline_bench.core.checkpoint.lazy_tensors import LazyTensors
from streamline_bench.core.recipe.schema import RecoverySpec
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.recovery.trainable_parameters import TrainableParameters

__all__ = ["LoraParameters", "target_modules"]

_ADAPTER = "default"  # peft's own name for the first one


class LoraParameters(TrainableParameters):
    """Low-rank updates put into a model, in place.

    Their dropout is the only thing that draws random numbers. It is on in training steps only, and
    its generator is seeded by the number of the step.
    """

    def __init__(self, model: Any, spec: RecoverySpec, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D

        modules = target_modules(model, spec)
        stored_transposed = any(isinstance(module, Conv1D) for module in modules.values())
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=list(modules),
            bias="none",
            fan_in_fan_out=stored_transposed,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        self._seed = seed
        self._layers: dict[str, Any] = {path: model.get_submodule(path) for path in modules}
        self._dropouts = [
            layer.lora_dropout[_ADAPTER]
            for layer in self._layers.values()
            if isinstance(layer.lora_dropout[_ADAPTER], nn.Dropout)
        ]
        chosen: dict[str, nn.Parameter] = {}
        for path, layer in self._layers.items():
            chosen[f"{path}.lora_A"] = layer.lora_A[_ADAPTER].weight
            chosen[f"{path}.lora_B"] = layer.lora_B[_ADAPTER].weight
        super().__init__(model, chosen)
        self.weights = tuple(f"{path}.weight" for path in self._layers)

    def begin(self, step: int | None) -> None:
        """Switch dropout on and seed it for a training step; switch it off for a validation."""
        for dropout in self._dropouts:
            dropout.train(step is not None)
        if step is not None and self._dropouts:
            digest = hashlib.sha256(f"{self._seed} {step}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))

    def merged(self) -> LazyTensors:
        """Return name in the model -> weight with its update added, float32 on the CPU.

        Each is added up when it is asked for: together they are a second model.
        """
        return LazyTensors(self.weights, self._merged)

    @torch.no_grad()
    def _merged(self, name: str) -> Tensor:
        layer = self._layers[name.removesuffix(".weight")]
        merged: Tensor = layer.get_base_layer().weight.float() + layer.get_delta_weight(_ADAPTER)
        return merged.cpu()


def target_modules(model: Any, spec: RecoverySpec) -> dict[str, nn.Module]:
    """Return path -> projection for the roles in ``spec.targets``, in the order of the layers.

    A plain MLP has no gate, so that this role asks for nothing there.

    Raises:
        ArchitectureError: the family has no projection of that role.
    """
    row = architecture_of(model.config)
    paths = {role: _path(row, role) for role in spec.targets}
    found: dict[str, nn.Module] = {}
    used: set[str] = set()
    for index, layer in enumerate(decoder_layers(model)):
        for role, path in paths.items():
            module = _projection(layer, path) if path else None
            if module is not None:
                used.add(role)
                found[f"{row.layers}.{index}.{path}"] = module
    plain = not row.experts and not row.gate and not row.fused_gate_up
    missing = [role for role in paths if role not in used and not (role == "gate" and plain)]
    if missing or not found:
        role = (missing or list(paths))[0]
        raise ArchitectureError(
            f"Model type '{row.model_type}' has no projection '{role}' that LoRA can update; "
            "choose others in recovery.targets."
        )
    return found


def _path(row: Architecture, role: str) -> str:
    """Return where a layer has the projection of a role; empty if nowhere."""
    attention = {"q": row.query, "k": row.key, "v": row.value}
    if role in attention:
        parent, name = row.attention, attention[role] or row.fused_qkv
    elif role == "o":
        parent, name = row.attention, row.output
    elif role == "down":
        parent, name = row.mlp, row.down
    else:
        parent, name = row.mlp, (row.gate if role == "gate" else row.up) or row.fused_gate_up
    if not name:
        return ""
    return f"{parent}.{name}" if parent else name


def _projection(layer: nn.Module, path: str) -> nn.Module | None:
    """Return the projection at a path; None in layers of a mixture, which have experts there."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None
