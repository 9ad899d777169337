"""Numbers of heads and channels: published sizes, and those of the models built."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.architecture import Architecture
from streamline_bench.errors import ArchitectureError, SparsityError
from streamline_bench.methods.width.llm_pruner import LLMPrunerParameters
from streamline_bench.methods.width.width_plan import narrowed_config, plan_widths, prunable
from streamline_bench.modeling import LayerWidths
from streamline_bench.modeling.widths import require_narrowable

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])


def config_of(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, **changes}
    if family == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
        del sizes["num_key_value_heads"], sizes["head_dim"], sizes["intermediate_size"]
    return AutoConfig.for_model(family, **sizes)


LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32,
              "vocab_size": 32000}  # fmt: skip
LLAMA_2_13B = LLAMA_2_7B | {"hidden_size": 5120, "intermediate_size": 13824,
                            "num_hidden_layers": 40, "num_attention_heads": 40,
                            "num_key_value_heads": 40}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8,
                           "vocab_size": 128256}  # fmt: skip
TINY_LLAMA = LLAMA_2_7B | {"hidden_size": 2048, "intermediate_size": 5632,
                           "num_hidden_layers": 22, "num_key_value_heads": 4}  # fmt: skip
QWEN_25_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
              "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
              "tie_word_embeddings": False}  # fmt: skip
QWEN_3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
             "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
             "vocab_size": 151936, "tie_word_embeddings": False}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("llama", LLAMA_2_7B, 0.320),
        ("llama", LLAMA_2_13B, 0.302),
        ("llama", LLAMA_3_8B, 0.354),
        ("qwen2", QWEN_25_7B, 0.371),
        ("qwen3", QWEN_3_8B, 0.354),
    ],
)
def test_ratio_for_a_quarter_of_the_parameters(
    family: str, sizes: dict[str, Any], expected: float
) -> None:
    """With the first four and last two layers left alone."""
    units = prunable(AutoConfig.for_model(family, **sizes))
    depth = sizes["num_hidden_layers"]
    plan = plan_widths(units, range(4, depth - 2), sparsity=0.25)
    assert plan.ratio == pytest.approx(expected, abs=6e-4)
    assert plan.reached == pytest.approx(0.25, abs=0.001)
    assert plan.widths.intermediate_size % 8 == 0
    assert LLMPrunerParameters().layers(depth) == range(4, depth - 2)


@pytest.mark.parametrize(
    ("sizes", "layers", "after"),
    [
        (LLAMA_3_8B, range(4, 30), 6_612_586_496),
        (TINY_LLAMA, range(4, 18), 945_907_712),
    ],
)
def test_published_sizes_at_the_ratio_of_a_quarter(
    sizes: dict[str, Any], layers: range, after: int
) -> None:
    """As printed by the authors' code (more_results/README.md)."""
    plan = plan_widths(prunable(AutoConfig.for_model("llama", **sizes)), layers, ratio=0.25)
    assert plan.total - plan.removed == after


def test_llama_2_7b_at_the_ratio_of_a_quarter() -> None:
    plan = plan_widths(
        prunable(AutoConfig.for_model("llama", **LLAMA_2_7B)), range(4, 30), ratio=0.25
    )
    assert plan.reached == pytest.approx(0.1952, abs=5e-5)
    assert plan.widths == LayerWidths(24, 24, 8256)


@pytest.mark.parametrize("unit", ["kv_group", "q_within"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt", "phi"])
def test_planned_sizes_are_those_of_the_model_built(family: str, unit: Any) -> None:
    config = config_of(family)
    plan = plan_widths(prunable(config, unit), range(1, 5), sparsity=0.2)
    narrow = narrowed_config(config, dict.fromkeys(plan.layers, plan.widths))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(narrow)
    assert sum(p.numel() for p in model.parameters()) == plan.total - plan.removed


def test_channels_make_up_for_heads_being_whole() -> None:
    """One of two groups is half of attention, so fewer channels go than the common ratio says."""
    config = config_of("llama", num_key_value_heads=2)
    plan = plan_widths(prunable(config), range(6), sparsity=0.3, multiple=1)
    assert plan.ratio < 0.5 == plan.head_ratio
    assert plan.channel_ratio < plan.ratio
    assert plan.reached == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_channels_stay_a_multiple(multiple: int) -> None:
    plan = plan_widths(prunable(config_of("llama")), range(6), sparsity=0.3, multiple=multiple)
    assert plan.widths.intermediate_size % multiple == 0
    half_a_step = 6 * multiple * prunable(config_of("llama")).channel_cost / plan.total / 2
    assert abs(plan.reached - 0.3) <= half_a_step + 1e-9


def test_out_of_reach_says_what_is_in_reach() -> None:
    units = prunable(config_of("llama"))
    with pytest.raises(SparsityError, match="out of reach") as caught:
        plan_widths(units, range(1, 5), sparsity=0.9)
    most = float(str(caught.value).split(" to ")[1].split(";")[0])
    plan = plan_widths(units, range(1, 5), sparsity=most - 1e-4)
    assert plan.widths == LayerWidths(2, 1, 8)
    with pytest.raises(SparsityError, match="out of reach"):
        plan_widths(units, range(6), sparsity=1e-5)


def test_protecting_everything() -> None:
    with pytest.raises(SparsityError, match=r"\b6 layers\b.*protect_first"):
        plan_widths(prunable(config_of("llama")), [], sparsity=0.2)


def test_families_without_units() -> None:
    row = Architecture("unheard", query="", down="")
    with pytest.raises(ArchitectureError, match=r"'unheard'.*queries; .*MLP output"):
        require_narrowable(row)


def test_families_of_which_one_kind_goes() -> None:
    mixture = prunable(config_of("mixtral", num_local_experts=2))
    assert (mixture.head_units, mixture.channel_cost) == (4, 0)
    assert mixture.whole(10, 8) == 64
    normed = prunable(config_of("olmo2"))
    assert (normed.head_units, normed.head_cost, normed.channel_cost) == (0, 0, 3 * 32)


def test_a_config_with_numbers_that_the_weights_do_not_have() -> None:
    """OPT does not read num_key_value_heads, so that a stray one changes no weight."""
    config = config_of("opt")
    config.num_key_value_heads = 2
    with pytest.raises(ArchitectureError, match=r"k_proj.*\b32\b.*\b8\b.*num_key_value_heads"):
        prunable(config)
    config.num_key_value_heads = 8
    assert prunable(config).widths.num_key_value_heads == 8


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, math.nan])
def test_shares_that_are_none(sparsity: float) -> None:
    with pytest.raises(SparsityError, match=r"between 0 and 1\b"):
        plan_widths(prunable(config_of("llama")), range(6), sparsity=sparsity)
