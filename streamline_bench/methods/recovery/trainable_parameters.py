"""Which parameters of a model a recovery trains, LoRA's low-rank updates among them.

Trained parameters are float32: a step of 1e-5 is lost in bfloat16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import Architecture, architecture_of, decoder_layers
from streamline_bench.core.checkpoint.writer import LazyTensors
from streamline_bench.core.recipe.schema import RecoverySpec
from streamline_bench.errors import ArchitectureError, RecipeError


class TrainableParameters:
    """Some parameters of a model, as the training loop wants them.

    Args:
        model: all its other parameters are frozen, in place.
        chosen: name -> parameter.

    Attributes:
        weights: names, in the model, of the tensors that the training changes.
    """

    label, task = "recovered model", "recover"

    def __init__(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
        model.eval().requires_grad_(False)
        self._chosen = dict(chosen)
        self.weights = tuple(self._chosen)
        for parameter in self._chosen.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    @property
    def count(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self._chosen.values())

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer changes."""
        return list(self._chosen.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the same by name."""
        return dict(self._chosen)

    def state_on_cpu(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self._chosen.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over parameters given by :meth:`state_on_cpu`."""
        for name, parameter in self._chosen.items():
            parameter.copy_(state[name])

    def begin(self, step: int | None) -> None:
        """Nothing to prepare: there is no dropout."""

    def merged(self) -> LazyTensors:
        """Return name in the model -> trained weight, float32 on the CPU, where it stands now."""
        return LazyTensors(self._chosen, lambda name: self._chosen[name].detach().cpu())


def partial_parameters(model: Any, spec: RecoverySpec) -> TrainableParameters:
    """Choose the LM head, the final norm and the last layers (arXiv 2411.15558).

    An LM head that shares the embeddings gets a copy of its own, or the embeddings would change.

    Raises:
        RecipeError: there are fewer layers than ``last_layers``.
    """
    family = architecture_of(model.config)
    depth = len(decoder_layers(model))
    if spec.last_layers > depth:
        raise RecipeError(
            f"recovery.last_layers is {spec.last_layers}, and the compressed model has {depth} "
            "layers; lower it."
        )
    untie_embeddings(model)
    paths = [f"{family.layers}.{index}" for index in range(depth - spec.last_layers, depth)]
    chosen = {
        f"{path}.{name}": parameter
        for path in (*paths, family.final_norm, family.lm_head)
        if (module := _existing(model, path)) is not None
        for name, parameter in module.named_parameters()
    }
    return TrainableParameters(model, chosen)


def full_parameters(model: Any) -> TrainableParameters:
    """Choose all parameters; a head that shares the embeddings still does."""
    return TrainableParameters(model, dict(model.named_parameters()))


def untie_embeddings(model: Any) -> bool:
    """Give an LM head that shares the embeddings a copy of its own; return whether it did."""
    model.config.tie_word_embeddings = False
    head = model.get_submodule(architecture_of(model.config).lm_head)
    if head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    return True


def _existing(model: nn.Module, path: str) -> nn.Module | None:
    """Return a module, or None where this model lacks it (OPT-350m has no final norm)."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


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
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
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
    family = architecture_of(model.config)
    paths = {role: _path(family, role) for role in spec.targets}
    found: dict[str, nn.Module] = {}
    used: set[str] = set()
    for index, layer in enumerate(decoder_layers(model)):
        for role, path in paths.items():
            module = _projection(layer, path) if path else None
            if module is not None:
                used.add(role)
                found[f"{family.layers}.{index}.{path}"] = module
    plain = not family.experts and not family.gate and not family.fused_gate_up
    missing = [role for role in paths if role not in used and not (role == "gate" and plain)]
    if missing or not found:
        role = (missing or list(paths))[0]
        raise ArchitectureError(
            f"Model type '{family.model_type}' has no projection '{role}' that LoRA can update; "
            "choose others in recovery.targets."
        )
    return found


def _path(family: Architecture, role: str) -> str:
    """Return where a layer has the projection of a role; empty if nowhere."""
    attention = {"q": family.query, "k": family.key, "v": family.value}
    if role in attention:
        parent, name = family.attention, attention[role] or family.fused_qkv
    elif role == "o":
        parent, name = family.attention, family.output
    elif role == "down":
        parent, name = family.mlp, family.down
    else:
        parent, name = (
            family.mlp,
            (family.gate if role == "gate" else family.up) or family.fused_gate_up,
        )
    if not name:
        return ""
    return f"{parent}.{name}" if parent else name


def _projection(layer: nn.Module, path: str) -> nn.Module | None:
    """Return the projection at a path; None in layers of a mixture, which have experts there."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None
