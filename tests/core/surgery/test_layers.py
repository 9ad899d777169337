"""Removing layers in memory: the acceptance tests, for every family and special feature."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_config
from surgery_in_memory import keep_layers
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.surgery import block_keep, check_keep, pruned_config
from streamline_bench.errors import ArchitectureError, SparsityError

KEEPS = {"block": [0, 1, 4, 5], "scattered": [0, 2, 3, 5], "head": [2, 3, 4], "single": [3]}


@pytest.fixture(params=KEEPS.values(), ids=KEEPS.keys())
def keep(request: pytest.FixtureRequest) -> list[int]:
    return request.param


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def bypassed(model: Any, dropped: set[int], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the intact model when the dropped layers hand on what they are given."""

    def identity(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = decoder_layers(model)
    handles = [layers[i].register_forward_hook(identity, with_kwargs=True) for i in dropped]
    try:
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def remapped(model: Any, keep: list[int]) -> dict[str, torch.Tensor]:
    pattern = re.compile(re.escape(architecture_of(model.config).layers) + r"\.(\d+)\.")
    state = {}
    for name, tensor in model.state_dict().items():
        match = pattern.match(name)
        if match is None:
            state[name] = tensor
        elif int(match[1]) in keep:
            head, tail = name[: match.start(1)], name[match.end(1) :]
            state[f"{head}{keep.index(int(match[1]))}{tail}"] = tensor
    return state


def test_equals_the_intact_model_with_the_layers_bypassed(
    variant: str, keep: list[int], random_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model = random_model(variant)
    dense = logits(model, token_ids)
    expected = bypassed(model, set(range(6)) - set(keep), token_ids)
    assert (dense - expected).abs().max() > 0.05  # the layers matter
    keep_layers(model, keep)
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=0, atol=0)


def test_equals_a_fresh_model_with_remapped_weights(
    variant: str, keep: list[int], random_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model = random_model(variant)
    config = pruned_config(model.config, keep)
    rebuilt = type(config).from_dict(config.to_dict())
    fresh = AutoModelForCausalLM.from_config(rebuilt).eval()
    fresh.load_state_dict(remapped(model, keep), strict=True)
    keep_layers(model, keep)
    torch.testing.assert_close(logits(model, token_ids), logits(fresh, token_ids), rtol=0, atol=0)


def test_cache_equals_no_cache(
    variant: str, keep: list[int], random_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model = random_model(variant)
    keep_layers(model, keep)
    cache, steps = None, []
    with torch.no_grad():
        for position in range(token_ids.shape[1]):
            out = model(
                token_ids[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, token_ids), rtol=1e-4, atol=1e-4)


def test_plain_transformers_loads_what_it_saves(
    variant: str,
    keep: list[int],
    random_model: Callable[..., Any],
    token_ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = random_model(variant)
    keep_layers(model, keep)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: found for key, found in report.items() if found} == {}
    assert loaded.config.num_hidden_layers == len(keep)
    torch.testing.assert_close(logits(loaded, token_ids), logits(model, token_ids), rtol=0, atol=0)


def test_generates_what_repeated_forward_passes_choose(
    variant: str, keep: list[int], random_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model = random_model(variant)
    keep_layers(model, keep)
    prompt = token_ids[:1, :5]
    chosen = prompt
    for _ in range(8):
        following = logits(model, chosen)[:, -1:].argmax(-1)
        chosen = torch.cat([chosen, following], dim=1)
    mask = torch.ones_like(prompt)
    found = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert found.tolist() == chosen.tolist()


def test_every_module_sees_the_new_config(random_model: Callable[..., Any]) -> None:
    model = random_model("gemma3_text")
    before = model.config
    keep_layers(model, [0, 1, 4, 5])
    assert before.num_hidden_layers == 6
    assert len(before.layer_types) == 6
    held = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert held == {id(model.config)}
    assert [layer.self_attn.layer_idx for layer in decoder_layers(model)] == [0, 1, 2, 3]


def test_attention_implementation_stays(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    model.set_attn_implementation("eager")
    keep_layers(model, [0, 5])
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("variant_name", "keep", "expected"),
    [
        ("qwen2", [0, 2, 4, 5], {"max_window_layers": 2}),
        ("qwen3_moe", [0, 1, 4, 5], {"mlp_only_layers": [1, 2], "decoder_sparse_step": 1}),
        # period 2: layers 0, 2, 4 are dense by the rule, 3 by the list; 1 and 5 are mixtures
        ("qwen3_moe-period", [0, 1, 3, 5], {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1}),
        ("deepseek_v3", [1, 2, 3], {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}),
        ("deepseek_v3", [3, 4], {"first_k_dense_replace": 0}),
        ("smollm3", [1, 2, 5], {"no_rope_layers": [0, 1, 0]}),
        ("gpt2", [1, 2], {"n_layer": 2, "num_hidden_layers": 2}),
    ],
)
def test_config_entries_follow_the_layers(
    variant_name: str,
    keep: list[int],
    expected: dict[str, Any],
    random_model: Callable[..., Any],
) -> None:
    config = pruned_config(random_model(variant_name).config, keep)
    assert {key: getattr(config, key) for key in expected} == expected


def test_a_layer_whose_keys_and_values_others_reuse_must_stay() -> None:
    """The last two layers reuse those of layers 2 and 3, the last of their types before them."""
    config = tiny_config("gemma3n_text", num_kv_shared_layers=2)
    assert pruned_config(config, [1, 2, 3, 5]).num_kv_shared_layers == 1
    for gone in (2, 3):
        keep = [index for index in range(6) if index != gone]
        with pytest.raises(ArchitectureError, match=rf"Layers {gone} cannot.*full_length_kv"):
            pruned_config(config, keep)


def test_scaling_by_layer_index_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ArchitectureError, match="scaled by the layer's index"):
        pruned_config(config, [0, 2])


def test_a_list_per_layer_that_the_table_does_not_know_is_refused() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=3, layer_widths=[1, 2, 3])
    with pytest.raises(ArchitectureError, match="layer_widths"):
        pruned_config(config, [0, 2])


def test_a_list_of_the_wrong_length_is_refused() -> None:
    config = AutoConfig.for_model("smollm3", num_hidden_layers=4)
    config.no_rope_layers = [1, 0]
    with pytest.raises(ArchitectureError, match=r"no_rope_layers has 2 items.*config\.json"):
        pruned_config(config, [0, 2])


def test_block_keep() -> None:
    assert block_keep(6, 2, 3) == [0, 1, 5]
    assert block_keep(6, 0, 1) == [1, 2, 3, 4, 5]
    assert block_keep(6, 4, 2) == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [0, -1, 6, 7])
def test_block_keep_refuses_impossible_sizes(n: int) -> None:
    with pytest.raises(SparsityError, match=f"{n} of 6 layers.*1 to 5"):
        block_keep(6, 0, n)


@pytest.mark.parametrize("start", [-1, 5])
def test_block_keep_refuses_blocks_outside_the_model(start: int) -> None:
    with pytest.raises(SparsityError, match=f"cannot start at layer {start} of 6"):
        block_keep(6, start, 2)


@pytest.mark.parametrize("keep", [[], [1, 1], [2, 1], [-1, 0], [0, 6]])
def test_check_keep_refuses(keep: list[int]) -> None:
    with pytest.raises(SparsityError, match="layers to keep"):
        check_keep(6, keep)
