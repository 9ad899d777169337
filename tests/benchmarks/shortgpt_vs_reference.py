"""ShortGPT's block influence beside a public implementation of it: same model, same tokens.

    git clone https://github.com/sramshetty/ShortGPT REFERENCE
    python tests/benchmarks/shortgpt_vs_reference.py --reference REFERENCE \
        --model streamline_bench/demo/model --text streamline_bench/demo/model/calibration.jsonl

The paper has no released code; this repository is the one people use. It is imported from the given
checkout and run unchanged; of it nothing is kept here. It wants Meta's ``llama`` package: a module
of that name hands it the layers of the transformers model instead. Reported: the largest relative
difference of the influences, the orders, the layers removed for every n, and the same for the
angular distance of every block (its ``angular`` mode, on the last token). Exit code 1 when they
differ.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from on_cpu import OnCPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.core.scan import scan
from streamline_bench.core.similarity import Similarity
from streamline_bench.methods.tools.selection import select_lowest

TOLERANCE = 1e-4
"""Relative, on ``1 - cosine``: the reference's float32 cosine of nearly equal vectors."""


class MetaLayer(torch.nn.Module):
    """A decoder layer of transformers, called as the reference calls those of Meta's package."""

    def __init__(self, layer: Any, rotary: Any) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, h: Any, start_pos: int, freqs_cis: Any, mask: Any) -> Any:
        positions = torch.arange(h.shape[1])[None]
        result = self.layer(
            h,
            attention_mask=None if mask is None else mask[None, None],
            position_ids=positions,
            position_embeddings=self.rotary(h, positions),
        )
        return result[0] if isinstance(result, tuple) else result


class MetaTransformer(torch.nn.Module):
    """The attributes of Meta's ``Transformer`` that the reference reads."""

    def __init__(self, model: Any, tokens: CalibrationTokens) -> None:
        super().__init__()
        rows, length = tokens.input_ids.shape
        self.tok_embeddings = model.model.embed_tokens
        self.layers = torch.nn.ModuleList(
            MetaLayer(layer, model.model.rotary_emb) for layer in model.model.layers
        )
        self.norm, self.output = model.model.norm, model.lm_head
        self.freqs_cis = torch.zeros(length)
        self.params = SimpleNamespace(max_batch_size=rows, max_seq_len=length)


def reference(checkout: Path, model: Any, tokens: CalibrationTokens) -> Any:
    """Their ``ShortLlama`` over our model."""
    meta: Any = types.ModuleType("llama")
    meta.Llama, meta.Transformer = SimpleNamespace, MetaTransformer
    sys.modules["llama"] = meta
    sys.path.insert(0, str(checkout / "short_gpt"))
    module = importlib.import_module("short_llama")
    pads = SimpleNamespace(pad_id=-1, eos_id=-1)
    return module.ShortLlama(SimpleNamespace(model=MetaTransformer(model, tokens), tokenizer=pads))


def their_scores(theirs: Any, tokens: CalibrationTokens, n: int | None) -> np.ndarray:
    """Their mean influence per layer, or (``n`` given) mean angular distance per block start."""
    theirs.importances = [0 for _ in theirs.importances]
    theirs.n_prune_layers = n
    with OnCPU():
        for row in tokens.input_ids:
            theirs.eval_importance([row.tolist()], angular=n is not None)
    count = len(tokens) if n is not None else tokens.num_tokens
    return np.array(theirs.importances) / count


def compare(theirs: Any, ours: Similarity, tokens: CalibrationTokens) -> bool:
    """Print the comparison; return whether all agrees."""
    influence, other = ours.block_influence, their_scores(theirs, tokens, None)
    print("| layer | ours | reference |\n|---|---|---|")
    for layer, pair in enumerate(zip(influence, other, strict=True)):
        print(f"| {layer} | {pair[0]:.6f} | {pair[1]:.6f} |")
    worst = float(np.max(np.abs(influence - other) / np.abs(other)))
    removed = all(
        set(select_lowest(dict(enumerate(influence.tolist())), n)) == set(np.argsort(other)[:n])
        for n in range(1, len(influence))
    )
    print(f"largest relative difference {worst:.1e}; the same layers for every n: {removed}")
    agree = worst < TOLERANCE and removed
    for n in range(1, len(influence)):
        blocks = their_scores(theirs, tokens, n)[: len(influence) - n + 1]
        angular = ours.scores(n, "angular")
        apart, same = np.abs(angular - blocks).max(), angular.argmin() == blocks.argmin()
        print(f"angular, n = {n}: largest difference {apart:.1e}, the same block: {bool(same)}")
        agree = agree and apart < TOLERANCE and bool(same)
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama architecture")
    parser.add_argument("--text", type=Path, required=True, help="calibration documents")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    spec = CalibrationSpec(
        source=str(arguments.text), samples=arguments.samples, sequence_length=arguments.length
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = load_calibration(spec, tokenizer, progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = scan(model, tokens, progress=False)
    return 0 if compare(reference(arguments.reference, model, tokens), ours, tokens) else 1


if __name__ == "__main__":
    sys.exit(main())
