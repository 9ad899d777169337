"""Which gradient is named when some are no numbers."""

from __future__ import annotations

import pytest
import torch

from streamline_bench.core.training.loop import gradient_fault

NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}"
        for i in (2, 10)
        for part in ("self_attn.q_proj.weight", "mlp.up.bias")
    ),
    "model.layers.10.mlp.experts.3.w1.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("spoiled", "place"),
    [
        (0, "'model.embed_tokens'"),
        (1, "'self_attn.q_proj' in layer 2"),
        (2, "'self_attn.q_proj' in layer 2"),
        (4, "'self_attn.q_proj' in layer 10"),
        (6, "'model.norm'"),
        (7, "'lm_head'"),
    ],
)
def test_the_topmost_place_is_named(spoiled: int, place: str, value: float) -> None:
    gradients = {name: torch.ones(3, 2) for name in NAMES}
    for name in NAMES[: spoiled + 1]:
        gradients[name][1, 1] = value
    assert gradient_fault(gradients) == place


def test_names_within_a_replacement_and_experts() -> None:
    nan = torch.full((2,), torch.nan)
    assert gradient_fault({"0.mlp.up_proj.weight": nan}) == "'mlp.up_proj' in layer 0"
    assert gradient_fault({"up_proj.weight": nan}) == "'up_proj'"
    assert gradient_fault({NAMES[5]: nan}) == "'mlp.experts.3.w1' in layer 10"


def test_all_finite_or_absent_is_no_fault() -> None:
    assert gradient_fault({"a": torch.ones(2), "b": None}) is None
    assert gradient_fault({}) is None
