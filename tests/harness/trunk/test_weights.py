"""Equal tensors of several models are held once, and every model keeps its answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_bench.harness.trunk.weights import WeightPool, same_weights

IDS = torch.tensor([[1, 5, 9, 40, 22, 7]])


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_pruned_model_brings_nothing_of_its_own(
    tiny_llama: Path, make_variant: Callable[..., Path]
) -> None:
    dense, pruned = load(tiny_llama), load(make_variant(tiny_llama, [0, 1, 4, 5]))
    with torch.no_grad():
        expected = pruned(IDS).logits
    count, size = pruned.num_parameters(), sum(p.nbytes for p in pruned.parameters())
    pool = WeightPool()
    assert pool.share(dense) == 0
    assert pool.share(pruned) == size
    assert pruned.num_parameters() == count
    held = {id(parameter) for parameter in dense.parameters()}
    assert all(id(parameter) in held for parameter in pruned.parameters())
    with torch.no_grad():
        assert torch.equal(pruned(IDS).logits, expected)


def test_only_equal_bytes_are_shared() -> None:
    first, second = nn.Linear(40, 40), nn.Linear(40, 40)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.weight[3, 3] = first.weight[3, 3].nextafter(torch.tensor(9.0))
    pool = WeightPool()
    pool.share(first)
    assert pool.share(second) == first.bias.nbytes
    assert second.bias is first.bias
    assert second.weight is not first.weight
    assert not same_weights(first, second)


def test_equal_parameters_of_one_model_stay_apart_and_tied_ones_tied() -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))
        torch.manual_seed(0)
        nn.init.normal_(model[2].weight)  # type: ignore[arg-type]
        model[3].weight = model[2].weight
        return model

    first, second = build(), build()
    count = len(list(second.parameters()))
    pool = WeightPool()
    pool.share(first)
    pool.share(second)
    assert second[3].weight is second[2].weight is first[2].weight
    assert second[0].weight is not second[1].weight
    assert len(list(second.parameters())) == count


def test_damaged_numbers_equal_themselves() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        first.weight.fill_(float("nan"))
    second.load_state_dict(first.state_dict())
    assert same_weights(first, second)
    second.to(torch.bfloat16)
    assert not same_weights(first, second)
