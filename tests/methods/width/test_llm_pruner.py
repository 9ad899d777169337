"""Scores of heads and channels against a loop over weights and the loss's own gradients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.architecture import ARCHITECTURES, architecture_of, decoder_layers
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import (
    ArchitectureError,
    NumericsError,
    RecipeError,
    SparsityError,
)
from streamline_bench.methods.tools.gradients import sum_gradients
from streamline_bench.methods.width.llm_pruner import (
    LLMPrunerParameters,
    UnitScores,
    keep_units,
    salience,
    score_units,
)
from streamline_bench.methods.width.narrowing import UNITS_FILE
from streamline_bench.methods.width.width_plan import plan_widths, prunable
from streamline_bench.modeling import register
from streamline_bench.modeling.widths import LayerWidths, head_size, projection_parts

IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])
WIDTHS = LayerWidths(8, 4, 64)
CONFIG = LlamaConfig(head_dim=4)
PARTS = projection_parts(ARCHITECTURES["llama"], WIDTHS, CONFIG)
CRITERIA = ("param_first", "param_second", "param_mix", "vectorize", "l1", "l2")


@pytest.fixture(scope="module")
def gradient_case() -> tuple[Any, CalibrationTokens]:
    """A float64 model and two sequences, one of them shorter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, initializer_range=0.2,
    )  # fmt: skip
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    model = LlamaForCausalLM(config).double().eval()
    return model, CalibrationTokens(IDS, mask, "test", 13, "")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_equal_a_loop_over_weights(
    criterion: Any, gradient_case: tuple[Any, CalibrationTokens]
) -> None:
    model, tokens = gradient_case
    layer = decoder_layers(model)[2]
    paths = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    weights = {(2, path): layer.get_submodule(path).weight for path in paths}
    sums = sum_gradients(model, weights, tokens, squares=True, progress=False)
    scores = score_units(
        2,
        PARTS,
        WIDTHS,
        lambda path: salience(weights[2, path], criterion, sums[2, path]),
        vectorize=criterion == "vectorize",
    )
    expected = loop_scores(model, criterion, {path: weights[2, path] for path in paths})
    for kind in ("query", "key_value", "channel"):
        torch.testing.assert_close(getattr(scores, kind), expected[kind], rtol=1e-5, atol=0)
    groups = [
        expected["key_value"][j] + sum(expected["query"][h] for h in range(8) if h // 2 == j)
        for j in range(4)
    ]
    torch.testing.assert_close(scores.groups(), torch.stack(groups), rtol=1e-5, atol=0)


def loop_scores(model: Any, criterion: str, weights: dict[str, Any]) -> dict[str, Tensor]:
    """Weight by weight, with gradients from the model's own loss."""
    sequences = [IDS[:1], IDS[1:, :5]]
    each = [dict(zip(weights, gradients(model, s, weights), strict=True)) for s in sequences]
    counts = [s.shape[1] - 1 for s in sequences]

    def line(path: str, unit: slice, axis: int) -> Tensor:
        w = weights[path].detach()
        g = sum(c * e[path] for c, e in zip(counts, each, strict=True)) / sum(counts)
        squared = sum(e[path] ** 2 for e in each) / len(each)
        counted = {
            "param_first": w * g, "param_second": w * squared * w,
            "param_mix": w * g - 0.5 * w * squared * w, "vectorize": w * g, "l1": w, "l2": w * w,
        }[criterion]  # fmt: skip
        own = (counted if axis == 0 else counted.T)[unit]
        if criterion == "vectorize":
            return torch.stack([row.sum().abs() for row in own]).sum()
        return own.abs().sum()

    def unit_sum(places: list[tuple[str, int]], count: int, size: int) -> Tensor:
        return torch.stack(
            [
                sum(
                    (line(p, slice(i * size, (i + 1) * size), axis) for p, axis in places),
                    torch.tensor(0.0, dtype=torch.float64),
                )
                for i in range(count)
            ]
        )

    attention = "self_attn."
    return {
        "query": unit_sum([(attention + "q_proj", 0), (attention + "o_proj", 1)], 8, 4),
        "key_value": unit_sum([(attention + "k_proj", 0), (attention + "v_proj", 0)], 4, 4),
        "channel": unit_sum(
            [("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)], 64, 1
        ),
    }


def gradients(model: Any, ids: Tensor, weights: dict[str, Any]) -> Any:
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, list(weights.values()))


def test_fused_projections_score_like_separate_ones() -> None:
    torch.manual_seed(0)
    separate = {name: torch.randn(size, 32) for name, size in {"q": 32, "k": 16, "v": 16}.items()}
    gate, up, output, down = (torch.randn(*s) for s in ((64, 32), (64, 32), (32, 32), (32, 64)))
    fused = {
        "self_attn.qkv_proj": torch.cat(list(separate.values())),
        "mlp.gate_up_proj": torch.cat([gate, up]),
        "self_attn.o_proj": output,
        "mlp.down_proj": down,
    }
    parts = projection_parts(ARCHITECTURES["phi3"], WIDTHS, CONFIG)
    of_fused = score_units(0, parts, WIDTHS, fused.__getitem__)
    plain = {f"self_attn.{k}_proj": v for k, v in {**separate, "o": output}.items()}
    plain |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}
    of_plain = score_units(0, PARTS, WIDTHS, plain.__getitem__)
    for kind in ("query", "key_value", "channel"):
        torch.testing.assert_close(getattr(of_fused, kind), getattr(of_plain, kind))


def test_scores_that_are_not_finite_name_the_layer() -> None:
    values = {part.module: torch.ones(64, 64) for part in PARTS}
    values["mlp.down_proj"][0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"channel.*layer 3\b.*NaN"):
        score_units(3, PARTS, WIDTHS, values.__getitem__)


register()

Source = Callable[..., Path]
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, **changes}
    if family == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
        del sizes["num_key_value_heads"], sizes["head_dim"], sizes["intermediate_size"]
    if family == "gpt2":
        del sizes["num_key_value_heads"]
    if family == "qwen2":
        sizes["vocab_size"] = 264  # all bytes, see byte_tokenizer
    return AutoConfig.for_model(family, **sizes)


