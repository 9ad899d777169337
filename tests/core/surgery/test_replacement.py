"""Replacement networks against their formulas written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights

from streamline_bench.core.recipe.schema import ReplacementSpec
from streamline_bench.core.replacement import (
    NETWORK_KINDS,
    build_network,
    network_parameters,
)
from streamline_bench.errors import RecipeError

CONFIG = SimpleNamespace(hidden_size=8, intermediate_size=12, rms_norm_eps=1e-3)
RESIDUAL_START = ("ffn_res", "swiglu_res", "linear")


def network(kind: str, config: Any = CONFIG, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_network(ReplacementSpec(kind=kind, **changes), config)


def shuffled(kind: str) -> Any:
    net = network(kind)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return net


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def by_hand(kind: str, net: Any, x: torch.Tensor) -> torch.Tensor:
    """The same network in float64, as matrix products."""
    w = {name: p.detach().double() for name, p in net.named_parameters()}
    x = x.double()
    if kind == "linear":
        return x @ w["proj.weight"].T + w["proj.bias"]
    inner = x
    if kind.endswith("_res"):
        rms = ((x * x).sum(-1, keepdim=True) / 8 + 1e-3).sqrt()
        inner = x / rms * w["norm.weight"]
    up = inner @ w["up_proj.weight"].T
    if kind.startswith("swiglu"):
        gate = inner @ w["gate_proj.weight"].T
        out = (gate / (1 + torch.exp(-gate)) * up) @ w["down_proj.weight"].T
    else:
        out = (up + w["up_proj.bias"]).clamp(min=0) @ w["down_proj.weight"].T + w["down_proj.bias"]
    return x + out if kind.endswith("_res") else out


@pytest.mark.parametrize("kind", NETWORK_KINDS)
def test_forward_is_the_formula(kind: str, hidden: torch.Tensor) -> None:
    net = shuffled(kind)
    torch.testing.assert_close(
        net(hidden).double(), by_hand(kind, net, hidden), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", NETWORK_KINDS)
def test_positions_do_not_see_each_other(kind: str, hidden: torch.Tensor) -> None:
    net = shuffled(kind)
    changed = hidden.clone()
    changed[:, 3] += 1
    difference = (net(changed) - net(hidden)).abs().amax(dim=(0, 2))
    assert difference[3] > 0
    assert difference[[0, 1, 2, 4]].max() == 0


@pytest.mark.parametrize("kind", NETWORK_KINDS)
def test_improved_kinds_start_as_identity_and_the_papers_do_not(
    kind: str, hidden: torch.Tensor
) -> None:
    assert torch.equal(network(kind)(hidden), hidden) == (kind in RESIDUAL_START)


@pytest.mark.parametrize("kind", NETWORK_KINDS)
@pytest.mark.parametrize("size", [None, 20])
def test_parameters_are_counted_without_building(kind: str, size: int | None) -> None:
    spec = ReplacementSpec(kind=kind, intermediate_size=size)
    built = sum(p.numel() for p in build_network(spec, CONFIG).parameters())
    assert network_parameters(spec, CONFIG) == built


def test_sizes_default_to_the_papers() -> None:
    assert network("ffn").up_proj.out_features == 4 * 8
    assert network("swiglu").up_proj.out_features == 12
    assert network("ffn").up_proj.bias is not None
    assert network("swiglu").up_proj.bias is None
    # Llama-2-7B: the paper's FFN has 134.2 M parameters.
    llama = SimpleNamespace(hidden_size=4096, intermediate_size=11008)
    assert network_parameters(ReplacementSpec(kind="ffn"), llama) == 134_238_208


@pytest.mark.parametrize("key", ["ffn_dim", "n_inner"])
def test_other_families_name_the_mlp_width_differently(key: str) -> None:
    config = SimpleNamespace(hidden_size=8, **{key: 10})
    assert network("swiglu", config).up_proj.out_features == 10
    empty = SimpleNamespace(hidden_size=8, **{key: None})
    assert network("swiglu", empty).up_proj.out_features == 32


def test_norm_is_computed_in_float32() -> None:
    net = network("swiglu_res").to(torch.bfloat16)
    large = torch.full((1, 1, 8), 3e19, dtype=torch.bfloat16)  # its square overflows bfloat16 sums
    assert net.norm(large / 1e10).dtype == torch.bfloat16
    wide = torch.randn(4, 8)
    expected = net.norm(wide.bfloat16().float()).bfloat16()
    assert torch.equal(net.norm(wide.bfloat16()), expected)


def test_fresh_weights_can_be_drawn_again(hidden: torch.Tensor) -> None:
    for kind in NETWORK_KINDS:
        net = shuffled(kind)
        torch.manual_seed(7)
        net.reset_parameters()
        assert torch.equal(net(hidden), hidden) == (kind in RESIDUAL_START)


@pytest.mark.parametrize("kind", ["none", "layer"])
def test_other_kinds_are_no_networks(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"'{kind}' has no network.*: ffn, swiglu"):
        network(kind)


@pytest.mark.parametrize("kind", NETWORK_KINDS)
def test_can_be_built_without_weights_while_buffers_are_real(kind: str) -> None:
    with init_empty_weights(include_buffers=False):  # as engines do that load weights themselves
        built = network(kind)
    assert all(parameter.is_meta for parameter in built.parameters())


def test_nothing_has_no_parameters() -> None:
    assert network_parameters(ReplacementSpec(kind="none"), CONFIG) == 0
