"""Layers removed from one type of each kind: the rest computes what it did with them bypassed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_config, tiny_model
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.architecture_guard import layer_kinds, tensors_by_layer
from streamline_bench.core.surgery import pruned_config
from streamline_bench.core.text_models import ensure_causal_lm
from streamline_bench.errors import ArchitectureError

KEEP = [0, 1, 4, 5]
EXACT = {
    "starcoder2": "a plain decoder",
    "cohere": "attention and MLP in parallel",
    "ctrl": "modules with names of their own",
    "mamba": "a state-space model",
    "mamba2": "a setting whose default is a tuple",
    "bamba": "attention among Mamba layers, as a list of indices",
    "qwen3_next": "linear attention",
    "lfm2": "short convolutions",
    "olmo3": "a list with one item per layer",
    "gpt_neo": "a nested pattern with a count",
    "recurrent_gemma": "a pattern that repeats",
    "nemotron_h": "a depth that is the length of a list",
    "glm4_moe": "dense first layers, shared experts, and layers for multi-token prediction",
    "gemma4_text": "widths of some layers of their own",
    "minicpm3": "a constant computed from the depth",
    "minimax": "stored decays computed from index and depth",
    "longcat_flash": "two attention blocks in a layer",
}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def bypassed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the intact model when the removed layers hand on what they are given."""

    def identity(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = decoder_layers(model)
    gone = [layer for index, layer in enumerate(layers) if index not in KEEP]
    handles = [layer.register_forward_hook(identity, with_kwargs=True) for layer in gone]
    try:
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


def kept_state(model: Any) -> dict[str, torch.Tensor]:
    layers = re.escape(architecture_of(model.config).layers)
    state = {}
    for name, tensor in model.state_dict().items():
        match = re.match(rf"{layers}\.(\d+)(\..*)", name)
        if match is None:
            state[name] = tensor
        elif int(match[1]) in KEEP:
            place = KEEP.index(int(match[1]))
            state[f"{architecture_of(model.config).layers}.{place}{match[2]}"] = tensor
    return state


@pytest.mark.parametrize("model_type", EXACT)
def test_the_rest_computes_what_it_did(model_type: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    pruned = AutoModelForCausalLM.from_config(pruned_config(model.config, KEEP))
    pruned.load_state_dict(kept_state(model))
    pruned.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    found = logits(loaded.eval(), ids)
    assert torch.equal(found, bypassed(model, ids))
    assert not torch.equal(found, logits(model, ids))
    loaded.generation_config.eos_token_id = None
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (loaded.generate(ids, use_cache=use, **how) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_tensors_outside_the_layers_may_have_a_part_for_each(ids: torch.Tensor) -> None:
    """Gemma 3n's embeddings of each layer: a hand-built model keeps those of the layers kept."""
    model = tiny_model("gemma3n_text")
    config = pruned_config(model.config, KEEP)
    row = architecture_of(config)
    parts = tensors_by_layer(model.config, config, row)
    assert parts == {
        "model.embed_tokens_per_layer.weight": 1,
        "model.per_layer_model_projection.weight": 0,
    }
    state = kept_state(model)
    for name, dimension in parts.items():
        chunks = state[name].chunk(6, dimension)
        state[name] = torch.cat([chunks[index] for index in KEEP], dimension)
    pruned = AutoModelForCausalLM.from_config(config).eval()
    pruned.load_state_dict(state)
    torch.testing.assert_close(logits(pruned, ids), bypassed(model, ids), rtol=0, atol=1e-6)


def test_what_a_layer_hands_to_the_next_beside_its_states(ids: torch.Tensor) -> None:
    """ZAYA's routers read the one before; a hand-built model goes by the layers that are left."""
    model = tiny_model("zaya")
    pruned = AutoModelForCausalLM.from_config(pruned_config(model.config, KEEP)).eval()
    pruned.load_state_dict(kept_state(model))
    keep_layers(model, KEEP)
    assert torch.equal(logits(pruned, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("model_type", "keep", "reason"),
    [
        ("diffllama", KEEP, r"Layers 2, 3 .* in layer 4, self_attn\.lambda_init"),
        ("beam", KEEP, r"in layer 4, attn_residual_add_idx"),
        ("jamba", [1, 2, 3, 5], "in layer"),
        ("qwen3_next", [0, 2, 4], "needs an attention layer"),
        ("zamba2", KEEP, r"in layer 5, shared_transformer"),
        ("hrm_text", KEEP, r"several lists .*L_module\.layers, model\.H_module\.layers"),
        ("xlm", KEEP, "both directions"),
        ("trocr", KEEP, "attend to an encoder"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_named(model_type: str, keep: list[int], reason: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"'{model_type}'.*{reason}|{reason}"):
        pruned_config(tiny_config(model_type), keep)


def test_a_layer_whose_choice_others_share_must_stay() -> None:
    """GLM-5's layers of the kind ``shared`` attend to what the last ``full`` one before chose."""
    kinds = ["full", "full", "shared", "shared", "full", "shared"]
    config = tiny_config("glm_moe_dsa", indexer_types=kinds)
    assert pruned_config(config, [0, 1, 3, 4]).indexer_types == ["full", "full", "shared", "full"]
    for keep, layer in ([0, 2, 3, 4], 2), ([1, 2, 3, 5], 5):
        with pytest.raises(ArchitectureError, match=rf"in layer {layer}, .*indexer_types"):
            pruned_config(config, keep)


def test_lists_of_layers_that_count_from_one() -> None:
    """Qwen4's embeddings of n-grams go into layers 0 and 4, which it calls 1 and 5."""
    config = tiny_config("qwen4_exp_text", ple_layer_ids=[1, 5], ngram_vocab_size_base=50,
                         heads_per_ngram=2, make_ngram_vocab_size_divisible_by=2,
                         split_ngram_parts=2, eos_token_id=2)  # fmt: skip
    assert pruned_config(config, [0, 3, 4, 5]).ple_layer_ids == [1, 3]
    with pytest.raises(ArchitectureError, match=r"in layer 4, .*ple_layer_index"):
        pruned_config(config, [2, 3, 4, 5])


def test_lists_that_name_the_layer_whose_keys_and_values_another_uses() -> None:
    config = tiny_config("mistral_large4_text", kv_source_layers=[0, 1, 1, 3, 3, 5])
    ensure_causal_lm(config, "mistral_large4")
    assert pruned_config(config, [0, 3, 4, 5]).kv_source_layers == [0, 1, 1, 3]
    with pytest.raises(ArchitectureError, match="Layers 2, 3 cannot be removed"):
        pruned_config(config, KEEP)


def test_lists_that_go_beyond_the_layers() -> None:
    """Some name the layers for multi-token prediction as well, which a result does not have."""
    thetas = [1e4, 0.0, 3e4, 4e4, 5e4, 6e4]
    config = tiny_config("granite_swa", layer_rope_theta=[*thetas, 7e4])
    assert pruned_config(config, KEEP).layer_rope_theta == [1e4, 0.0, 5e4, 6e4]


def test_periods_are_changed_where_that_says_the_same() -> None:
    """Jamba has no list of its layers: a removal must leave them periodic."""
    assert pruned_config(tiny_config("jamba"), [0, 1, 4, 5]).attn_layer_period == 2
    config = pruned_config(tiny_config("jamba"), [0, 1, 2, 4])  # one attention layer is left
    kinds = [config.layers_block_type[index] for index in range(4)]
    assert [kind == kinds[1] for kind in kinds] == [False, True, False, False]


def test_the_kinds_of_layers_are_named() -> None:
    kinds = layer_kinds(tiny_config("qwen3_next"))
    assert kinds[:2] == ["linear_attention", "full_attention"]
    moe = layer_kinds(tiny_config("qwen2_moe"))
    assert moe[0] != moe[1] == moe[4]
    assert len(set(layer_kinds(tiny_config("bloom")))) == 1
