"""Weights that loaded models have in common, found by content."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.harness.trunk.stack import Stack


def agree(first: Any, second: Any, stack: Stack, start: int) -> bool:
    """Whether the embeddings and the first ``start`` steps of two models have the same weights."""
    embeddings = [model.get_input_embeddings() for model in (first, second)]
    if not same_weights(*embeddings):
        return False
    pairs = list(zip(decoder_layers(first), decoder_layers(second), strict=False))
    for step in stack.steps[:start]:
        ours, theirs = pairs[step.layer]
        if step.attachment:
            agree = same_weights(
                ours.get_submodule("attachment"), theirs.get_submodule("attachment")
            )
        else:
            agree = same_weights(ours, theirs, skip="attachment")
        if not agree:
            return False
    return True


_PROBES = 16


class WeightPool:
    """Parameters of the models loaded so far, found again by content.

    Within one model no two parameters become one, so that it keeps counting as many.
    """

    def __init__(self) -> None:
        self._known: dict[Any, list[nn.Parameter]] = defaultdict(list)

    def share(self, model: nn.Module) -> int:
        """Let ``model`` use an earlier model's parameter wherever its own has the same bytes.

        Returns:
            Bytes of its own that it gave up.
        """
        chosen: dict[int, nn.Parameter] = {}
        twins: set[int] = set()
        fresh: list[tuple[Any, nn.Parameter]] = []
        given_up = 0
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in chosen:
                    key = _key(parameter)
                    twin = self._twin(key, parameter, twins)
                    if twin is None:
                        fresh.append((key, parameter))
                    else:
                        twins.add(id(twin))
                        given_up += parameter.nbytes
                    chosen[id(parameter)] = parameter if twin is None else twin
                module._parameters[name] = chosen[id(parameter)]
        for key, parameter in fresh:
            self._known[key].append(parameter)
        return given_up

    def _twin(self, key: Any, parameter: nn.Parameter, taken: set[int]) -> nn.Parameter | None:
        for known in self._known.get(key, ()):
            if id(known) not in taken and _same_bytes(known, parameter):
                return known
        return None


def same_weights(first: nn.Module, second: nn.Module, *, skip: str = "") -> bool:
    """Whether two modules have the same parameters by name and content.

    Args:
        skip: name of a child that is not looked at, in either module.
    """
    ours, theirs = (
        {k: v for k, v in module.named_parameters() if not (skip and k.startswith(f"{skip}."))}
        for module in (first, second)
    )
    return ours.keys() == theirs.keys() and all(
        ours[name] is theirs[name] or _same_bytes(ours[name], theirs[name]) for name in ours
    )


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    # By bytes: NaN equals itself, and zero is not its negative.
    same_kind = (first.shape, first.dtype) == (second.shape, second.dtype)
    return same_kind and torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _key(parameter: nn.Parameter) -> Any:
    """A cheap name that equal parameters have in common."""
    flat = parameter.detach().flatten()
    probes = flat[:: max(1, len(flat) // _PROBES)].contiguous().view(torch.uint8)
    return parameter.shape, parameter.dtype, parameter.device, probes.cpu().numpy().tobytes()