def byte_tokenizer() -> Any:
    """Return one of Qwen's kind: transformers reads whatever lies beside a Qwen2 as that."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=tokens[0])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> Source:
    """Return a function that saves a model whose weights and biases all matter."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family}-{changes}"
        if key not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_of(family, **changes))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
            tokenizer = byte_tokenizer() if family == "qwen2" else word_tokenizer
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def prune(make_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that compresses a folder with a recipe made small."""

    def run(folder: Path, name: str = "llm_pruner", **changes: Any) -> Path:
        small = {"calibration_samples": 4, "parameters.channel_multiple": 2, **changes}
        if "n_layers" not in small:
            small.setdefault("sparsity", 0.2)
        recipe = make_recipe(name, **small)
        return compress(folder, recipe, tmp_path / "pruned", progress=False)

    return run


def load(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def with_units_zeroed(folder: Path, pruned: Path) -> Any:
    """Return the source with the removed units' columns of its output projections zeroed."""
    model = load(folder)
    row = architecture_of(model.config)
    size = getattr(model.config, "v_head_dim", None) or head_size(model.config)
    for layer, gone in json.loads((pruned / UNITS_FILE).read_text()).items():
        module = decoder_layers(model)[int(layer)]
        output = module.get_submodule(f"{row.attention}.{row.output}").weight
        output = output.T if row.transposed else output
        with torch.no_grad():
            for head in gone["heads"]:
                output[:, head * size : (head + 1) * size] = 0
            for channel in gone["channels"]:
                down = module.get_submodule(f"{row.mlp}.{row.down}".lstrip(".")).weight
                (down.T if row.transposed else down)[:, channel] = 0
    return model


MIXTURE = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    "num_key_value_heads": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
}  # fmt: skip
CASES = [
    ("llama", "kv_group", {}),
    ("llama", "q_within", {}),
    ("llama", "kv_group", {"num_key_value_heads": 8}),
    ("qwen2", "kv_group", {}),
    ("qwen2", "q_within", {}),
    ("qwen3", "kv_group", {}),
    ("qwen3", "q_within", {}),
    ("mistral", "kv_group", {}),
    ("phi3", "kv_group", {}),
    ("phi3", "q_within", {}),
    ("gemma3_text", "kv_group", {}),
    ("opt", "kv_group", {}),
    ("gemma2", "kv_group", {}),
    ("phi", "kv_group", {}),
    ("smollm3", "kv_group", {"no_rope_layer_interval": 2}),
    ("granite", "kv_group", {"residual_multiplier": 0.7, "embedding_multiplier": 2.0}),
    ("llama", "kv_group", {"attention_bias": True, "mlp_bias": True}),
    ("gpt2", "kv_group", {"n_inner": 64}),
    ("gpt_neox", "kv_group", {}),
    ("mixtral", "kv_group", MIXTURE),
    ("qwen3_moe", "q_within", {**MIXTURE, "moe_intermediate_size": 8, "mlp_only_layers": [1]}),
    ("gpt_oss", "kv_group", {**MIXTURE, "intermediate_size": 8}),
    ("deepseek_v3", "kv_group", LATENT),
    ("deepseek_v3", "kv_group", {**LATENT, "q_lora_rank": None}),
    ("olmo2", "kv_group", {}),
]
ONLY_HEADS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
ONLY_CHANNELS = ("olmo2",)


