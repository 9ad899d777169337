"""Steps are named by content: what the files hold, not what they are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.harness.trunk.stack import (
    Stack,
    legs_of,
    read_stack,
    root_difference,
    walks_of,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 2, "moe_intermediate_size": 16},
}


def names(stack: Stack) -> list[str]:
    return [step.name for step in stack.steps]


def changed(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy with an edited config."""
    copy = Path(shutil.copytree(folder, target))
    config = json.loads((copy / "config.json").read_text())
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_block_leaves_the_layers_below_it_as_they_were(
    family: str, make_tiny_model: Callable[..., Path], make_variant: Callable[..., Path]
) -> None:
    dense = make_tiny_model(family, **FAMILIES[family])
    stacks = {
        "dense": read_stack(dense),
        "pruned": read_stack(make_variant(dense, [0, 1, 2, 5])),
    }
    assert root_difference(stacks["pruned"], stacks["dense"]) is None
    (order,) = walks_of(stacks)
    assert legs_of(order, stacks)[1].start == 3
    assert stacks["dense"].layers == 6
    assert len(set(names(stacks["dense"]))) == 6


def test_a_network_is_a_step_of_its_own(
    tiny_llama: Path, make_variant: Callable[..., Path]
) -> None:
    stacks = {
        "dense": read_stack(tiny_llama),
        "ffn": read_stack(make_variant(tiny_llama, [0, 1, 4, 5], attach=(1, "ffn"))),
        "residual": read_stack(make_variant(tiny_llama, [0, 1, 4, 5], attach=(1, "ffn_res"))),
        "before": read_stack(make_variant(tiny_llama, [2, 3, 4, 5], attach=(-1, "ffn"))),
    }
    assert [step.attachment for step in stacks["ffn"].steps] == [False, False, True, False, False]
    assert stacks["ffn"].layers == 4
    assert stacks["ffn"].layers_below(3) == 2
    # The two kinds have the same tensors and do different things with them.
    assert names(stacks["ffn"])[2] != names(stacks["residual"])[2]
    assert [len(group) for group in walks_of(stacks)] == [3, 1]
    order = walks_of(stacks)[0]
    assert [leg.start for leg in legs_of(order, stacks)] == [0, 2, 2]


def test_sharding_and_the_folder_play_no_part(
    tiny_llama: Path, make_variant: Callable[..., Path]
) -> None:
    sharded = make_variant(tiny_llama, range(6), max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert read_stack(sharded) == read_stack(tiny_llama)


def test_one_changed_number_ends_what_is_shared(
    tiny_llama: Path, make_variant: Callable[..., Path]
) -> None:
    def edit(model: Any) -> None:
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1

    first, second = (
        read_stack(tiny_llama),
        read_stack(make_variant(tiny_llama, range(6), edit=edit)),
    )
    same = [a == b for a, b in zip(names(first), names(second), strict=True)]
    assert same == [True, True, True, False, True, True]


def test_final_norm_and_head_are_no_part_of_it(
    tiny_llama: Path, make_variant: Callable[..., Path]
) -> None:
    def edit(model: Any) -> None:
        model.model.norm.weight.mul_(2)
        model.lm_head.weight.mul_(2)

    assert read_stack(make_variant(tiny_llama, range(6), edit=edit)) == read_stack(tiny_llama)


def test_what_keeps_models_apart_is_named(
    tiny_llama: Path, make_variant: Callable[..., Path], tmp_path: Path
) -> None:
    dense = read_stack(tiny_llama)

    def embeddings(model: Any) -> None:
        model.model.embed_tokens.weight[5] += 1

    other = make_variant(tiny_llama, range(6), edit=embeddings)
    difference = root_difference(read_stack(other), dense)
    assert difference == "its tensor embed_tokens.weight differs"

    def rope(config: dict[str, Any]) -> None:
        config["rms_norm_eps"] = 0.1

    difference = root_difference(read_stack(changed(tiny_llama, tmp_path / "a", rope)), dense)
    assert difference == "its config entry rms_norm_eps is 0.1, not 1e-06"
    tokenizer = Path(shutil.copytree(tiny_llama, tmp_path / "b"))
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=7))
    assert root_difference(read_stack(tokenizer), dense) is None
    (tokenizer / "tokenizer.json").write_text(text.replace('"w7"', '"w777"'))
    assert root_difference(read_stack(tokenizer), dense) == (
        "its tokenizer file tokenizer.json differs"
    )


def test_the_dtype_of_the_config_counts_unless_another_is_asked_for(
    tiny_llama: Path, tmp_path: Path
) -> None:
    half = changed(tiny_llama, tmp_path / "half", lambda config: config.update(dtype="bfloat16"))
    assert root_difference(read_stack(half), read_stack(tiny_llama)) == (
        'its config entry dtype is "bfloat16", not "float32"'
    )
    same = [read_stack(each, dtype="float32") for each in (half, tiny_llama)]
    assert root_difference(*same) is None


def test_checkpoints_of_the_bare_model_are_the_same(
    make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_tiny_model("gpt2", n_inner=48)
    bare = Path(shutil.copytree(dense, tmp_path / "bare"))
    state = load_file(bare / "model.safetensors")
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    state |= {f"h.{i}.attn.bias": torch.ones(4, 4) for i in range(6)}
    save_file(state, bare / "model.safetensors", metadata={"format": "pt"})
    assert read_stack(bare) == read_stack(dense)


def test_an_unknown_family_and_a_damaged_folder(
    make_tiny_model: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match="bert"):
        read_stack(make_tiny_model("bert"))
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_stack(broken)
