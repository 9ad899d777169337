"""REAP's scores beside its authors' code: same random mixtures, same tokens.

    git clone https://github.com/CerebrasResearch/reap REFERENCE
    python tests/benchmarks/reap_vs_reference.py --reference REFERENCE

The functions of its ``pruning_metrics.py`` are called as its observer calls them, with what every
expert gives for every token; they are run unchanged, and of them nothing is kept here. Its observer
asks for experts in a list, which transformers 5 has fused, so that the hook is a stand-in. It
normalises router weights where the config says ``norm_topk_prob``; Mixtral, which normalises them
without saying so, is scored both ways. Reported: the largest relative difference of the scores, and
how many of the experts that a quarter fewer would remove differ. Exit code 1 when one differs where
both weigh alike.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.compression import load_recipe
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.methods.base import Compression
from streamline_bench.methods.experts.expert_pruning import (
    ExpertParameters,
    keep_experts,
    mixture_of,
    score_experts,
)
from streamline_bench.modeling.loading import SourceModel

EXPERTS, CHOSEN, SHARE = 16, 4, 4
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": CHOSEN, "max_position_embeddings": 256,
}  # fmt: skip
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 48, "head_dim": 16}
MIXTRAL = {"num_local_experts": EXPERTS, "intermediate_size": 48}
CASES: tuple[tuple[str, dict[str, Any], bool, bool], ...] = (
    ("qwen3_moe", {**QWEN, "norm_topk_prob": True}, True, True),
    ("qwen3_moe", {**QWEN, "norm_topk_prob": False}, False, True),
    ("mixtral", MIXTRAL, True, True),
    ("mixtral", MIXTRAL, False, False),
)
"""Model type, its config, whether the reference normalises, and whether that is as the model does.
"""


def random_mixture(kind: str, entries: dict[str, Any], folder: Path) -> Path:
    """Save a random model whose routers have clear preferences."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **entries))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 if "gate.weight" in name else 0.15)
    model.save_pretrained(folder)
    return folder


def of_every_expert(experts: Any, states: Tensor) -> Tensor:
    """Return what each expert gives for each token, ``[experts, tokens, hidden]``."""
    found = []
    for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, value = nn.functional.linear(states, up).chunk(2, dim=-1)
        found.append(nn.functional.linear(nn.functional.silu(gate) * value, down))
    return torch.stack(found)


def theirs(metrics: Any, model: Any, tokens: Tensor, normalised: bool) -> list[dict[str, Any]]:
    """Return the reference's statistics of every layer."""
    states = [metrics.initialize_pruning_state(EXPERTS) for _ in decoder_layers(model)]

    def hook(layer: int) -> Any:
        def look(module: Any, args: Any, _: Any) -> None:
            flat = args[0].view(-1, args[0].shape[-1])
            logits = nn.functional.linear(flat, module.gate.weight)
            metrics.update_pruning_state(
                states[layer], activations=of_every_expert(module.experts, flat),
                selected_experts=logits.topk(CHOSEN, dim=-1).indices, router_logits=logits,
                num_experts=EXPERTS, renormalize_router_weights=normalised,
            )  # fmt: skip

        return look

    hooks = [
        layer.mlp.register_forward_hook(hook(n)) for n, layer in enumerate(decoder_layers(model))
    ]
    with torch.no_grad():
        for ids in tokens:
            model(ids[None], use_cache=False)
    for each in hooks:
        each.remove()
    return states


def compared(metrics: Any, kind: str, entries: dict[str, Any], normalised: bool) -> int:
    """Print a line for each criterion; return how many experts differ."""
    with tempfile.TemporaryDirectory() as made:
        folder = random_mixture(kind, entries, Path(made) / "model")
        source = SourceModel(folder)
        work = Compression(source, load_recipe("reap"), Path(made), progress=False)
        ids = torch.randint(
            3, SIZES["vocab_size"], (16, 128), generator=torch.Generator().manual_seed(1)
        )
        tokens = CalibrationTokens.from_tensors(
            ids, torch.ones_like(ids, dtype=torch.bool), "drawn"
        )
        mixture = mixture_of(work.config)
        states = theirs(metrics, work.model, ids, normalised)
        different = 0
        for criterion, name in (("reap", "reap"), ("frequency", "expert_frequency"),
                                ("ean", "ean_sum")):  # fmt: skip
            options = ExpertParameters.model_validate({"criterion": criterion})
            ours = score_experts(work, mixture, options, tokens)
            error, apart = 0.0, 0
            for layer, state in enumerate(states):
                value = state[name].mean if criterion == "reap" else state[name]
                other = value.double()
                error = max(error, float(((ours[layer] - other).abs() / other).max()))
                gone = set(other.topk(EXPERTS // SHARE, largest=False).indices.tolist())
                stay = keep_experts(ours[layer], EXPERTS - EXPERTS // SHARE)
                apart += len(gone & set(stay))
            different += apart
            how = "normalised" if normalised else "as the softmax has them"
            print(f"| {kind} | {how} | {criterion} | {error:.1e} | {apart} of "
                  f"{len(states) * (EXPERTS // SHARE)} |")  # fmt: skip
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.reference / "src"))
    metrics = importlib.import_module("reap.pruning_metrics")
    print("| model | router weights, reference | criterion | largest relative difference | "
          "experts removed that differ |\n|---|---|---|---|---|")  # fmt: skip
    wrong = 0
    for kind, entries, normalised, alike in CASES:
        different = compared(metrics, kind, entries, normalised)
        wrong += different if alike else 0
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