@pytest.mark.parametrize("recipe", ["llm_pruner", "llm_pruner_uniform"])
@pytest.mark.parametrize(("family", "unit", "changes"), CASES)
def test_slicing_computes_what_zeroing_does(
    family: str,
    unit: str,
    changes: dict[str, Any],
    recipe: str,
    source: Source,
    prune: Callable[..., Path],
) -> None:
    folder = source(family, **changes)
    # Heads alone are few of a mixture's parameters, and they are whole.
    sparsity = {"mixtral": 0.1, "qwen3_moe": 0.12, "deepseek_v3": 0.12}.get(family, 0.2)
    pruned = prune(folder, recipe, sparsity=sparsity, **{"parameters.head_unit": unit})
    model = load(pruned)
    with torch.no_grad():
        expected = with_units_zeroed(folder, pruned)(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, load(folder)(IDS).logits, atol=0.1)
    removed = json.loads((pruned / UNITS_FILE).read_text())
    assert set(removed) == {str(i) for i in (range(6) if "uniform" in recipe else range(1, 5))}
    for layer in removed.values():
        assert bool(layer["heads"]) == (family not in ONLY_CHANNELS)
        assert bool(layer["channels"]) == (family not in ONLY_HEADS)
        groups = unit == "kv_group" and family not in ONLY_CHANNELS
        assert bool(layer["key_value_heads"]) == groups
    manifest = read_manifest(pruned)
    assert manifest is not None
    stays = {"channels"} if family in ONLY_HEADS else {"heads"} if family in ONLY_CHANNELS else {}
    assert set(manifest.chosen.get("stays", ())) == set(stays)
    before = CheckpointReader(folder).num_parameters
    assert manifest.parameters_after == before - manifest.chosen["size"]["removed"]
    coarse = family in ONLY_HEADS
    assert manifest.sparsity_reached == pytest.approx(sparsity, abs=0.08 if coarse else 0.02)
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, greedy(model, 4))


