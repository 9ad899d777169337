"""Prune&Comp beside its authors' code: same model, same tokens.

    git clone https://github.com/chenxinrui-tsinghua/PruneAndComp REFERENCE
    python tests/benchmarks/prune_comp_vs_reference.py --reference REFERENCE \
        --model streamline_bench/demo/model --text streamline_bench/demo/model/calibration.jsonl \
        --held-out streamline_bench/demo/model/held_out.jsonl

``CosSim_BI.py`` and ``magcomp.py`` are imported from the given checkout and run unchanged, in
float32; of them nothing is kept here. Their evaluation is not imported. Reported, for every layer
removed: the same layer or not, and the ratio of magnitudes; then the largest difference of the
log-probabilities of both results and their perplexities on the held-out text. The reference scales
the embeddings: where the LM head shares them, it scales the logits, too, which is divided out
before they are compared. Exit code 1 when they differ.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from on_cpu import OnCPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec

TOLERANCE = 1e-3
"""Of ratios (relative) and of log-probabilities: the reference scales weights once per step."""


def imported(checkout: Path) -> tuple[Any, Any]:
    """Their modules of block influence and of compensation."""
    evaluation: Any = types.ModuleType("eval_utils")
    evaluation.evaluate = evaluation.create_logger = None
    data: Any = types.ModuleType("data_utils.calibration_dataset")
    data.get_wikitext2 = None
    sys.modules.update({"eval_utils": evaluation, "data_utils": types.ModuleType("data_utils"),
                        "data_utils.calibration_dataset": data})  # fmt: skip
    sys.path.insert(0, str(checkout))
    return importlib.import_module("CosSim_BI"), importlib.import_module("magcomp")


def theirs(
    checkout: Path, model: Any, tokens: CalibrationTokens, n: int
) -> tuple[list[int], list[float]]:
    """Remove n layers as their main loop does; return the layers and the ratios."""
    influence, compensation = imported(checkout)
    influence.dev = torch.device("cpu")
    loader = [(row[None],) for row in tokens.input_ids]
    left, removed, ratios = list(range(len(model.model.layers))), [], []
    with OnCPU():
        for _ in range(n):
            layer = influence.BI(model, loader)[0]
            ratio = compensation.get_scale_params(
                model, loader, layer, layer + 1, influence.dev, num_sample=len(loader)
            )
            kept = [each for i, each in enumerate(model.model.layers) if i != layer]
            model.model.layers = torch.nn.ModuleList(kept)
            compensation.fuse_scale(model, ratio, layer)
            removed.append(left.pop(layer))
            ratios.append(float(ratio))
    return removed, ratios


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor, divisor: float = 1.0) -> torch.Tensor:
    """Of the next token, after logits are divided."""
    logits: torch.Tensor = model(ids, use_cache=False).logits.double() / divisor
    return logits.log_softmax(-1)


def perplexity(model: Any, ids: torch.Tensor, divisor: float = 1.0) -> float:
    """Of sequences ``[n, T]`` without pads."""
    found = log_probabilities(model, ids, divisor)[:, :-1].gather(-1, ids[:, 1:, None])
    return math.exp(-float(found.mean()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama architecture")
    parser.add_argument("--text", type=Path, required=True, help="calibration documents")
    parser.add_argument("--held-out", type=Path, required=True, help="documents for perplexity")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="how many are removed")
    asked = parser.parse_args()
    spec = CalibrationSpec(
        source=str(asked.text), samples=asked.samples, sequence_length=asked.length
    )
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokens = load_calibration(spec, tokenizer, progress=False)
    held_out = spec.model_copy(update={"source": str(asked.held_out), "samples": 32})
    unseen = load_calibration(held_out, tokenizer, progress=False).input_ids
    recipe = load_recipe("prune_comp", {"n_layers": asked.layers})
    recipe = recipe.model_copy(update={"calibration": spec})
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        out = compress(asked.model, recipe, made / "out", cache=made / "cache", progress=False)
        manifest = read_manifest(out)
        ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert manifest is not None
    other = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    removed, ratios = theirs(asked.reference, other, tokens, asked.layers)
    gaps = manifest.chosen["gaps"]
    print("| step | layer, ours | reference | ratio, ours | reference |\n|---|---|---|---|---|")
    for step, (gap, layer, ratio) in enumerate(zip(gaps, removed, ratios, strict=True), 1):
        print(f"| {step} | {gap['layer']} | {layer} | {gap['ratio']:.5f} | {ratio:.5f} |")
    worst = max(abs(gap["ratio"] / ratio - 1) for gap, ratio in zip(gaps, ratios, strict=True))
    tied = bool(other.config.tie_word_embeddings)
    ids = tokens.input_ids[:4]
    found = log_probabilities(ours, ids)
    divisor = math.prod(ratios) if tied else 1.0
    apart = (found - log_probabilities(other, ids, divisor)).abs().max()
    print(f"ratios: largest relative difference {worst:.1e}; log-probabilities: {float(apart):.1e}")
    if tied:
        scaled = (found - log_probabilities(other, ids)).abs().max()
        print(f"with the reference's scaled LM head: {float(scaled):.1e}")
        print(f"perplexity with that head: {perplexity(other, unseen):.4f}")
    both = perplexity(ours, unseen), perplexity(other, unseen, divisor)
    print(f"perplexity: ours {both[0]:.4f}, reference {both[1]:.4f}")
    same = [gap["layer"] for gap in gaps] == removed
    return 0 if same and worst < TOLERANCE and float(apart) < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
