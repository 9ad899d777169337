"""Sizes of sliced models: the published figures, from configs alone."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from streamline_bench.errors import SparsityError
from streamline_bench.methods.rotation.slice_plan import SlicedSizes

LLAMA_2_7B: dict[str, Any] = {}
LLAMA_2_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_3_8B = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
QWEN_2_5_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
TINY = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _counted_by_hand(config: Any, k: int) -> int:
    """Weights of a sliced Llama with a head of whole width, written down from the paper."""
    d, f, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * d // config.num_attention_heads
    readers = k * (d + 2 * kv) + 2 * k * f
    inner = readers + d * k + k * k + f * k + k * k
    last = readers + d * k + k * k + f * d + k * d
    return config.vocab_size * (k + d) + (depth - 1) * inner + last


@pytest.mark.parametrize(
    ("entries", "slicing", "removed"),
    [
        (LLAMA_2_7B, 0.25, 0.153),
        (LLAMA_2_7B, 0.30, 0.215),
        (LLAMA_2_7B, 0.35, 0.275),
        (LLAMA_2_13B, 0.25, 0.1545),
        (LLAMA_3_8B, 0.25, 0.156),
    ],
)
def test_parameters_removed_by_a_slicing(
    entries: dict[str, Any], slicing: float, removed: float
) -> None:
    config = LlamaConfig(**entries)
    plan = SlicedSizes(config).of_slicing(slicing)
    assert plan.reached == pytest.approx(removed, abs=6e-4)
    assert plan.width % 8 == 0
    assert plan.parameters == _counted_by_hand(config, plan.width)


@pytest.mark.parametrize(
    ("family", "entries", "width", "slicing"),
    [
        ("llama", LLAMA_2_7B, 2744, 0.330),
        ("llama", LLAMA_3_8B, 2728, 0.334),
        ("qwen2", QWEN_2_5_7B, 2440, 0.319),
        ("qwen3", QWEN_3_8B, 2696, 0.342),
    ],
)
def test_width_that_removes_a_quarter_of_the_parameters(
    family: str, entries: dict[str, Any], width: int, slicing: float
) -> None:
    plan = SlicedSizes(AutoConfig.for_model(family, **entries)).of_sparsity(0.25)
    assert plan.width == width
    assert plan.slicing == pytest.approx(slicing, abs=6e-4)
    assert plan.reached == pytest.approx(0.25, abs=2e-3)


def test_a_quarter_of_llama_2_13b_lies_between_two_widths() -> None:
    """0.328 of the channels is 3440 of them; 3432 come as near from the other side."""
    config = LlamaConfig(**LLAMA_2_13B)
    total = SlicedSizes(config).total
    below, above = (1 - _counted_by_hand(config, width) / total for width in (3440, 3432))
    assert (round(below, 4), round(above, 4)) == (0.2491, 0.2509)
    assert 0.25 - below == pytest.approx(above - 0.25, abs=5e-5)
    assert pytest.approx(0.328, abs=5e-4) == 1 - 3440 / 5120
    plan = SlicedSizes(config).of_sparsity(0.25)
    assert plan.width in (3432, 3440)
    assert abs(plan.reached - 0.25) == min(0.25 - below, above - 0.25)


def test_the_width_is_the_nearest_of_all() -> None:
    config = LlamaConfig(**TINY)
    sizes = SlicedSizes(config, round_to=1)
    total = sizes.total
    for sparsity in (0.1, 0.25, 0.5, 0.8):
        best = min(
            range(1, 32), key=lambda k: abs(1 - _counted_by_hand(config, k) / total - sparsity)
        )
        assert sizes.of_sparsity(sparsity).width == best


def test_widths_are_rounded_down() -> None:
    sizes = SlicedSizes(LlamaConfig(**TINY))
    assert sizes.of_slicing(0.0).width == 32
    assert sizes.of_slicing(0.25).width == 24
    assert sizes.of_slicing(0.30).width == 16
    with pytest.raises(SparsityError, match="leaves no channel of 32 in steps of 8"):
        sizes.of_slicing(0.8)


def test_tied_embeddings_become_two() -> None:
    tied = LlamaConfig(**TINY, tie_word_embeddings=True)
    loose = LlamaConfig(**TINY)
    assert (
        SlicedSizes(tied).of_slicing(0.25).parameters
        == SlicedSizes(loose).of_slicing(0.25).parameters
    )
    assert SlicedSizes(loose).total - SlicedSizes(tied).total == 100 * 32


def test_biases_of_layer_norms_reach_the_head() -> None:
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **TINY}
    config = AutoConfig.for_model("opt", **opt)
    assert SlicedSizes(config).rotations(24).head_bias
    assert not SlicedSizes(LlamaConfig(**TINY)).rotations(24).head_bias
    assert SlicedSizes(config, slice_head=True).rotations(24).head_width == 24


def test_what_cannot_be_reached_is_refused() -> None:
    sizes = SlicedSizes(LlamaConfig(**TINY))
    with pytest.raises(SparsityError, match=r"0\.99 is out of reach: .* reaches 0\."):
        sizes.of_sparsity(0.99)
    tied = SlicedSizes(LlamaConfig(**{**TINY, "tie_word_embeddings": True}), round_to=1)
    with pytest.raises(SparsityError, match=r"reaches shares above 0 up to 0\.\d+; choose"):
        tied.of_sparsity(0.99)
    with pytest.raises(SparsityError, match="32 channels cannot be sliced in steps of 64"):
        SlicedSizes(LlamaConfig(**TINY), round_to=64).of_sparsity(0.25)
