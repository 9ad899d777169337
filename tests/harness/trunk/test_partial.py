"""Passes that set out at a boundary give the bits of the whole pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.harness.trunk.partial import States, partial_pass
from streamline_bench.harness.trunk.stack import read_stack
from streamline_bench.modeling import register

IDS = torch.tensor(
    [[1, 5, 9, 40, 22, 7, 3, 3, 60, 8, 2, 71], [1, 8, 33, 3, 96, 12, 0, 0, 0, 0, 0, 0]]
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "phi": {},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def load(folder: Path) -> Any:
    register()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def check_every_boundary(folder: Path, runs: Callable[[Any], list[Any]]) -> None:
    """Keep all states of a whole pass, then set out from each; count what runs."""
    model, steps = load(folder), read_stack(folder).steps
    expected = logits(model)
    states: States = {}
    everywhere = range(1, len(steps) + 1)
    with partial_pass(model, steps, start=0, states=states, keep=everywhere):
        assert torch.equal(logits(model), expected)
    assert sorted(states) == list(everywhere)
    counts: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: counts.append(name))
        for name, module in runs(model)
    ]
    for start in everywhere:
        counts.clear()
        kept: States = {start: states[start]}
        with partial_pass(model, steps, start=start, states=kept, keep=everywhere):
            assert torch.equal(logits(model), expected)
        assert len(counts) == len(steps) - start
        for boundary in range(start, len(steps) + 1):
            first, second = (s[boundary] for s in (kept, states))
            first, second = (s[0] if isinstance(s, tuple) else s for s in (first, second))
            assert torch.equal(first, second)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), expected)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def mlps(model: Any) -> list[Any]:
    """One module per layer that runs once when the layer does, and the attached networks."""
    ends = ("input_layernorm", "self_attn_layer_norm", "ln_1", "attachment")
    return [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in ends]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_from_any_boundary(family: str, make_tiny_model: Callable[..., Path]) -> None:
    check_every_boundary(make_tiny_model(family, num_hidden_layers=3, **FAMILIES[family]), mlps)


@pytest.mark.parametrize(
    ("family", "after"), [("llama", 0), ("llama", 1), ("opt", 1), ("gpt2", 2), ("llama", -1)]
)
def test_a_pass_from_between_a_layer_and_its_network(
    family: str,
    after: int,
    make_tiny_model: Callable[..., Path],
    make_variant: Callable[..., Path],
) -> None:
    dense = make_tiny_model(family, num_hidden_layers=4, **FAMILIES[family])
    folder = make_variant(dense, [0, 1, 3], attach=(after, "swiglu_res"))
    check_every_boundary(folder, mlps)


def test_a_layer_that_writes_into_its_input_leaves_kept_states_alone(tiny_llama: Path) -> None:
    model, steps = load(tiny_llama), read_stack(tiny_llama).steps

    def write(_: Any, args: Any) -> None:
        args[0].mul_(1.5)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(write)
    expected = logits(model)
    states: States = {}
    with partial_pass(model, steps, start=0, states=states, keep={2}):
        logits(model)
    for _ in range(2):
        with partial_pass(model, steps, start=2, states=states, keep=()):
            assert torch.equal(logits(model), expected)


def test_an_error_in_the_pass_takes_everything_off_again(tiny_llama: Path) -> None:
    model, steps = load(tiny_llama), read_stack(tiny_llama).steps
    with (
        pytest.raises(RuntimeError, match="boom"),
        partial_pass(model, steps, start=0, states={}, keep={3}),
    ):
        raise RuntimeError("boom")
    assert not any("forward" in module.__dict__ for module in model.modules())