def greedy(model: Any, steps: int) -> Tensor:
    current = IDS
    with torch.no_grad():
        for _ in range(steps):
            best = model(current, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            current = torch.cat([current, best], dim=1)
    return current


def test_uniform_results_are_stock_checkpoints(source: Source, prune: Callable[..., Path]) -> None:
    """Two of eight heads of a Qwen2 leave six, which need not divide its hidden size."""
    written = json.loads((prune(source("qwen2"), "llm_pruner_uniform") / "config.json").read_text())
    assert written["model_type"] == "qwen2"
    assert written["architectures"] == ["Qwen2ForCausalLM"]
    assert (written["num_attention_heads"], written["num_key_value_heads"]) == (6, 3)
    assert written["head_dim"] == 4


def test_llama_that_its_own_config_refuses_becomes_a_mistral(
    source: Source, prune: Callable[..., Path]
) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    folder = source("llama", rope_parameters=rope)
    pruned = prune(folder, "llm_pruner_uniform")
    written = json.loads((pruned / "config.json").read_text())
    assert written["architectures"] == ["MistralForCausalLM"]
    assert written["sliding_window"] is None
    assert written["rope_parameters"] == rope
    assert {"attention_bias", "pretraining_tp"}.isdisjoint(written)
    wide = load(folder)
    assert set(CheckpointReader(pruned).names) == set(CheckpointReader(folder).names)
    widths = LayerWidths(6, 3, written["intermediate_size"])
    entries = wide.config.to_dict() | {"layer_widths": [widths.to_dict()] * 6}
    entries |= {"model_type": "streamline", "host_model_type": "llama", "architectures": None}
    (pruned / "config.json").write_text(json.dumps(entries))
    with torch.no_grad():
        as_llama = load(pruned)(IDS).logits
    (pruned / "config.json").write_text(json.dumps(written))
    with torch.no_grad():
        assert torch.equal(load(pruned)(IDS).logits, as_llama)


def test_the_lowest_units_go_and_of_equals_the_first() -> None:
    config = config_of("llama")
    scores = UnitScores(
        query=torch.tensor([9.0, 1, 5, 5, 0, 2, 7, 8]),
        key_value=torch.tensor([0.0, 0, 9, 0]),
        channel=torch.arange(64.0).flip(0),
    )
    plan = plan_widths(prunable(config), range(6), ratio=0.25)
    kept = keep_units(scores, plan.head_units, plan.channels)
    assert kept.key_value.tolist() == [1, 2, 3]  # 10, 10, 11, 15: the first of the equals goes
    assert kept.query.tolist() == [2, 3, 4, 5, 6, 7]
    assert kept.channel.tolist() == list(range(48))
    plan = plan_widths(prunable(config, "q_within"), range(6), ratio=0.5)
    kept = keep_units(scores, plan.head_units, plan.channels, "q_within")
    assert kept.query.tolist() == [0, 3, 5, 7]
    assert kept.key_value.tolist() == [0, 1, 2, 3]


def test_protected_layers_follow_the_depth() -> None:
    assert LLMPrunerParameters().layers(32) == range(4, 30)
    assert LLMPrunerParameters().layers(28) == range(4, 26)
    assert LLMPrunerParameters().layers(8) == range(1, 7)
    assert LLMPrunerParameters(protect_first=0, protect_last=3).layers(8) == range(5)
    assert LLMPrunerParameters(profile="uniform").layers(8) == range(8)


# Other criteria, from folder to folder


@pytest.mark.parametrize(
    "criterion", ["param_second", "param_mix", "vectorize", "l1", "l2", "random"]
)
def test_every_criterion_prunes(criterion: str, source: Source, prune: Callable[..., Path]) -> None:
    pruned = prune(source("llama"), **{"parameters.criterion": criterion})
    manifest = read_manifest(pruned)
    assert manifest is not None
    assert manifest.chosen["criterion"] == criterion
    assert bool(manifest.calibration) == (criterion not in ("l1", "l2", "random"))
    assert load(pruned)(IDS).logits.isfinite().all()


def test_layers_of_different_widths_recover_by_lora(
    source: Source, prune: Callable[..., Path], text_file: Path
) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft (pip install peft)")
    training = {"data.source": str(text_file), "data.sequence_length": 16, "data.samples": 8,
                "epochs": 1, "min_steps": 2}  # fmt: skip
    changes = {f"recovery.training.{key}": value for key, value in training.items()}
    pruned = prune(source("llama"), "llm_pruner_lora", **changes)
    model = load(pruned)
    heads = [layer.self_attn.q_proj.out_features // 4 for layer in decoder_layers(model)]
    assert heads == [8, 6, 6, 6, 6, 8]
    manifest = read_manifest(pruned)
    assert manifest is not None
    assert manifest.training is not None
    assert manifest.training["recovery"]["kind"] == "lora"


def test_random_units_follow_the_seed(source: Source, make_recipe: Any, tmp_path: Path) -> None:
    def units(seed: int, name: str) -> str:
        changes = {"sparsity": 0.2, "seed": seed, "parameters.criterion": "random"}
        out = compress(source("llama"), make_recipe("llm_pruner", **changes), tmp_path / name)
        return (out / UNITS_FILE).read_text()

    assert units(1, "a") == units(1, "b") != units(2, "c")


# Bad input


def test_layers_are_not_what_it_removes(source: Source, prune: Callable[..., Path]) -> None:
    with pytest.raises(SparsityError, match=r"n_layers=2.*sparsity"):
        prune(source("llama"), n_layers=2)


def test_out_of_reach(source: Source, prune: Callable[..., Path]) -> None:
    with pytest.raises(SparsityError, match=r"\b4 of 6\b.*protect fewer"):
        prune(source("llama"), sparsity=0.9)
    with pytest.raises(SparsityError, match=r"\b6 layers\b.*protect_first"):
        prune(source("llama"), **{"parameters.protect_first": 6})


def test_sparsity_and_ratio_are_alternatives(
    source: Source, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"sparsity.*parameters\.ratio"):
        make_recipe("llm_pruner", **{"sparsity": 0.2, "parameters.ratio": 0.25})
    sparse = make_recipe("llm_pruner", sparsity=0.2, calibration_samples=4)
    parameters = {**sparse.parameters, "ratio": 0.25}  # as a file of one's own may have both
    both = sparse.model_copy(update={"parameters": parameters})
    with pytest.raises(SparsityError, match=r"sparsity.*ratio"):
        compress(source("llama"), both, tmp_path / "pruned", progress=False)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"parameters.profile": "uniform", "parameters.protect_first": 2}, "protects no layer"),
        ({"parameters.criterion": "param_third"}, "criterion"),
        ({"parameters.channel_multiple": 0}, "channel_multiple"),
        ({"parameters.head_unti": "kv_group"}, "did you mean 'parameters.head_unit'"),
    ],
)
def test_wrong_parameters(
    changes: dict[str, Any], problem: str, make_recipe: Callable[..., Any]
) -> None:
    with pytest.raises(RecipeError, match=problem):
        make_recipe("llm_pruner", sparsity=0.2, **changes)


