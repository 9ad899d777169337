"""Layers with widths of their own: as the family would build them, cached, saved and generating."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.architecture import ARCHITECTURES, Architecture, decoder_layers
from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.modeling import (
    Attachment,
    LayerWidths,
    StreamlineConfig,
    register,
    streamline_config,
)
from streamline_bench.modeling.widths import projection_parts, require_narrowable

register()

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
_MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXTRA |= {
    "gpt2": {"n_inner": 48},
    "mixtral": _MIXTURE,
    "gpt_oss": {**_MIXTURE, "sliding_window": 4},
    "qwen3_moe": {**_MIXTURE, "moe_intermediate_size": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 6, "head_dim": 4,
    },
}  # fmt: skip
"""In deepseek_v3 values have another width than keys, and both another one than the rotary part."""

FAMILIES = sorted(ARCHITECTURES)
GROUPED = [LayerWidths(4, 2, 48), LayerWidths(2, 1, 20), LayerWidths(2, 2, 33)]
ALL_HEADS = [LayerWidths(4, 4, 48), LayerWidths(1, 1, 20), LayerWidths(3, 3, 33)]
MIXTURES = ("gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3")
UNGROUPED = ("opt", "gpt2", "gpt_neox", "deepseek_v3")
"""These have as many key-value heads as heads."""


def host_config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **EXTRA.get(family, {}), **changes})


def possible(family: str, widths: LayerWidths) -> LayerWidths:
    """Put the host's own number where the family allows no other."""
    if family == "olmo2":
        return LayerWidths(4, 2, widths.intermediate_size)
    if family in MIXTURES:
        return replace(widths, intermediate_size=48)
    return widths


def widths_for(family: str) -> list[LayerWidths]:
    widths = ALL_HEADS if family in UNGROUPED else GROUPED
    return [possible(family, layer) for layer in widths]


def build(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval()


def narrow(family: str, attachments: Any = ()) -> Any:
    config = streamline_config(host_config(family), attachments, layer_widths=widths_for(family))
    return build(config)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_widths_are_what_the_family_builds_itself(family: str, ids: torch.Tensor) -> None:
    if family in ("opt", "gpt2", "gpt_neox"):
        widths = LayerWidths(4, 4, 20)  # the family itself shares the hidden size among its heads
    else:
        widths = possible(family, LayerWidths(2, 2 if family in UNGROUPED else 1, 20))
    model = build(streamline_config(host_config(family), layer_widths=[widths] * 3))
    entries = widths.entries(ARCHITECTURES[family])
    stock = AutoModelForCausalLM.from_config(host_config(family, **entries)).eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_other_modules_of_a_layer_keep_widths_of_the_same_name(ids: torch.Tensor) -> None:
    """A Mamba mixer has an ``intermediate_size`` and heads of its own."""
    model = tiny_model("bamba", 2, attn_layer_indices=[1])
    config = copy.deepcopy(model.config)
    mixer = vars(model.model.layers[0].mamba).items()
    before = {name: value for name, value in mixer if isinstance(value, int)}
    widths = [LayerWidths(4, 2, 20)] * 2
    narrow = build(streamline_config(config, layer_widths=widths))
    after = vars(narrow.model.layers[0].mamba)
    assert {name: after[name] for name in before} == before
    assert narrow.model.layers[0].feed_forward.intermediate_size == 20
    stock = build(copy.copy(config).from_dict({**config.to_dict(), "intermediate_size": 20}))
    stock.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(narrow(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_full_forwards(family: str, ids: torch.Tensor) -> None:
    model = narrow(family, [Attachment(-1, "swiglu_res", 16), Attachment(1, "ffn", 20)])
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    current = ids
    with torch.no_grad():
        cached = model(ids, use_cache=True)
        for _ in range(8):
            full = model(current, use_cache=False).logits[:, -1]
            torch.testing.assert_close(cached.logits[:, -1], full, rtol=1e-4, atol=1e-5)
            token = full.argmax(-1, keepdim=True)
            current = torch.cat([current, token], dim=1)
            cached = model(token, past_key_values=cached.past_key_values, use_cache=True)
    assert torch.equal(generated, current)
    shapes = [layer.keys.shape[1] for layer in cached.past_key_values.layers]
    latent = family == "deepseek_v3"  # it caches what all heads share
    assert shapes == [1 if latent else w.num_key_value_heads for w in widths_for(family)]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = narrow(family)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layer_widths"] == [w.to_dict() for w in widths_for(family)]
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_copied_pickled_and_another_attention(family: str, ids: torch.Tensor) -> None:
    model = narrow(family)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, logits)
        model.set_attn_implementation("eager")
        eager = model(ids, output_attentions=True)
        torch.testing.assert_close(eager.logits, logits, rtol=1e-4, atol=1e-5)
    assert [a.shape[1] for a in eager.attentions] == [
        w.num_attention_heads for w in widths_for(family)
    ]


def test_gradients_and_fresh_weights() -> None:
    """Resized projections are initialised by the host's rule, not left as memory held them."""
    config = streamline_config(
        host_config("llama", initializer_range=0.5), layer_widths=[LayerWidths(2, 2, 400)] * 3
    )
    model = AutoModelForCausalLM.from_config(config)
    for layer in decoder_layers(model):
        assert 0.45 < float(layer.mlp.down_proj.weight.detach().std()) < 0.55
    model.activation_checkpointing_enable()
    model.train()
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_parts_cover_fused_projections_without_gaps() -> None:
    parts = projection_parts(ARCHITECTURES["phi3"], LayerWidths(4, 2, 48), host_config("phi3"))
    rows = [(p.module, p.offset, p.count * p.size) for p in parts if p.axis == 0]
    assert rows == [
        ("self_attn.qkv_proj", 0, 32),
        ("self_attn.qkv_proj", 32, 16),
        ("self_attn.qkv_proj", 48, 16),
        ("mlp.gate_up_proj", 0, 48),
        ("mlp.gate_up_proj", 48, 48),
    ]


def test_rows_without_roles_are_refused() -> None:
    row = Architecture("unheard", query="", key="", value="", up="", down="")
    with pytest.raises(
        ArchitectureError, match=r"'unheard'.*queries, keys, values; .*MLP input, MLP output"
    ):
        require_narrowable(row)


@pytest.mark.parametrize(
    ("family", "widths", "reason"),
    [
        ("olmo2", LayerWidths(2, 1, 48), "all heads at once"),
        ("mixtral", LayerWidths(4, 2, 20), "mixtures of experts"),
    ],
)
def test_widths_that_the_family_cannot_have(family: str, widths: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{family}'.*{reason}"):
        streamline_config(host_config(family), layer_widths=[widths] * 3)


@pytest.mark.parametrize(
    ("widths", "problem"),
    [
        ([{"num_attention_heads": 2}] * 3, "exactly"),
        ([LayerWidths(2, 1, 8)] * 2, "2 entries for 3 layers"),
        ([LayerWidths(3, 2, 8)] * 3, "3 heads for 2"),
        ([LayerWidths(2, 1, 0)] * 3, "intermediate_size=0"),
        ([LayerWidths(2, 1, "8")] * 3, "intermediate_size='8'"),  # type: ignore[arg-type]
        (["wide"] * 3, "'wide'"),
    ],
)
def test_bad_widths(widths: Any, problem: str) -> None:
    entries = [w.to_dict() if isinstance(w, LayerWidths) else w for w in widths]
    with pytest.raises(CheckpointError, match=problem):
        StreamlineConfig(host_model_type="llama", **{**SIZES, "layer_widths": entries})
