"""Models whose widths are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def wide(make_tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that saves a model whose weights and biases all matter."""

    def make(family: str, **changes: Any) -> Path:
        folder = make_tiny_model(family, **{"num_hidden_layers": 4, **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder

    return make
