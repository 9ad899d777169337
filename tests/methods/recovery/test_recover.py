"""Recovery: what is trained, what is left alone, and that a kill changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress, load_recipe
from streamline_bench.compression.pipeline import content_key
from streamline_bench.core.checkpoint.folder import read_manifest, verify_files
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.recipe.presets import RECOVERY_PRESETS
from streamline_bench.core.recipe.schema import Recipe, RecoverySpec, TrainingSpec
from streamline_bench.errors import (
    ArchitectureError,
    CalibrationError,
    NumericsError,
    RecipeError,
)
from streamline_bench.methods.base import Compression, get_method
from streamline_bench.methods.recovery import recover
from streamline_bench.methods.recovery import training as recovery_training
from streamline_bench.methods.recovery.training import choose_parameters, train_recovery
from streamline_bench.modeling import register
from streamline_bench.modeling.loading import SourceModel

IDS = torch.tensor([[1, 5, 9, 40, 22, 7]])
FAST: dict[str, Any] = {
    "recovery.training.data.sequence_length": 16,
    "recovery.training.epochs": 1,
    "recovery.training.min_steps": 8,
    "recovery.training.batch_size": 4,
    "recovery.training.lr": 3e-3,
}


@pytest.fixture
def recovered(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> Callable[..., tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Return a function: compress with a recovery, give (folder, tensors, those without it)."""

    def run(source: Path, recipe: str = "last_layers", **changes: Any) -> Any:
        settings = {f"recovery.{key}": value for key, value in changes.items()}
        plain, trained = (tmp_path / name for name in ("plain", "trained"))
        compress(source, make_recipe(recipe, recovery="none"), plain, progress=False)
        options = {**FAST, **settings}
        compress(source, make_recipe(recipe, **options), trained, progress=False)
        return trained, _tensors(trained), _tensors(plain)

    return run


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def _changed(after: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name in after if not torch.equal(after[name], before[name])}


