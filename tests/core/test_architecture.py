"""The architecture table against the models that transformers builds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from streamline_bench.core.architecture import (
    ARCHITECTURES,
    architecture_of,
    config_entry,
    decoder_layers,
    require_removable_layers,
)
from streamline_bench.core.surgery import pruned_config
from streamline_bench.errors import ArchitectureError

EXPECTED = (
    "llama mistral qwen2 qwen3 gemma2 gemma3_text phi phi3 opt gpt2 gpt_neox olmo2 smollm3 granite "
    "mixtral qwen3_moe deepseek_v3 gpt_oss"
)


def has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def test_the_table_holds_the_families_promised() -> None:
    assert list(ARCHITECTURES) == EXPECTED.split()


def test_paths_outside_the_layers(variant: str, random_model: Callable[..., Any]) -> None:
    model = random_model(variant)
    row = architecture_of(model.config)
    assert getattr(model.config, row.depth_key) == len(decoder_layers(model)) == 6
    assert row.base == model.base_model_prefix
    assert model.get_submodule(row.lm_head) is model.get_output_embeddings()
    assert model.get_submodule(row.embeddings[0]) is model.get_input_embeddings()
    stack = model.get_submodule(row.stack)
    assert has(model, row.final_norm) or getattr(stack, "final_layer_norm", 0) is None
    weights = {n for n, _ in model.named_parameters() if not n.startswith(f"{row.layers}.")}
    named = (*row.embeddings, row.final_norm, row.lm_head)
    # OPT's project_out belongs to neither end; everything else outside the layers is in the table.
    assert {n for n in weights if not n.startswith(named) and "project_out" not in n} == set()


def test_paths_inside_the_layers(variant: str, random_model: Callable[..., Any]) -> None:
    model = random_model(variant)
    row = architecture_of(model.config)
    for layer in decoder_layers(model):
        attention, mlp = layer.get_submodule(row.attention), layer.get_submodule(row.mlp)
        for path in (row.query, row.key, row.value, row.output, row.fused_qkv):
            assert has(attention, path)
        norms = (row.input_norm, row.mlp_norm, row.attention_output_norm, row.mlp_output_norm)
        assert all("norm" in path or path.startswith("ln_") for path in norms if path)
        assert all(has(layer, path) for path in norms)
        mixture = bool(row.experts) and has(mlp, row.experts)
        if mixture:
            assert has(mlp, row.router)
        else:
            assert all(has(mlp, path) for path in (row.gate, row.up, row.down, row.fused_gate_up))


def test_named_norms_are_all_there_are(variant: str, random_model: Callable[..., Any]) -> None:
    model = random_model(variant)
    row = architecture_of(model.config)
    named = {row.input_norm, row.mlp_norm, row.attention_output_norm, row.mlp_output_norm} - {""}
    layer = decoder_layers(model)[0]
    found = {name for name, child in layer.named_children() if "Norm" in type(child).__name__}
    assert found == named


def test_residual_form(variant: str, random_model: Callable[..., Any], token_ids: Any) -> None:
    """Whether the MLP reads what attention wrote, seen by silencing attention's output."""
    model = random_model(variant)
    row = architecture_of(model.config)
    layer = decoder_layers(model)[0]
    seen: list[torch.Tensor] = []
    # The first projection of the MLP; a mixture is seen at its router.
    mlp = layer.get_submodule(row.mlp)
    mixture = bool(row.experts) and has(mlp, row.experts)
    path = row.router if mixture else row.up or row.fused_gate_up
    handle = mlp.get_submodule(path).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].detach().clone())
    )
    with torch.no_grad():
        model(token_ids, use_cache=False)
        for parameter in layer.get_submodule(f"{row.attention}.{row.output}").parameters():
            parameter.zero_()
        model(token_ids, use_cache=False)
    handle.remove()
    before, after = seen
    parallel = row.parallel_residual and getattr(model.config, "use_parallel_residual", True)
    assert torch.equal(before, after) == parallel


def test_transposed_projections(variant: str, random_model: Callable[..., Any]) -> None:
    model = random_model(variant)
    row = architecture_of(model.config)
    output = decoder_layers(model)[0].get_submodule(f"{row.attention}.{row.output}")
    assert isinstance(output, nn.Linear) != row.transposed


def test_a_parsed_config_is_as_good_as_an_object() -> None:
    assert architecture_of({"model_type": "opt"}) is ARCHITECTURES["opt"]


def test_a_host_decides_over_the_wrapper() -> None:
    wrapped = {"model_type": "streamline", "host_model_type": "qwen2"}
    assert architecture_of(wrapped) is ARCHITECTURES["qwen2"]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("t5", "encoder-decoder"), ("bert", "reads in both directions"), ("clip", "no causal"),
     ("nothing", "no such type; upgrade")],
)  # fmt: skip
def test_types_that_are_no_decoders_are_refused_as_what_they_are(
    model_type: str, reason: str
) -> None:
    with pytest.raises(ArchitectureError, match=f"'{model_type}' is not supported.*{reason}"):
        architecture_of({"model_type": model_type})


def test_features_that_tie_weights_to_layer_numbers_are_refused_for_removal_only() -> None:
    config = {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}
    assert architecture_of(config) is ARCHITECTURES["gpt2"]
    with pytest.raises(ArchitectureError, match="scale_attn_by_inverse_layer_idx=True"):
        require_removable_layers(config)


def test_a_model_without_its_layers_is_refused(random_model: Callable[..., Any]) -> None:
    bare = random_model("llama").model
    with pytest.raises(ArchitectureError, match=r"no list of layers at 'model\.layers'"):
        decoder_layers(bare)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_silent_config_gives_no_property_of_its_class(family: str) -> None:
    """A property is computed from an instance: the class holds no value that could stand in."""
    kind = CONFIG_MAPPING[family]
    properties = [name for name, _ in inspect.getmembers(kind, lambda v: isinstance(v, property))]
    assert properties
    for name in properties:
        assert config_entry({"model_type": family}, name, "nothing") == "nothing"
        assert config_entry({"model_type": family, name: 3}, name) == 3


def test_a_depth_that_a_config_class_computes_is_read_from_a_file_too() -> None:
    kinds = ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]
    entries = {"model_type": "nemotron_h", "layers_block_type": kinds}
    assert config_entry(entries, "num_hidden_layers") == 5
    config = AutoConfig.for_model(**entries, hidden_size=32, mamba_num_heads=4, vocab_size=64)
    pruned = pruned_config(config, [0, 1, 2, 4])
    assert pruned.layers_block_type == [*kinds[:3], kinds[4]]
    assert pruned.mtp_layers_block_type == config.mtp_layers_block_type
