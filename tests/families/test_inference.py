"""Inferred rows against the table written by hand, and against what is known of other families."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from families.tiny_models import tiny_config

from streamline_bench.core.architecture import ARCHITECTURES, architecture_of
from streamline_bench.core.architecture_inference import as_object, infer
from streamline_bench.errors import ArchitectureError

NOT_KNOWN = {
    "inferred": "the mark itself",
    "any_heads": "that another family has the same modules and fewer rules",
    "fixed_heads": "how the code splits a projection into heads; inference is more careful",
    "notes": "remarks",
    "embedding_output": "a projection that some models have behind their embeddings",
    "fused_by_head": "how the code splits a fused projection",
    "latent": "how the code splits low-rank projections into heads",
    "head_vectors": "which vectors have one number per head",
    "refused": "scalings in the code of a pass; the guard does not see them",
    "stored_as": "names that stored tensors had before the type was in transformers",
}
"""Fields that looking at a model does not give, and why."""

OF_THE_CONFIG = ("layer_lists", "index_lists", "prefix_counts", "periods", "extra_layers")
"""Fields that name entries: of a config that has none of them, none are found."""

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 48},  # else the width is four times the hidden size, and has no entry
    "opt": {"word_embed_proj_dim": 24},
    "qwen3_moe": {"mlp_only_layers": [1, 4]},
    "deepseek_v3": {"first_k_dense_replace": 2},
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_inference_gives_back_the_rows_of_the_table(family: str) -> None:
    row = ARCHITECTURES[family]
    found = infer(tiny_config(family, **SETTINGS.get(family, {})))
    names = {f.name for f in fields(row)} - NOT_KNOWN.keys() - {*OF_THE_CONFIG, "buffers"}
    expected = {name: getattr(row, name) for name in names}
    assert {name: getattr(found, name) for name in names} == expected
    for name in ("layer_lists", "index_lists", "prefix_counts"):
        assert set(getattr(found, name)) <= set(getattr(row, name))
    # A longer ending is as good: it matches the same tensors.
    assert all(any(f".layers.0.mlp.gate{e}".endswith(m) or e.endswith(m) for m in found.buffers)
               for e in row.buffers if "attn" not in e and "attention" not in e)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bloom", {"final_norm": "transformer.ln_f", "fused_qkv": "query_key_value",
                   "embeddings": ("transformer.word_embeddings",
                                  "transformer.word_embeddings_layernorm")}),
        ("cohere", {"parallel_residual": True, "input_norm": "input_layernorm", "mlp_norm": ""}),
        ("glm4", {"fused_gate_up": "gate_up_proj", "mlp_output_norm": "post_mlp_layernorm",
                  "attention_output_norm": "post_self_attn_layernorm"}),
        ("dbrx", {"attention": "norm_attn_norm.attn", "experts": "experts", "router": "router"}),
        ("gpt_neo", {"attention": "attn.attention", "query": "q_proj", "depth_key": "num_layers"}),
        ("qwen3_next", {"attention": "", "query": "", "mlp": "mlp", "router": "gate",
                        "layer_lists": ("layer_types",)}),
        ("mamba", {"attention": "", "down": "", "final_norm": "backbone.norm_f"}),
        ("lfm2_moe", {"mlp": "feed_forward", "prefix_counts": ("num_dense_layers",)}),
        ("glm4_moe", {"extra_layers": "num_nextn_predict_layers",
                      "prefix_counts": ("first_k_dense_replace",)}),
    ],
)  # fmt: skip
def test_other_families(family: str, expected: dict[str, Any]) -> None:
    row = infer(tiny_config(family))
    assert row.inferred
    assert {key: getattr(row, key) for key in expected} == expected


def test_each_config_is_looked_at_once() -> None:
    config = tiny_config("starcoder2")
    assert architecture_of(config) is architecture_of(config)
    assert architecture_of(config.to_dict()) == architecture_of(config)


def test_parts_of_layers_that_are_stored_elsewhere_are_named() -> None:
    with pytest.raises(ArchitectureError, match=r"'inkling2_text'.*attn_res"):
        infer(tiny_config("inkling2_text"))


def test_an_infinity_in_a_config_file_is_read(tmp_path: Path) -> None:
    """JSON has none; transformers writes a mapping for it."""
    tiny_config("mamba2").save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert entries["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert as_object(entries).time_step_limit[1] == float("inf")
    assert architecture_of(entries).layers == "backbone.layers"
