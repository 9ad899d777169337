"""Merges in memory: both rules against their definitions, taken back without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.depth.layer_merging import LayerMerger, merged_mixture


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> Any:
    folder = make_tiny_model("qwen3", initializer_range=0.2, attention_bias=True, head_dim=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
                assert "layers" in name or "norm" in name
    return model


def _layer(model: Any, index: int) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.model.layers[index].named_parameters()}


def test_reference_rule_is_the_running_sum_it_telescopes_from(model: Any) -> None:
    """The authors' loop adds ``θ_{l+k}`` minus the running ``θ_l``, k = 1 .. m."""
    before = [_layer(model, index) for index in range(6)]
    LayerMerger(model, "reference").merge(1, [2, 3, 4])
    for name, merged in _layer(model, 1).items():
        if name.endswith("proj.weight"):
            running = before[1][name].clone()
            for k in (2, 3, 4):
                running += before[k][name] - running
            assert torch.allclose(merged, running, rtol=1e-12, atol=1e-12), name
            assert torch.equal(merged, before[4][name])
        else:
            assert torch.equal(merged, before[1][name]), name


def test_rdsc_is_the_sum_of_differences(model: Any) -> None:
    before = [_layer(model, index) for index in range(6)]
    LayerMerger(model, "rdsc").merge(1, [2, 3, 4])
    for name, merged in _layer(model, 1).items():
        expected = before[1][name].clone()
        if name.endswith("proj.weight"):
            for k in (2, 3, 4):
                expected += before[k][name] - before[1][name]
        assert torch.allclose(merged, expected, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("rule", ["reference", "rdsc"])
def test_undone_without_a_trace(model: Any, rule: Any) -> None:
    before = [_layer(model, index) for index in range(6)]
    merger = LayerMerger(model, rule)
    merger.merge(3, [4, 5])
    one_merge = [_layer(model, index) for index in range(6)]
    merger.merge(1, [2, 3])
    merger.undo(1)
    for index in range(6):
        for name, tensor in _layer(model, index).items():
            assert torch.equal(tensor, one_merge[index][name])
    merger.undo()
    for index in range(6):
        for name, tensor in _layer(model, index).items():
            assert torch.equal(tensor, before[index][name])


def test_reference_rule_copies_nothing(model: Any) -> None:
    merger = LayerMerger(model, "reference")
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    merger.merge(1, [2, 3])
    assert weights[1].data_ptr() == weights[3].data_ptr()


def test_mixtures_follow_the_rule() -> None:
    single = [{layer: 1.0} for layer in range(6)]
    assert merged_mixture(single[1], single[2:5], "reference") == {4: 1.0}
    first = merged_mixture(single[3], single[4:6], "rdsc")
    assert first == {3: -1.0, 4: 1.0, 5: 1.0}
    nested = merged_mixture(single[1], [single[2], first], "rdsc")
    assert nested == {1: -1.0, 2: 1.0, 3: -1.0, 4: 1.0, 5: 1.0}


def test_layers_of_different_shapes_are_refused(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[2],
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ArchitectureError, match="Layer 2 differs from layer 0"):
        LayerMerger(model, "reference")
