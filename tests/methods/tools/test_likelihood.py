"""The summed loss: equal to transformers' own without pads, blind to pads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import CalibrationError
from streamline_bench.methods.tools.likelihood import count_targets, next_token_loss

IDS = torch.tensor([[1, 5, 9, 40, 22, 7], [3, 8, 2, 60, 33, 12]])


def test_equals_the_loss_of_transformers(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    with torch.no_grad():
        output = model(IDS, labels=IDS)
    loss = next_token_loss(output.logits, IDS, torch.ones_like(IDS).bool())
    assert loss.dtype == torch.float64
    assert loss.item() / 10 == pytest.approx(output.loss.item(), rel=1e-6)


def test_pads_do_not_count() -> None:
    logits = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    by_hand = -sum(logits[0, t].log_softmax(-1)[IDS[0, t + 1]] for t in range(3))
    loss = next_token_loss(logits.bfloat16(), IDS, mask)
    assert loss.dtype == torch.float32
    assert next_token_loss(logits, IDS, mask).item() == pytest.approx(float(by_hand), rel=1e-6)
    assert count_targets(CalibrationTokens.from_tensors(IDS, mask)) == 3


def test_single_tokens_predict_nothing() -> None:
    with pytest.raises(CalibrationError, match="none follows another"):
        count_targets(CalibrationTokens.from_tensors(IDS[:, :1]))