def _facts(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.training is not None
    verify_files(folder, manifest)
    facts: dict[str, Any] = manifest.training["recovery"]
    return facts


def _load(folder: Path) -> Any:
    register()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
def test_lora_merged_equals_lora_applied(
    make_tiny_model: Callable[..., Path], model_type: str
) -> None:
    """Separate, fused and transposed projections, and an MLP without a gate."""
    folder = make_tiny_model(model_type, num_hidden_layers=2, **_sizes(model_type))
    plain, adapted = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    trainable = choose_parameters(adapted, RecoverySpec(kind="lora", rank=3, alpha=7.0), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable.named_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        applied, before = adapted(IDS).logits, plain(IDS).logits
        plain.load_state_dict(trainable.merged(), strict=False)
        torch.testing.assert_close(plain(IDS).logits, applied, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(applied, before, atol=1e-2)
    names = dict(plain.named_parameters())
    assert set(trainable.merged()) <= set(names)


@pytest.mark.parametrize(("divided", "place"), [(True, "cpu"), (False, "cuda")])
def test_a_model_whose_weights_are_divided_is_loaded_on_the_host(
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    divided: bool,
    place: str,
) -> None:
    source = SourceModel.find(make_tiny_model("llama", num_hidden_layers=3), progress=False)
    recipe = make_recipe("last_layers_lora", **FAST, n_layers=1)
    job = Compression(source, recipe, tmp_path, device="cuda", progress=False)
    assert recipe.recovery is not None
    places: list[str] = []

    def load(folder: Path, *, device: str, **_: Any) -> None:
        places.append(device)
        raise NumericsError("far enough")

    monkeypatch.setattr(recover, "is_sharded", lambda: divided)
    monkeypatch.setattr("streamline_bench.modeling.loading.load_model", load)
    with pytest.raises(NumericsError, match="far enough"):
        recover.compress_and_recover(job, get_method(recipe.method), recipe.recovery)
    assert places == [place]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_saved_model_is_the_trained_one(
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    """The folder's logits against those of the model with its updates still beside the weights."""
    trained: list[Any] = []
    original = recovery_training.train_recovery

    def kept(model: Any, *arguments: Any, **options: Any) -> Any:
        trained.append(model)
        return original(model, *arguments, **options)

    monkeypatch.setattr(recovery_training, "train_recovery", kept)
    depth = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    source = make_tiny_model(model_type, **{**_sizes(model_type), depth: 4})
    recipe = make_recipe("last_layers", **{**FAST, "recovery.kind": "lora"})
    out = compress(source, recipe, tmp_path / "out", progress=False)
    plain = make_recipe("last_layers", recovery="none")
    untrained = compress(source, plain, tmp_path / "plain", progress=False)
    with torch.no_grad():
        applied, saved, before = (
            model.eval()(IDS).logits for model in (trained[0], _load(out), _load(untrained))
        )
    assert any("lora_A" in name for name, _ in trained[0].named_parameters())
    torch.testing.assert_close(saved, applied, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(saved, before, atol=1e-3)


def _sizes(model_type: str) -> dict[str, Any]:
    if model_type == "gpt2":
        return {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
    return {"ffn_dim": 48, "word_embed_proj_dim": 32} if model_type == "opt" else {}


_DEEP: dict[str, Any] = {"num_hidden_layers": 6, "n_layer": 6}


def test_lora_is_the_published_rank_one_formula() -> None:
    """W + alpha / rank B A, against a plain matrix product."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    spec = RecoverySpec(kind="lora", rank=2, alpha=5.0, targets=("down",))
    trainable = choose_parameters(model, spec, seed=0)
    a, b = trainable.named_parameters().values()
    with torch.no_grad():
        b.normal_()
    expected = before + 5.0 / 2 * b.detach() @ a.detach()
    (name,) = trainable.merged()
    assert name == "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(trainable.merged()[name], expected)


@pytest.mark.parametrize(("batch_size", "gradient_accumulation"), [(8, 1), (2, 4)])
def test_a_step_equals_one_written_out(
    tiny_llama: Path, tmp_path: Path, batch_size: int, gradient_accumulation: int
) -> None:
    """AdamW on the stock model's loss with masked labels; answers of unequal length."""
    generator = torch.Generator().manual_seed(2)
    # The same text in each row, so that the row held out improves with the others.
    ids = torch.randint(3, 100, (1, 12), generator=generator).repeat(9, 1)
    targets = torch.arange(12) >= torch.randint(1, 11, (9, 1), generator=generator)
    tokens = CalibrationTokens.from_tensors(ids, target_mask=targets)
    steps = {"batch_size": batch_size, "gradient_accumulation": gradient_accumulation}
    training = TrainingSpec(objective="lm", lr=1e-3, validation_share=0.1, **steps)
    spec = RecoverySpec(kind="partial", last_layers=1, training=training)
    model, stock = (AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(2))
    trainable = choose_parameters(model, spec, seed=4)
    result = train_recovery(
        model, trainable, spec, tokens, tmp_path, seed=4, weights_sha256="", progress=False
    )
    assert result.summary["steps"] == result.summary["best_step"] == 1

    rows = tokens.split(0.1, 4)[0]
    assert rows.target_mask is not None
    labels = rows.input_ids.where(rows.target_mask, -100)
    chosen = {n: p for n, p in stock.named_parameters() if n in result.state}
    stock(rows.input_ids, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(chosen.values(), training.max_grad_norm)
    torch.optim.AdamW(chosen.values(), lr=1e-3, weight_decay=training.weight_decay).step()
    for name, parameter in chosen.items():
        # The first step of AdamW has about the sign of the gradient, which rounding may turn.
        torch.testing.assert_close(result.state[name], parameter.data, rtol=1e-4, atol=2e-5)


def test_lora_changes_its_targets_alone(tiny_llama: Path, recovered: Callable[..., Any]) -> None:
    folder, after, before = recovered(tiny_llama, kind="lora", targets=["q", "up"], rank=2)
    wanted = [
        f"model.layers.{i}.{name}.weight"
        for i in range(4)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert after.keys() == before.keys()
    assert _changed(after, before) == set(wanted)
    facts = _facts(folder)
    assert facts["best_loss"] < facts["initial_loss"]
    assert facts["trained_parameters"] == 4 * (2 * (32 + 32) + 2 * (32 + 48))
    assert (folder / "recovery_curve.jsonl").is_file()
    _load(folder)


def test_partial_changes_head_norm_and_last_layers_alone(
    tiny_llama: Path, recovered: Callable[..., Any]
) -> None:
    _, after, before = recovered(tiny_llama, "last_layers_partial", last_layers=1)
    last = {name for name in before if name.startswith("model.layers.3.")}
    assert len(last) == 9
    assert _changed(after, before) == {"lm_head.weight", "model.norm.weight", *last}


@pytest.mark.parametrize(
    ("kind", "head"),
    [("partial", "tied"), ("partial", "untied"), ("partial", "frozen"), ("full", "tied")],
)
def test_tied_embeddings(
    make_tiny_model: Callable[..., Path], recovered: Callable[..., Any], kind: str, head: str
) -> None:
    """They go on as one tensor, trained or not; or the head gets a copy, and they stay."""
    source = make_tiny_model("llama", tie_word_embeddings=True)
    options = {"head": head} if kind == "partial" else {}
    folder, after, before = recovered(source, kind=kind, **options)
    config = json.loads((folder / "config.json").read_text())
    facts = _facts(folder)
    assert facts["best_loss"] < facts["initial_loss"]
    model = _load(folder)
    embeddings = "model.embed_tokens.weight"
    untied = (kind, head) == ("partial", "untied")
    assert config["tie_word_embeddings"] is not untied
    assert facts["untied_embeddings"] is untied
    if untied:
        assert torch.equal(after[embeddings], before[embeddings])
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert torch.equal(model.lm_head.weight, after["lm_head.weight"])
    else:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in after
        assert (embeddings in _changed(after, before)) is (head != "frozen")


@pytest.mark.parametrize(
    ("method", "head"),
    [("last_layers", "untied"), ("llm_pruner", "untied"), ("last_layers", "tied")],
)
def test_no_layer_is_removed_to_pay_for_a_head(
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    method: str,
    head: str,
) -> None:
    """A copy of the head makes the model larger by it, and that is what the manifest says."""
    source = make_tiny_model("llama", tie_word_embeddings=True, **_sizes("llama"), **_DEEP)
    bare = read_manifest(
        compress(source, make_recipe(method, sparsity=0.25), tmp_path / "bare", progress=False)
    )
    options = {**FAST, "recovery.kind": "partial", "recovery.training.min_steps": 1}
    recipe = make_recipe(method, sparsity=0.25, **options, **{"recovery.head": head})
    manifest = read_manifest(compress(source, recipe, tmp_path / "out", progress=False))
    assert manifest is not None and bare is not None
    assert manifest.layers_after == bare.layers_after
    copy = 100 * 32 if head == "untied" else 0
    assert manifest.parameters_after == bare.parameters_after + copy


def test_a_checkpoint_of_the_bare_model_gets_full_names(
    make_tiny_model: Callable[..., Path], recovered: Callable[..., Any], tmp_path: Path
) -> None:
    """GPT-2's published form: tied, saved without its head."""
    source = make_tiny_model("gpt2", **{**_sizes("gpt2"), "n_layer": 4})
    AutoModelForCausalLM.from_pretrained(source).transformer.save_pretrained(source)
    folder, after, _ = recovered(source, kind="partial", last_layers=1, head="untied")
    assert "lm_head.weight" in after
    assert not torch.equal(after["lm_head.weight"], after["transformer.wte.weight"])
    assert torch.equal(_load(folder).lm_head.weight, after["lm_head.weight"])


def test_a_sliced_model_is_recovered_too(
    tiny_llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Its projections have other widths than the config's, and its layers shortcuts."""
    options = {**FAST, "recovery.kind": "lora", "recovery.training.data.sequence_length": 12}
    recipe = make_recipe("slicegpt", sparsity=0.1, **options)
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    facts = _facts(out)
    assert facts["best_loss"] < facts["initial_loss"]
    assert facts["data"]["sequence_length"] == 12
    assert facts["changed_tensors"] == 6 * 7
    _load(out)


def test_a_streamline_result_stays_one(
    tiny_llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    options = {**FAST, "replacement": "ffn_res", "recovery.kind": "lora", "recovery.targets": ["v"]}
    recipe = make_recipe("streamline", **options)
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert type(_load(out)).__name__ == "StreamlineLlamaForCausalLM"
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.training is not None
    assert manifest.training["kind"] == "ffn_res"
    assert manifest.training["recovery"]["kind"] == "lora"
    assert {"similarity.json", "training_curve.jsonl"} <= set(manifest.files)


def test_half_precision_weights_stay_so(
    tiny_llama: Path, recovered: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    _, after, before = recovered(source, kind="partial", last_layers=0)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert _changed(after, before) == {"lm_head.weight", "model.norm.weight"}


def test_lora_of_a_half_precision_model_is_trained_in_full_precision(
    make_tiny_model: Callable[..., Path],
) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    trainable = choose_parameters(model, RecoverySpec(kind="lora"), seed=0)
    assert {parameter.dtype for parameter in trainable.named_parameters().values()} == {
        torch.float32
    }
    trainable.begin(0)
    model(IDS, labels=IDS).loss.backward()
    trained = {id(parameter) for parameter in trainable.named_parameters().values()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) is (id(parameter) in trained)
    assert {weight.dtype for weight in trainable.merged().values()} == {torch.float32}


def test_nan_stops_with_the_step_named(
    tiny_llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    changes = {"recovery.kind": "full", "recovery.training.lr": 1e30}
    recipe = make_recipe("last_layers", **{**FAST, **changes})
    with pytest.raises(NumericsError, match=r"recovered model is .* (at|after) step \d"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "parameter", "place"),
    [
        ("lora", "model.layers.1.self_attn.q_proj.lora_A", "'self_attn.q_proj.lora_A' in layer 1"),
        ("partial", "model.layers.2.self_attn.q_proj", "'self_attn.q_proj' in layer 2"),
        ("partial", "lm_head", "'lm_head'"),
        ("full", "model.embed_tokens", "'model.embed_tokens'"),
    ],
)
def test_a_gradient_that_is_no_number_is_named(
    make_tiny_model: Callable[..., Path], tmp_path: Path, kind: Any, parameter: str, place: str
) -> None:
    """NaN runs down through the layers below; the topmost place is where it came from."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model("llama", num_hidden_layers=3))
    spec = RecoverySpec(kind=kind, last_layers=2, training=TrainingSpec(objective="lm"))
    trainable = choose_parameters(model, spec, seed=0)
    named = trainable.named_parameters()
    chosen = named.get(parameter, named.get(f"{parameter}.weight"))
    assert chosen is not None
    below = list(named.values())[: [p is chosen for p in named.values()].index(True) + 1]
    for spoiled in below:
        spoiled.register_hook(lambda gradient: gradient * torch.nan)
    before = trainable.state_on_cpu()
    tokens = CalibrationTokens.from_tensors(IDS.repeat(4, 1))
    message = f"The gradient of {re.escape(place)} of the recovered model is NaN .* at step 1 of"
    with pytest.raises(NumericsError, match=message):
        train_recovery(
            model, trainable, spec, tokens, tmp_path, seed=0, weights_sha256="", progress=False
        )
    assert all(torch.equal(before[name], each) for name, each in named.items())


@pytest.mark.parametrize(("head", "tied"), [("tied", True), ("frozen", True), ("tied", False)])
def test_frozen_parts_stay_in_the_dtype_that_is_asked_for(
    make_tiny_model: Callable[..., Path], head: Any, tied: bool
) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=tied)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    spec = RecoverySpec(kind="partial", last_layers=1, head=head)
    gradients = []
    for model in (half, whole):
        trainable = choose_parameters(model, spec, seed=0)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        named = trainable.named_parameters()
        assert all(parameter.dtype == torch.float32 for parameter in named.values())
        gradients.append({name: parameter.grad for name, parameter in named.items()})
    frozen = [p for n, p in half.named_parameters() if n not in gradients[0]]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    for name, gradient in gradients[1].items():
        assert gradient is not None
        error = (gradients[0][name] - gradient).norm() / gradient.norm()
        assert float(error) < 0.05, name


def test_parts_of_a_micro_batch_draw_the_same_dropout(tiny_llama: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 100, (9, 12), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([12, 5, 9, 12, 7, 12, 4, 11, 12])
    tokens = CalibrationTokens.from_tensors(ids, torch.arange(12) < lengths[:, None])
    training = TrainingSpec(
        objective="lm", lr=1e-2, batch_size=4, epochs=2, validation_share=0.1, autocast="none"
    )
    spec = RecoverySpec(kind="lora", dropout=0.5, targets=("q", "up"), training=training)
    states = []
    for at_once in (None, 3, 1):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        result = train_recovery(
            model, choose_parameters(model, spec, seed=4, at_once=at_once), spec, tokens,
            tmp_path / str(at_once), seed=4, weights_sha256="", at_once=at_once, progress=False,
        )  # fmt: skip
        states.append(dict(result.state))
    for parts in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5)


def test_dropout_depends_on_the_step_alone(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainable = choose_parameters(model, RecoverySpec(kind="lora", dropout=0.5), seed=0)
    with torch.no_grad():
        for parameter in trainable.named_parameters().values():
            parameter.fill_(0.1)

        def logits(step: int | None) -> torch.Tensor:
            trainable.begin(step)
            result: torch.Tensor = model(IDS).logits
            return result

        with torch.random.fork_rng():
            assert torch.equal(logits(None), logits(None))
            first = logits(3)
            assert not torch.equal(first, logits(4))
            assert torch.equal(first, logits(3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recovery.kind": "lora", "recovery.rnk": 3}, RecipeError, "did you mean 'recovery.rank'"),
        (
            {"recovery.kind": "lora", "recovery.training.warmup_step": 3},
            RecipeError,
            "did you mean 'recovery.training.warmup_steps'",
        ),
        ({"recovery": "llm_prunner"}, RecipeError, "did you mean 'llm_pruner'"),
        ({"recovery.kind": "lora", "recovery.training.objective": "mse"}, RecipeError, "'lm'"),
        ({"recovery.rank": 3}, RecipeError, "recovery.kind"),
    ],
)
def test_wrong_recipes_are_refused(changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        load_recipe("last_layers", changes)


def test_what_is_not_there_is_refused(
    make_tiny_model: Callable[..., Path],
    tiny_llama: Path,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        make_tiny_model("mixtral", num_hidden_layers=2, num_local_experts=2)
    )
    with pytest.raises(ArchitectureError, match="no projection 'gate'"):
        choose_parameters(model, RecoverySpec(kind="lora", targets=("gate",)), seed=0)
    deep = make_recipe("last_layers_partial", **{**FAST, "recovery.last_layers": 9})
    with pytest.raises(RecipeError, match="has 4 layers"):
        compress(tiny_llama, deep, tmp_path / "out", progress=False)
    texts = {"recovery.kind": "full", "recovery.training.data.form": "instruction"}
    with pytest.raises(CalibrationError, match="not instructions"):
        compress(tiny_llama, make_recipe("last_layers", **texts), tmp_path / "out", progress=False)


MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                  "head_dim": 8, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    "deepseek_v3": {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
                    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
                    "v_head_dim": 4, "num_key_value_heads": 4, "head_dim": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["partial", "full"])
@pytest.mark.parametrize("family", list(MIXTURES))
def test_experts_are_written_as_they_were_stored(
    family: str,
    kind: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    """Steps of nothing leave every byte where it was, whether experts are fused or one by one."""
    source = make_tiny_model(family, num_hidden_layers=4, **MIXTURES[family])
    still = {"recovery.kind": kind, "recovery.training.lr": 1e-30, "n_layers": 1,
             "recovery.training.min_lr_ratio": 0.0,
             "recovery.training.weight_decay": 0.0, "recovery.training.min_steps": 1}  # fmt: skip
    out = compress(
        source, make_recipe("last_layers", **{**FAST, **still}), tmp_path / "out", progress=False
    )
    model = _load(out)
    before, after = CheckpointReader(source), CheckpointReader(out)
    assert set(after.names) == {name for name in before.names if ".layers.3." not in name}
    for name in after.names:
        assert torch.equal(after.tensor(name), before.tensor(name)), name
    assert sum(p.numel() for p in model.parameters()) == after.num_parameters


def test_experts_are_trained(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    source = make_tiny_model("qwen3_moe", num_hidden_layers=4, **MIXTURES["qwen3_moe"])
    partial = {"recovery.kind": "partial", "recovery.last_layers": 1, "n_layers": 1}
    recipe = make_recipe("last_layers", **{**FAST, "recovery.training.min_steps": 2, **partial})
    out = compress(source, recipe, tmp_path / "out", progress=False)
    before, after = CheckpointReader(source), CheckpointReader(out)
    names = [
        name for name in after.names if not torch.equal(before.tensor(name), after.tensor(name))
    ]
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"2"}
    assert any("experts.0.gate_proj" in name for name in names)


def test_experts_in_an_unknown_form_are_refused_before_compressing(
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_tiny_model("qwen3_moe", num_hidden_layers=4, **MIXTURES["qwen3_moe"])
    names = [n.replace("experts.0", "experts.x") for n in CheckpointReader(source).names]
    monkeypatch.setattr(CheckpointReader, "names", names)
    method = "streamline_bench.methods.depth.positional.LastLayers.compress"
    monkeypatch.setattr(method, lambda *_: pytest.fail("was compressed"))
    recipe = make_recipe("last_layers", **{**FAST, "recovery.kind": "full"})
    with pytest.raises(ArchitectureError, match=r"model\.layers\.\d\.mlp\.experts"):
        compress(source, recipe, tmp_path / "out", progress=False)


@pytest.mark.parametrize("family", list(MIXTURES))
def test_lora_trains_the_attention_of_a_mixture_and_its_dense_layers(
    family: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = make_tiny_model(family, num_hidden_layers=4, **MIXTURES[family])
    lora = {"recovery.kind": "lora", "recovery.dropout": 0.05, "n_layers": 1}
    recipe = make_recipe("last_layers", **{**FAST, **lora, "recovery.training.min_steps": 2})
    out = compress(source, recipe, tmp_path / "out", progress=False)
    _load(out)
    before, after = CheckpointReader(source), CheckpointReader(out)
    changed = {n for n in after.names if not torch.equal(before.tensor(n), after.tensor(n))}
    dense = {"qwen3_moe": "layers.1.mlp", "deepseek_v3": "layers.0.mlp"}.get(family)
    assert {name for name in changed if "self_attn" not in name} == {
        name for name in after.names if dense and dense in name
    }
    attention = {n.split("self_attn.")[1].split(".")[0] for n in changed if "self_attn" in n}
    latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    usual = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert attention == (latent if family == "deepseek_v3" else usual)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.training is not None
    assert set(manifest.training["recovery"]["targets_left_out"]) == {"gate", "up", "down"}
    assert "leaves the target 'down' out" in caplog.text


def test_a_dense_last_layer_of_a_mixture_is_trained(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}
    source = make_tiny_model("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, **sizes)
    partial = {"recovery.kind": "partial", "recovery.last_layers": 1, "n_layers": 1}
    recipe = make_recipe("last_layers", **{**FAST, "recovery.training.min_steps": 1, **partial})
    _load(compress(source, recipe, tmp_path / "out", progress=False))


def test_presets_hold_the_papers_values() -> None:
    specs = {name: load_recipe("sleb", {"recovery": name}).recovery for name in RECOVERY_PRESETS}
    pruner, partial, slices = (specs[name] for name in ("llm_pruner", "last_layers", "slicegpt"))
    assert pruner is not None
    assert partial is not None
    assert slices is not None
    assert (pruner.kind, pruner.rank, pruner.alpha, pruner.dropout) == ("lora", 8, 16, 0.05)
    assert set(pruner.targets) == {"q", "k", "v", "o", "gate", "up", "down"}
    for spec, lr in ((pruner, 1e-4), (partial, 1e-5)):
        training = spec.training
        assert (training.lr, training.epochs, training.warmup_steps) == (lr, 2, 100)
        assert (training.batch_size, training.gradient_accumulation) == (4, 16)
        assert (training.data.form, training.data.sequence_length) == ("instruction", 256)
        assert round(51_760 * training.validation_share) == 2000
        assert not spec.train_on_inputs
    assert (partial.kind, partial.last_layers) == ("partial", 3)
    assert (slices.rank, slices.alpha, slices.training.lr) == (32, 10, 2e-4)
    assert (slices.training.epochs, slices.training.batch_size) == (1, 3)
    changed = load_recipe("sleb", {"recovery.training.lr": 1e-3, "recovery": "llm_pruner"})
    own = changed.recovery
    assert own is not None
    assert (changed.cost, load_recipe("sleb").cost) == ("recovered", "calibrated")
    assert (own.training.lr, own.training.warmup_steps) == (1e-3, 100)


def test_cache_key_follows_the_recovery_and_its_data(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    changes = {
        "recovery": "last_layers",
        "recovery.training.data.source": str(data),
        "calibration": "x.txt",
    }
    keys = set()
    for answer, lr in (("w1", 1e-5), ("w2", 1e-5), ("w2", 2e-5)):
        data.write_text(json.dumps({"instruction": "w3", "output": answer}))
        recipe = load_recipe("last_layers", {**changes, "recovery.training.lr": lr})
        keys.add(content_key(SourceModel(tiny_llama), recipe))
    keys.add(
        content_key(SourceModel(tiny_llama), load_recipe("last_layers", {"calibration": "x.txt"}))
    )
    assert len(keys) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_killed_in_recovery_then_resumed_gives_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from streamline_bench.compression import compress, load_recipe
        recipe = load_recipe("last_layers", {{
            "calibration": {str(text_file)!r}, "n_layers": 2, "recovery.kind": "lora",
            "recovery.dropout": 0.3, "recovery.training.data.sequence_length": 16,
            "recovery.training.min_steps": 60, "recovery.training.batch_size": 2,
            "recovery.training.checkpoint_every": 5,
        }})
        compress({str(tiny_llama)!r}, recipe, Path(sys.argv[1]), progress=False)
        """
    )

    def start(output: Path, cache: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "STREAMLINE_BENCH_CACHE": str(cache)}
        return subprocess.Popen([sys.executable, "-c", script, str(output)], env=environment)

    assert start(tmp_path / "whole", tmp_path / "cache-a").wait() == 0
    victim = start(tmp_path / "killed", tmp_path / "cache-b")
    deadline = time.time() + 240
    while victim.poll() is None and time.time() < deadline:
        if any((tmp_path / "cache-b" / "work").glob("*/recovery/training.safetensors")):
            victim.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    kept = next((tmp_path / "cache-b" / "work").glob("*/compressed.json"))
    steps = _steps(kept.parent / "recovery" / "training.safetensors")
    assert 0 < steps < 60
    assert start(tmp_path / "killed", tmp_path / "cache-b").wait() == 0
    digests = {
        hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "killed")
    }
    assert len(digests) == 1
    assert not list((tmp_path / "cache-b" / "work").iterdir())


def _steps(state: Path) -> int:
    from safetensors import safe_open

    with safe_open(state, framework="pt") as file:
        return int(json.loads(file.metadata()["numbers"])["step"])
