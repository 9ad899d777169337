"""Scores of experts against a loop over tokens, results against a model that cannot choose some."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import ArchitectureError, SparsityError
from streamline_bench.methods.experts.expert_pruning import (
    EXPERTS_FILE,
    ExpertParameters,
    Mixture,
    keep_experts,
    mixture_of,
    plan_experts,
    score_experts,
)

IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
        "mlp_only_layers": [1], "norm_topk_prob": False,
    },
    "gpt_oss": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "head_dim": 4,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 6,
    },
    "phimoe": {"num_local_experts": 8},  # files call its router otherwise than the model
}  # fmt: skip


@pytest.fixture(scope="module")
def source(make_tiny_model: Callable[..., Path]) -> Callable[[str], Path]:
    """Return a function that saves a three-layer mixture whose routers and biases matter."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_model(family, num_hidden_layers=3, **FAMILIES[family])
            model = AutoModelForCausalLM.from_pretrained(made[family])
            torch.manual_seed(0)
            with torch.no_grad():
                for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                    if "inv_freq" in name or ("norm" in name and tensor.dim() == 1):
                        continue
                    tensor.copy_(0.3 * torch.randn_like(tensor))
            model.save_pretrained(made[family])
        return made[family]

    return make


def loaded(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float64, experts_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_result_is_the_dense_model_that_cannot_choose_the_removed(
    family: str, source: Callable[[str], Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    folder = source(family)
    small = {
        "calibration_samples": 4,
        "sequence_length": 16,
        "parameters.ratio": 0.25,
        "n_layers": None,
    }
    recipe = make_recipe("reap", **small)
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    dense, pruned, manifest = loaded(folder), loaded(out), read_manifest(out)
    assert manifest is not None
    assert pruned.config.model_type == family
    before = CheckpointReader(folder).num_parameters
    assert before - manifest.parameters_after == manifest.chosen["size"]["removed"]
    assert manifest.parameters_after == sum(p.numel() for p in pruned.parameters())
    removed = json.loads((out / EXPERTS_FILE).read_text())
    with_experts = {"qwen3_moe": ["0", "2"], "deepseek_v3": ["1", "2"]}
    assert list(removed) == with_experts.get(family, ["0", "1", "2"])
    for layer, gone in removed.items():
        assert len(gone) == 2
        mlp = decoder_layers(dense)[int(layer)].mlp
        stays = torch.tensor([i for i in range(8) if i not in gone])
        if family == "deepseek_v3":  # one of each group, so that groups stay what they are
            assert [i // 4 for i in gone] == [0, 1]
        _narrow(mlp, stays)
    with torch.no_grad():
        torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-9, atol=1e-9)
    generated = pruned.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape[1] == IDS.shape[1] + 3


def _narrow(mlp: Any, stays: torch.Tensor) -> None:
    """Give a router in memory the rows of some experts, and let it name them as before."""
    router = getattr(mlp, "gate", None) or mlp.router
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.shape[0] == 8:
            tensor.data = tensor.data[stays]
    for holder in (router, mlp):
        for name in ("num_experts", "n_routed_experts"):
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, len(stays))
    inner = mlp.experts.forward
    mlp.experts.forward = lambda states, chosen, weights: inner(states, stays[chosen], weights)


@pytest.mark.parametrize("criterion", ["reap", "frequency", "ean"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_scores_equal_a_loop_over_tokens(
    criterion: Any, family: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    import types

    model = loaded(source(family))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    tokens = CalibrationTokens(IDS, mask, "test", 13, "")
    mixture = mixture_of(model.config)
    work: Any = types.SimpleNamespace(
        model=model, config=model.config, work=tmp_path, progress=False
    )
    options = ExpertParameters(criterion=criterion)
    scores = score_experts(work, mixture, options, tokens)
    states: dict[int, list[torch.Tensor]] = {}
    for layer in mixture.layers:
        decoder_layers(model)[layer].mlp.register_forward_pre_hook(
            lambda m, args, layer=layer: states.setdefault(layer, []).extend(args[0][0])
        )
    with torch.no_grad():
        model(IDS[:1])
        model(IDS[1:, :5])
    for layer in mixture.layers:
        mlp = decoder_layers(model)[layer].mlp
        routed: dict[int, list[tuple[float, float]]] = {e: [] for e in range(8)}
        for state in states[layer]:
            logits = [float(row @ state) for row in mlp.gate.weight.detach()]
            shares = torch.tensor(logits, dtype=torch.float64).softmax(0)
            best = sorted(range(8), key=lambda e: -logits[e])[:2]
            total = float(shares[best].sum()) if family == "mixtral" else 1.0
            for e in best:
                gate, up = mlp.experts.gate_up_proj[e].detach() @ state.view(-1), None
                gate, up = gate.chunk(2)
                given = mlp.experts.down_proj[e].detach() @ (torch.nn.functional.silu(gate) * up)
                routed[e].append((float(shares[e]) / total, float(given.norm())))
        assert sum(map(len, routed.values())) == 2 * 13
        for e, found in routed.items():
            expected = {
                "frequency": len(found),
                "ean": sum(norm for _, norm in found),
                "reap": sum(g * norm for g, norm in found) / max(len(found), 1),
            }[criterion]
            assert float(scores[layer][e]) == pytest.approx(expected, rel=1e-5)


def test_streamed_gives_the_same_bytes_as_resident(
    source: Callable[[str], Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    small = {
        "calibration_samples": 4,
        "sequence_length": 16,
        "parameters.ratio": 0.25,
        "n_layers": None,
    }
    made = []
    for placement in ("resident", "streamed"):
        options: dict[str, Any] = {"placement": placement, "cache": tmp_path / f"of-{placement}"}
        recipe = make_recipe("reap", **small)
        out = tmp_path / placement
        made.append(compress(source("qwen3_moe"), recipe, out, progress=False, **options))
    for name in ("model.safetensors", "config.json", EXPERTS_FILE):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


MIXTURE = Mixture("num_experts", 8, 2, 1, 2, (0, 1), 100, 2000, 100)


def test_sizes() -> None:
    assert plan_experts(MIXTURE, sparsity=0.25).experts_after == 5  # 2.5 each, rounded up
    assert plan_experts(MIXTURE, ratio=0.5).removed == 800
    grouped = Mixture("n_routed_experts", 8, 2, 4, 4, (0, 1), 100, 2000, 100)
    assert plan_experts(grouped, ratio=0.6).experts_after == 4
    with pytest.raises(SparsityError, match=r"0\.8 is out of reach.*0\.1000 to 0\.6000.*to 2"):
        plan_experts(MIXTURE, sparsity=0.8)
    with pytest.raises(SparsityError, match="one of the two"):
        plan_experts(MIXTURE)


def test_the_lowest_go_and_of_equals_the_first() -> None:
    scores = torch.tensor([3.0, 1, 1, 5, 0, 9, 9, 9])
    assert keep_experts(scores, 6) == [0, 2, 3, 5, 6, 7]
    assert keep_experts(scores, 6, groups=2) == [0, 2, 3, 5, 6, 7]
    assert keep_experts(scores, 4, groups=2) == [0, 3, 6, 7]


def test_models_without_experts_are_refused_by_name() -> None:
    with pytest.raises(ArchitectureError, match=r"'llama'.*not known to have any"):
        mixture_of(AutoConfig.for_model("llama"))
    two = AutoConfig.for_model("mixtral", num_local_experts=2, hidden_size=32,
                               intermediate_size=16, num_hidden_layers=1)  # fmt: skip
    with pytest.raises(ArchitectureError, match=r"of 2 experts each token is routed to 2"):
        mixture_of(two)


@pytest.mark.parametrize(("experts", "chosen", "left"), [(8, 2, 4), (12, 4, 8)])
def test_an_open_group_keeps_as_many_experts_as_a_token_is_routed_to(
    experts: int, chosen: int, left: int
) -> None:
    """Of two groups one is open; with fewer experts, none can be chosen, or those of the other."""
    sizes = {**FAMILIES["deepseek_v3"], "n_routed_experts": experts, "num_experts_per_tok": chosen}
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=100, **sizes,
    )  # fmt: skip
    assert mixture_of(config).least == left
    assert _routed_within_a_group(config, left)
    assert not _routed_within_a_group(config, left - 2)


def _routed_within_a_group(config: Any, experts: int) -> bool:
    config.n_routed_experts = experts
    model, seen = AutoModelForCausalLM.from_config(config).eval(), []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda module, args: seen.append(args[1] // (experts // 2))
    )
    try:
        model(IDS)
    except RuntimeError:  # too few to rank the groups by
        return False
    return all(bool((groups == groups[:, :1]).all()) for groups in seen)