def test_a_ratio_that_removes_nothing(source: Source, prune: Callable[..., Path]) -> None:
    """Channels of a mixture stay, and a twentieth of eight heads is none."""
    with pytest.raises(SparsityError, match=r"0\.05 removes nothing"):
        plan_widths(prunable(config_of("mixtral", **MIXTURE)), range(6), ratio=0.05)


def test_heads_of_a_mixture_reach_less(source: Source, prune: Callable[..., Path]) -> None:
    with pytest.raises(SparsityError, match=r"removing heads reaches 0\.\d+ to 0\.\d+"):
        prune(source("mixtral", **MIXTURE), sparsity=0.9)


def test_an_inferred_family_is_checked(
    source: Source, prune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused projection may hold the heads in this order or in that."""
    row = replace(ARCHITECTURES["gpt_neox"], inferred=True)
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", row)  # type: ignore[arg-type]
    folder = source("gpt_neox", num_key_value_heads=8)
    pruned = prune(folder)
    with torch.no_grad():
        expected = with_units_zeroed(folder, pruned)(IDS).logits
        torch.testing.assert_close(load(pruned)(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    wrong = replace(row, fused_by_head=False)
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", wrong)  # type: ignore[arg-type]
    shutil.rmtree(pruned)
    with pytest.raises(ArchitectureError, match=r"'gpt_neox'.*with them zeroed"):
        prune(folder)


def test_a_layer_of_another_kind_is_named(
    source: Source, prune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = CheckpointReader(source("llama")).names
    lacking = [name for name in names if "layers.2.self_attn.k_proj" not in name]
    monkeypatch.setattr(CheckpointReader, "names", lacking)
    with pytest.raises(ArchitectureError, match=r"Layer 2\b.*'self_attn\.k_proj\.weight'"):
        prune(source("llama"), **{"parameters.criterion": "random"})
