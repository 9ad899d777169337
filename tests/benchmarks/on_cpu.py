"""Runs reference code that names CUDA devices on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """Reads every request for a CUDA device as one for the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        placed = [self._placed(value) for value in args]
        named = {key: self._placed(value) for key, value in (kwargs or {}).items()}
        return function(*placed, **named)

    @staticmethod
    def _placed(value: Any) -> Any:
        is_cuda = value == "cuda" if isinstance(value, str) else False
        is_cuda |= isinstance(value, torch.device) and value.type == "cuda"
        return "cpu" if is_cuda else value
