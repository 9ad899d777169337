"""Models on a rotated, sliced residual stream: behave as a stock model in every respect."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streamline_bench.core.architecture import ARCHITECTURES, decoder_layers
from streamline_bench.core.boundaries import BoundaryRecorder
from streamline_bench.errors import ArchitectureError, CheckpointError
from streamline_bench.modeling import StreamlineForCausalLM, register, streamline_config
from streamline_bench.modeling.attachments import Attachment
from streamline_bench.modeling.rotations import (
    Rotations,
    StreamNorm,
    StreamWidths,
    require_rotatable,
)

register()

DEPTH = 3
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
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "smollm3": {},
    "granite": {},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {"n_inner": 48},
}
WIDTHS = (StreamWidths(24, 16, 20), StreamWidths(20, 32, 8), StreamWidths(8, 28, 12))
"""Six different widths: whatever takes one for another fails."""
PARALLEL = tuple(StreamWidths(w.input, w.output, w.output) for w in WIDTHS)
PARALLEL_FAMILIES = ("phi", "gpt_neox")
WIDE_HEAD = (*WIDTHS[:2], StreamWidths(8, 28, 32))
"""GPT-2 gives its last states the width of its first."""


def host(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, **EXTRA.get(family, {}), "tie_word_embeddings": False, **changes}
    return AutoConfig.for_model(family, **sizes)


def spec(family: str) -> Rotations:
    widths = PARALLEL if family in PARALLEL_FAMILIES else WIDTHS
    widths = WIDE_HEAD if family == "gpt2" else widths
    biased = ("opt", "gpt2", "gpt_neox", "phi")
    return Rotations(widths, norm_divisor=32, head_bias=family in biased)


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        streamline_config(host(family), rotations=spec(family))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(params=list(EXTRA))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


def test_widths_are_those_of_the_config(family: str) -> None:
    model = build(family)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    first, last = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert (first.shape[1], last.shape[1]) == (24, spec(family).head_width)
    for layer, widths in zip(decoder_layers(model), spec(family).layers, strict=True):
        assert layer.attention_shortcut.weight.shape == (widths.middle, widths.input)
        if family in PARALLEL_FAMILIES:
            assert not hasattr(layer, "mlp_shortcut")
        else:
            assert layer.mlp_shortcut.weight.shape == (widths.output, widths.middle)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        if isinstance(module, Conv1D):
            assert tuple(module.weight.shape) == (module.nx, module.nf)
    norms = [name for name in shapes if "norm" in name and "q_norm" not in name]
    assert not [name for name in norms if "k_norm" not in name]


def test_saved_and_loaded_by_auto_classes(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["host_model_type"]) == ("streamline", family)
    middle = 20 if family in PARALLEL_FAMILIES else 16
    assert written["rotations"]["layers"][0] == {"input": 24, "middle": middle, "output": 20}
    assert written.get("hidden_size", written.get("n_embd")) == 32
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(loaded, StreamlineForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        states = model(ids, output_hidden_states=True).hidden_states
        stack = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(stack(ids).last_hidden_state, states[-1])
    widths = [32, 20, 8, 32] if family == "gpt2" else [24, 20, 8, 12]
    assert [state.shape[-1] for state in states] == widths


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
    assert len(first.past_key_values.layers) == DEPTH


def test_padding_on_the_left_changes_nothing(family: str, ids: torch.Tensor) -> None:
    model = build(family)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    with torch.no_grad():
        places = None if family == "opt" else (mask.cumsum(1) - 1).clamp_min(0)
        found = model(padded, attention_mask=mask, position_ids=places).logits[:, 3:]
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_norm_divides_by_the_width_before_slicing() -> None:
    states = torch.randn(2, 3, 12, dtype=torch.float64)
    padded = torch.cat([states, torch.zeros(2, 3, 20).double()], dim=-1)
    whole = torch.nn.RMSNorm(32, eps=1e-3, elementwise_affine=False, dtype=torch.float64)
    torch.testing.assert_close(StreamNorm(32, 1e-3)(states), whole(padded)[..., :12])
    half = StreamNorm(32, 1e-3)(states.bfloat16() * 1e20)
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("family", ["opt", "phi3", "phi", "gpt_neox"])
def test_dropout_is_the_hosts(family: str, ids: torch.Tensor) -> None:
    model = build(family).train()
    for layer in decoder_layers(model):
        if family == "opt":
            layer.dropout = 0.5
        else:
            dropouts = [m for n, m in layer.named_children() if n.endswith("dropout")]
            assert dropouts
            for dropout in dropouts:
                dropout.p = 0.5
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradients_reach_shortcuts_with_and_without_checkpointing(ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "shortcut" in n])
    assert all(bool(grad.any()) for grad in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pickled_and_copied(family: str, ids: torch.Tensor) -> None:
    model = build(family)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(decoder_layers(twin)[0]) is type(decoder_layers(model)[0])
        assert torch.equal(twin(ids).logits, model(ids).logits)
    config = pickle.loads(pickle.dumps(model.config))
    assert config.to_dict() == model.config.to_dict()


def test_loads_in_bfloat16_and_with_a_device_map(ids: torch.Tensor, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids).logits.isfinite().all()
    assert "RotatedLlamaDecoderLayer" in model._no_split_modules


def test_fresh_weights_are_drawn_for_what_was_resized() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(streamline_config(host("opt"), rotations=spec("opt")))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert bool(parameter.any()) or name.endswith("bias"), name
        assert float(parameter.detach().abs().max()) < 1, name


def test_attention_goes_through_the_interface_of_transformers(ids: torch.Tensor) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counting(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.layer_idx)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("streamline_test_rotated", counting)
    model = build("llama")
    model.set_attn_implementation("streamline_test_rotated")
    model(ids)
    assert calls == list(range(DEPTH))


def test_states_of_different_bases_are_not_compared() -> None:
    with pytest.raises(ArchitectureError, match="another basis and width at every boundary"):
        BoundaryRecorder(build("llama"))


REASONS = {
    "gemma2": "norms between a sub-layer's output and the stream",
    "gemma3_text": "norms between a sub-layer's output and the stream",
    "olmo2": "norms between a sub-layer's output and the stream",
    "mixtral": "mixtures of experts",
    "qwen3_moe": "mixtures of experts",
    "deepseek_v3": "mixtures of experts",
    "gpt_oss": "mixtures of experts",
}


def test_every_family_is_rotatable_or_refused_with_its_reason() -> None:
    assert set(EXTRA) | set(REASONS) == set(ARCHITECTURES)
    for family in EXTRA:
        assert require_rotatable({"model_type": family}).model_type == family
    for family, reason in REASONS.items():
        with pytest.raises(ArchitectureError, match=f"'{family}' model .*{reason}"):
            require_rotatable({"model_type": family})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False puts its norms behind"),
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 differs from hidden_size=32"),
    ],
)
def test_settings_that_stand_in_the_way_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArchitectureError, match=reason):
        require_rotatable(host("opt", **changes))


def _drop(entry: dict[str, Any]) -> None:
    del entry["norm_divisor"]


def _shorten(entry: dict[str, Any]) -> None:
    entry["layers"].pop()


def _tear(entry: dict[str, Any]) -> None:
    entry["layers"][1]["input"] = 21


def _empty(entry: dict[str, Any]) -> None:
    entry["layers"][0]["middle"] = 0


def _rename(entry: dict[str, Any]) -> None:
    entry["layers"][0]["mid"] = entry["layers"][0].pop("middle")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"need exactly \['head_bias', 'layers', 'norm_divisor'\]"),
        (_shorten, "list 2 layers, the model has 3"),
        (_tear, "layer 0 an output of width 20, the next layer an input of 21"),
        (_empty, "0 in the config's rotations must be a whole number from 1"),
        (_rename, "'mid': 16.*give exactly input, middle and output"),
    ],
)
def test_damaged_entries_are_refused(damage: Callable[[Any], None], message: str) -> None:
    entries = streamline_config(host("llama"), rotations=spec("llama")).to_dict()
    damage(entries["rotations"])
    entries.pop("model_type")
    with pytest.raises(CheckpointError, match=message):
        AutoConfig.for_model("streamline", **entries)


@pytest.mark.parametrize(
    ("family", "place", "message"),
    [
        ("phi", (0, "middle"), "middle of 16 and an output of 20"),
        ("gpt2", (2, "output"), "a width of 24 and the LM head 16"),
    ],
)
def test_widths_that_the_family_cannot_have_are_refused(
    family: str, place: tuple[int, str], message: str
) -> None:
    entries = streamline_config(host(family), rotations=spec(family)).to_dict()
    entries["rotations"]["layers"][place[0]][place[1]] = 16
    entries.pop("model_type")
    with pytest.raises(CheckpointError, match=message):
        AutoConfig.for_model("streamline", **entries)


def test_rotations_and_attachments_do_not_go_together() -> None:
    with pytest.raises(CheckpointError, match="rotations together with attachments"):
        streamline_config(host("llama"), [Attachment(0, "linear", 32)], rotations=spec("llama"))
