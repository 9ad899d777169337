"""The ``streamline`` model type over host families: behaves as a stock model in every respect."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from streamline_bench.core.architecture import ARCHITECTURES, architecture_of, decoder_layers
from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.modeling import (
    Attachment,
    StreamlineConfig,
    StreamlineForCausalLM,
    StreamlineModel,
    register,
    streamline_config,
)

register()

DEPTH = 4
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
EXTRA: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": MOE,
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
    },
}
ATTACHMENTS = [
    Attachment(-1, "swiglu_res", 16),
    Attachment(1, "ffn", 20),
    Attachment(DEPTH - 1, "linear", 32),
]
FAMILIES = sorted(ARCHITECTURES)


def config_for(family: str, attachments: Any = ATTACHMENTS) -> StreamlineConfig:
    host = AutoConfig.for_model(family, **{**SIZES, **EXTRA.get(family, {})})
    return streamline_config(host, attachments)


def build(family: str, attachments: Any = ATTACHMENTS) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_for(family, attachments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_host_with_networks_between_its_layers(
    family: str, ids: torch.Tensor
) -> None:
    model = build(family)
    host_class = next(
        c for c in type(model).__mro__ if c.__module__.startswith("transformers.models")
    )
    entries = model.config.to_dict()
    entries.pop("attachments")
    host_config = AutoConfig.for_model(entries.pop("host_model_type"), **_without_type(entries))
    host = host_class(host_config).eval()
    own = {
        k: v
        for k, v in model.state_dict().items()
        if ".attachment." not in k and ".prelude." not in k
    }
    host.load_state_dict(own)
    networks = [model.get_submodule(a.tensor_prefix(model.config)[:-1]) for a in ATTACHMENTS]
    layers = decoder_layers(host)
    layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: ((networks[0](args[0]), *args[1:]), kwargs), with_kwargs=True
    )
    layers[1].register_forward_hook(lambda layer, args, output: networks[1](output))
    layers[DEPTH - 1].register_forward_hook(lambda layer, args, output: networks[2](output))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, host(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_by_auto_classes(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "streamline"
    assert written["host_model_type"] == family
    assert written["architectures"] == ["StreamlineForCausalLM"]
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(loaded, StreamlineForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        states = model(ids, output_hidden_states=True).hidden_states
        stack = AutoModel.from_pretrained(tmp_path)
        assert isinstance(stack, StreamlineModel)
        torch.testing.assert_close(stack(ids).last_hidden_state, states[-1])
    assert len(states) == DEPTH + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_and_generate_equal_full_forwards(family: str, ids: torch.Tensor) -> None:
    model = build(family)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        whole = model(ids, use_cache=False).logits
        parts = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
        greedy = ids
        for _ in range(5):
            nxt = model(greedy, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            greedy = torch.cat([greedy, nxt], dim=1)
    assert torch.equal(made, greedy)


def test_caches_are_one_to_one_with_layers(ids: torch.Tensor) -> None:
    cache = build("llama")(ids, use_cache=True).past_key_values
    assert len(cache.layers) == DEPTH


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "gpt2"])
def test_gradients_reach_networks_and_layers(family: str, ids: torch.Tensor) -> None:
    model = build(family).train()
    model(ids, labels=ids).loss.backward()
    for attachment in ATTACHMENTS:
        prefix = attachment.tensor_prefix(model.config)
        reached = [p for n, p in model.named_parameters() if n.startswith(prefix)]
        assert reached
        assert all(p.grad is not None and bool(p.grad.any()) for p in reached)


def test_gradient_checkpointing_gives_the_same_gradients(ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[1].attachment.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_loads_in_bfloat16(ids: torch.Tensor, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids).logits.isfinite().all()


def test_loads_with_a_device_map(ids: torch.Tensor, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(mapped(ids).logits, model(ids).logits)
    # A layer and its network must never be split between devices.
    assert "AttachedLlamaDecoderLayer" in mapped._no_split_modules


def test_built_on_the_meta_device_as_other_engines_do() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(config_for("llama"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model._supports_attention_backend


def test_attention_goes_through_the_interface_of_transformers(ids: torch.Tensor) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counting(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.layer_idx)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("streamline_test_counting", counting)
    model = build("llama")
    model.set_attn_implementation("streamline_test_counting")
    model(ids)
    assert calls == list(range(DEPTH))


def test_missing_networks_are_reported_and_start_by_their_own_rule(
    ids: torch.Tensor, tmp_path: Path
) -> None:
    plain = build("llama", [])
    plain.save_pretrained(tmp_path)
    config = config_for("llama", [Attachment(1, "ffn_res", 16)])
    loaded, report = StreamlineForCausalLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert {name.split(".attachment.")[1] for name in report["missing_keys"]} == {
        "norm.weight",
        *(f"{part}_proj.{kind}" for part in ("up", "down") for kind in ("weight", "bias")),
    }
    assert torch.equal(loaded(ids).logits, plain(ids).logits)


def test_config_is_flat_and_survives_copies() -> None:
    config = config_for("llama")
    assert config.hidden_size == 32
    assert config.model_type == "streamline"
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is type(config)
        assert twin.to_dict() == config.to_dict()
    again = StreamlineConfig(**_without_type(config.to_dict()))
    assert type(again) is type(config)
    assert AutoConfig.for_model("streamline", **_without_type(config.to_dict())) == again


def test_attribute_map_of_the_host_works() -> None:
    config = config_for("gpt2")
    assert config.n_layer == config.num_hidden_layers == DEPTH


def test_a_model_can_be_pickled_and_copied(ids: torch.Tensor) -> None:
    model = build("llama")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_tensor_names() -> None:
    config = config_for("opt")
    places = {after: Attachment(after, "linear", 1).tensor_prefix(config) for after in (1, -1)}
    assert places == {
        1: "model.decoder.layers.1.attachment.",
        -1: "model.decoder.layers.0.prelude.",
    }
    names = build("opt").state_dict()
    for attachment in ATTACHMENTS:
        assert any(name.startswith(attachment.tensor_prefix(config)) for name in names)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"after_layer": DEPTH, "kind": "ffn", "intermediate_size": 4}, "outside -1 .. 3"),
        ({"after_layer": -2, "kind": "ffn", "intermediate_size": 4}, "outside -1 .. 3"),
        ({"after_layer": 0, "kind": "fnn", "intermediate_size": 4}, "did you mean 'ffn'"),
        ({"after_layer": 0, "kind": "ffn", "intermediate_size": 0}, "at least 1"),
        ({"after_layer": 0, "kind": "ffn"}, "give exactly.*'intermediate_size'"),
        ({"after_layer": 1, "kind": "linear", "intermediate_size": 32}, "share after_layer 1"),
    ],
)
def test_wrong_attachments_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_for("llama", [*ATTACHMENTS[1:2], entry])


def test_unknown_or_missing_hosts_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="'t5' is not supported"):
        StreamlineConfig(host_model_type="t5")
    with pytest.raises(CheckpointError, match="no 'host_model_type'"):
        StreamlineConfig.from_dict({"model_type": "streamline"})
    with pytest.raises(ArchitectureError, match="dense model"):
        streamline_config(config_for("llama"), [])


def test_architecture_table_reads_the_host() -> None:
    assert architecture_of(config_for("gpt2")).layers == "transformer.h"


def _without_type(entries: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entries.items() if k != "model_type"}
