"""Layers without attention or MLP: the stream by hand, caches, saved folders, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.forward import hidden_of, with_hidden
from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.modeling import RemovedSublayers, register, streamline_config

register()

FAMILIES: dict[str, tuple[dict[str, Any], RemovedSublayers]] = {
    "mistral": ({"sliding_window": 4}, RemovedSublayers((0, 2), (1,))),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        RemovedSublayers((0, 2), (3,)),
    ),
    "qwen3": ({}, RemovedSublayers((0, 1, 2), ())),
    "gemma3_text": (
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        RemovedSublayers((0, 3), (2,)),
    ),
    "olmo2": ({}, RemovedSublayers((0,), (1, 2))),
    "gpt2": ({}, RemovedSublayers((0,), (1, 2))),
    "mixtral": ({}, RemovedSublayers((0, 2), ())),
}
"""Windows, alternating kinds of attention, norms behind sub-layers, learned positions, experts."""


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def without(dense: Any, removed: RemovedSublayers) -> Any:
    """Return the model of a config without some sub-layers, with the dense model's weights."""
    config = streamline_config(dense.config, removed_sublayers=removed)
    model = AutoModelForCausalLM.from_config(config).to(next(dense.parameters()).dtype).eval()
    missing, _ = model.load_state_dict(dense.state_dict(), strict=False)
    assert not missing
    model.generation_config.eos_token_id = None
    return model


def silence(dense: Any, removed: RemovedSublayers) -> None:
    """Let sub-layers of the dense model give zeros, behind their norms."""
    row = architecture_of(dense.config)

    def zeros(module: Any, args: Any, output: Any) -> Any:
        return with_hidden(output, torch.zeros_like(hidden_of(output)))

    ends = {
        "attention": row.attention_output_norm or row.attention,
        "mlp": row.mlp_output_norm or row.mlp,
    }
    for layer, kind in removed:
        decoder_layers(dense)[layer].get_submodule(ends[kind]).register_forward_hook(zeros)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_caches_and_folders(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    changes, removed = FAMILIES[family]
    dense = tiny_model(family, 4, **changes)
    model = without(dense, removed)
    silence(dense, removed)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, dense(ids).logits)
        model.save_pretrained(tmp_path)
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again.eval()(ids).logits, logits)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    options |= {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(ids, **options)
    whole = dense.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    filled = [each for each in cached.past_key_values.layers if each.keys is not None]
    assert len(filled) == 4 - len(removed.attention)


def test_the_stream_by_hand(ids: torch.Tensor) -> None:
    """Llama in float64, written out: what a removed sub-layer would add is left out."""
    dense = tiny_model("llama", 4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    removed = RemovedSublayers((0, 2), (1,))
    model = without(dense.double(), removed)
    weights, config = model.state_dict(), model.config
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # transformers' goes down to float32
            module.forward = lambda states, gain=module.weight: _norm(states, gain, config)
    stream = weights["model.embed_tokens.weight"][ids]
    for layer in range(4):
        of = {n.removeprefix(f"model.layers.{layer}."): w for n, w in weights.items()}
        if layer not in removed.attention:
            normed = _norm(stream, of["input_layernorm.weight"], config)
            stream = stream + _attention(normed, of, config)
        if layer not in removed.mlp:
            normed = _norm(stream, of["post_attention_layernorm.weight"], config)
            gate = torch.nn.functional.silu(normed @ of["mlp.gate_proj.weight"].T)
            up = normed @ of["mlp.up_proj.weight"].T
            stream = stream + (gate * up) @ of["mlp.down_proj.weight"].T
    logits = _norm(stream, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T
    with torch.no_grad():  # transformers' sines are float32
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)


def _norm(states: torch.Tensor, gain: torch.Tensor, config: Any) -> torch.Tensor:
    return states / (states.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * gain


def _attention(states: torch.Tensor, of: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    batch, length, _ = states.shape
    size, half = config.head_dim, config.head_dim // 2
    base = config.rope_parameters["rope_theta"]
    turns = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * turns
    rotation = torch.polar(torch.ones_like(angles), angles)

    def heads(name: str, *, turned: bool) -> torch.Tensor:
        found = (states @ of[f"self_attn.{name}.weight"].T).view(batch, length, -1, size)
        found = found.transpose(1, 2)
        if turned:
            complex_ = torch.complex(found[..., :half], found[..., half:]) * rotation
            found = torch.cat([complex_.real, complex_.imag], -1)
        return found

    query = heads("q_proj", turned=True)
    shared = config.num_attention_heads // config.num_key_value_heads
    key = heads("k_proj", turned=True).repeat_interleave(shared, 1)
    value = heads("v_proj", turned=False).repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) / math.sqrt(size)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ value
    return mixed.transpose(1, 2).reshape(batch, length, -1) @ of["self_attn.o_proj.weight"].T


def test_nothing_removed_is_the_dense_model(ids: torch.Tensor) -> None:
    dense = tiny_model("llama", 3)
    model = without(dense, RemovedSublayers())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
    assert model.num_parameters() == dense.num_parameters()


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"attention": [4], "mlp": []}, r"0 \.\. 3"),
        ({"attention": [1], "mlp": [1]}, "at most once"),
        ({"attention": [1]}, "exactly"),
        ({"attention": ["1"], "mlp": []}, "exactly"),
        ({"attention": [0, 1, 2, 3], "mlp": []}, "keep one"),
    ],
)
def test_wrong_entries_are_refused(entry: dict[str, Any], named: str) -> None:
    host = AutoConfig.for_model("llama", num_hidden_layers=4).to_dict()
    with pytest.raises(CheckpointError, match=named):
        streamline_config(
            AutoConfig.for_model(**host),
            removed_sublayers=_Entry(entry),  # type: ignore[arg-type]
        )


class _Entry(dict[str, Any]):
    def to_dict(self) -> dict[str, Any]:
        return dict(self)


@pytest.mark.parametrize(
    ("family", "kind", "reason"),
    [("phi", "attention", "same input"), ("opt", "mlp", "MLP"), ("mixtral", "mlp", "experts")],
)
def test_families_without_two_sublayers_are_refused_by_name(
    family: str, kind: str, reason: str
) -> None:
    host = tiny_model(family, 4).config
    with pytest.raises(ArchitectureError, match=f"'{family}'.*{reason}"):
        streamline_config(host, removed_sublayers=RemovedSublayers(**{kind: (1,)}))
