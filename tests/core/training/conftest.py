"""A tiny Llama as teacher, and tokens to train its replacements on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

DEPTH, WIDTH, LENGTH = 6, 32, 12


@pytest.fixture
def teacher_model(random_model: Callable[..., Any]) -> Any:
    """A random six-layer Llama with wide weights, so that every layer matters."""
    return random_model("llama")


@pytest.fixture
def tokens() -> Any:
    """24 sequences of 12 tokens without padding."""
    return make_tokens(24)


@pytest.fixture
def padded_tokens() -> Any:
    """16 sequences of 3 to 12 tokens, padded on the right."""
    return make_tokens(16, padded=True)


def make_tokens(count: int, padded: bool = False) -> Any:
    import torch

    from streamline_bench.core.data.calibration import CalibrationTokens

    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 100, (count, LENGTH), generator=generator)
    if not padded:
        return CalibrationTokens.from_tensors(ids)
    lengths = torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    return CalibrationTokens.from_tensors(ids.where(mask, 0), mask)
