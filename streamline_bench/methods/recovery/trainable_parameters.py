"""Which parameters of a model a recovery trains; all others are frozen.

Trained parameters are float32: a step of 1e-5 is lost in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.checkpoint.lazy_tensors import LazyTensors
from streamline_bench.core.recipe.schema import RecoverySpec
from streamline_bench.errors import RecipeError

__all__ = ["TrainableParameters", "full_parameters", "partial_parameters", "untie_embeddings"]


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
    row = architecture_of(model.config)
    depth = len(decoder_layers(model))
    if spec.last_layers > depth:
        raise RecipeError(
            f"recovery.last_layers is {spec.last_layers}, and the compressed model has {depth} "
            "layers; lower it."
        )
    untie_embeddings(model)
    paths = [f"{row.layers}.{index}" for index in range(depth - spec.last_layers, depth)]
    chosen = {
        f"{path}.{name}": parameter
        for path in (*paths, row.final_norm, row.lm_head)
        if (module := _existing(model, path)) is not None
        for name, parameter in module.named_parameters()
    }
    return TrainableParameters(model, chosen)


def full_parameters(model: Any) -> TrainableParameters:
    """Choose all parameters; a head that shares the embeddings goes on doing so."""
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
