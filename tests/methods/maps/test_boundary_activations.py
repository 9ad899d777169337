"""States around a block, against transformers' own hidden states and the layer's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.similarity import Block
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.maps.boundary_map import boundary_rows, mlp_scale


def _tokens() -> CalibrationTokens:
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9)[None, :] < torch.tensor([[9], [4], [7]])
    return CalibrationTokens.from_tensors(ids * mask, mask)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def _loud(model: Any) -> Any:
    """Weights large enough that every part of a layer shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                tensor.copy_(0.25 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_are_the_hidden_states_without_pads(tiny_llama: Path, batch_size: int) -> None:
    model, tokens = _load(tiny_llama), _tokens()
    blocks = [Block(0, 2, 0.0), Block(3, 2, 0.0)]
    batches = list(boundary_rows(model, tokens, blocks, batch_size=batch_size, progress=False))
    states: list[list[torch.Tensor]] = [[], [], []]
    for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
        with torch.no_grad():
            hidden = model(ids[None, mask], output_hidden_states=True).hidden_states
        for kept, index in zip(states, (0, 2, 5), strict=True):
            kept.append(hidden[index][0])
    for number, (first, last) in enumerate([(0, 1), (None, 2)]):
        stream = torch.cat([batch[number].stream for batch in batches])
        target = torch.cat([batch[number].target for batch in batches])
        assert len(stream) == tokens.num_tokens
        if first is not None:
            torch.testing.assert_close(stream, torch.cat(states[first]))
        torch.testing.assert_close(target, torch.cat(states[last]))


def test_mlp_rows_complete_the_stream(tiny_llama: Path) -> None:
    model, tokens = _load(tiny_llama), _tokens()
    before: list[torch.Tensor] = []
    layer = model.model.layers[1]
    layer.post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: before.append(args[0])
    )
    (batch,) = boundary_rows(
        model, tokens, [Block(2, 2, 0.0)], scales=[1.0], batch_size=3, progress=False
    )
    rows = batch[0]
    assert rows.mlp is not None
    rest = before[0].reshape(-1, 32)[tokens.attention_mask.reshape(-1)]
    torch.testing.assert_close(rest + rows.mlp, rows.stream)
    assert float(rows.mlp.norm()) > 0


@pytest.mark.parametrize(
    ("model_type", "changes", "scale"),
    [
        ("llama", {}, 1.0),
        ("opt", {"ffn_dim": 48}, 1.0),
        ("phi", {}, 1.0),
        ("gpt_neox", {}, 1.0),
        ("gpt_neox", {"use_parallel_residual": False}, 1.0),
        ("granite", {"residual_multiplier": 0.7}, 0.7),
    ],
)
def test_multiplier_of_the_mlp(
    model_type: str,
    changes: dict[str, Any],
    scale: float,
    make_tiny_model: Callable[..., Path],
) -> None:
    model = _loud(_load(make_tiny_model(model_type, **changes)))
    assert mlp_scale(model, 2, _tokens()) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("opt", {"ffn_dim": 48, "do_layer_norm_before": False}), ("olmo2", {})],
)
def test_a_norm_behind_the_mlp_is_noticed(
    model_type: str, changes: dict[str, Any], make_tiny_model: Callable[..., Path]
) -> None:
    model = _loud(_load(make_tiny_model(model_type, **changes)))
    with pytest.raises(ArchitectureError, match=r"MLP.*linear_patch"):
        mlp_scale(model, 2, _tokens())
