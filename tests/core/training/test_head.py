"""The loss that is computed part by part against the plain one, and what it holds in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.training import head
from streamline_bench.core.training.batch import Batch
from streamline_bench.core.training.loop import LmObjective

FAMILIES = ("llama", "gpt2", "opt", "gemma2", "mixtral", "cohere", "granite", "gpt_neox")


def _batch(vocabulary: int) -> Batch:
    ids = torch.randint(3, vocabulary, (4, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(11) < torch.tensor([[11], [7], [2], [9]])
    targets = mask & (torch.arange(11) >= torch.tensor([[0], [3], [0], [5]]))
    return Batch.of(ids.where(mask, 0), mask, torch.arange(4), targets)


def _gradients(model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = LmObjective(model).loss_sum(batch, None)
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_give_the_loss_and_gradients_of_the_whole(
    make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Also of families that scale or cap their logits behind the head."""
    changes = {"gemma2": {"head_dim": 8}, "granite": {"logits_scaling": 3.0}}.get(family, {})
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(family, **changes)).eval()
    if family != "mixtral":  # whose experts are not computed in float64
        model.double()
    batch = _batch(model.config.vocab_size)
    plain, expected = _gradients(model, batch)
    monkeypatch.setattr(head, "WHOLE", 0)
    parts, found = _gradients(model, batch)
    assert parts == pytest.approx(plain, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6 * max(scale, 1e-3))


class _Largest(TorchDispatchMode):
    """Adds up the storages of float tensors that are alive, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        given = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.alive:
                    pointer = storage.data_ptr()
                    self.alive[pointer] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, pointer, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return given


@pytest.mark.parametrize(("whole", "least", "most"), [(0, 0.1, 1.0), (1 << 40, 8.0, 17.0)])
def test_memory_per_logit(
    monkeypatch: pytest.MonkeyPatch, whole: int, least: float, most: float
) -> None:
    """Frozen head of 16,384 words at 512 positions; weights and states are negligible there."""
    config = AutoConfig.for_model(
        "llama", vocab_size=16384, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model.model.layers.requires_grad_(True)
    monkeypatch.setattr(head, "WHOLE", whole)
    ids = torch.randint(0, 16384, (4, 129), generator=torch.Generator().manual_seed(1))
    batch = Batch.of(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(4))
    with _Largest() as memory:
        LmObjective(model).loss_sum(batch, None).backward()
    per_logit = memory.peak / (512 * 16384)
    assert least < per_logit < most
