"""Gradients summed over calibration tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import NumericsError
from streamline_bench.methods.tools.gradients import sum_gradients

IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokens() -> CalibrationTokens:
    """Two sequences of 8 tokens, the second one of 5 and pads."""
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    return CalibrationTokens(IDS, mask, "test", 13, "")


def test_mean_and_squares_are_autograd_s(model: Any, tokens: CalibrationTokens) -> None:
    weight = decoder_layers(model)[1].self_attn.k_proj.weight
    found = sum_gradients(model, {(1, "k"): weight}, tokens, squares=True, progress=False)[1, "k"]

    def gradient(ids: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(model(ids, labels=ids).loss, weight)[0]

    long, short = gradient(IDS[:1]), gradient(IDS[1:, :5])
    torch.testing.assert_close(found.mean, (7 * long + 4 * short) / 11, rtol=1e-4, atol=1e-7)
    assert found.squares is not None
    torch.testing.assert_close(found.squares, (long**2 + short**2) / 2, rtol=1e-4, atol=1e-9)


def test_bfloat16_adds_up_in_float32_and_the_model_is_left_as_it_was(
    model: Any, tokens: CalibrationTokens
) -> None:
    model = model.bfloat16().train()
    weight = decoder_layers(model)[0].mlp.up_proj.weight
    sums = sum_gradients(model, {(0, "up"): weight}, tokens, progress=False)[0, "up"]
    assert sums.mean.dtype == torch.float32
    assert sums.squares is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_gradients_that_are_not_finite_name_the_layer(
    model: Any, tokens: CalibrationTokens
) -> None:
    layer = decoder_layers(model)[2]
    weights = {(2, "mlp.up_proj"): layer.mlp.up_proj.weight}
    spoilt = layer.mlp.up_proj.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NumericsError, match=r"mlp\.up_proj.*layer 2\b.*NaN"):
        sum_gradients(model, weights, tokens, progress=False)
    spoilt.remove()
    # On the way up nothing is asked of the gradients: the layer itself is named.
    below = {(0, "mlp.up_proj"): decoder_layers(model)[0].mlp.up_proj.weight}
    with torch.no_grad():
        layer.mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"NaN.*layer 2\b"):
        sum_gradients(model, below, tokens, progress=False)
    with torch.no_grad():
        layer.mlp.down_proj.weight[0, 0] = 0
        model.get_output_embeddings().weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"NaN.*final norm.*LM head"):
        sum_gradients(model, below, tokens, progress=False)
