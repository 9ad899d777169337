"""Attention and MLP removal beside the authors' code: same model, same tokens.

    git clone https://github.com/CASE-Lab-UMD/LLM-Drop DROP
    git clone https://github.com/MrGGLS/BlockPruner BLOCKS
    python tests/benchmarks/sublayers_vs_reference.py --drop DROP --blocks BLOCKS \\
        --model streamline_bench/demo/model --text streamline_bench/demo/model/calibration.jsonl

LLM-Drop's ``layer_drop.py`` and BlockPruner's ``block_search.py`` and ``utils.py`` are imported
from the given checkouts and run in float32; of them nothing is kept here. What newer versions of
transformers call otherwise is handed in: decoder layers give a tensor and need rotary embeddings,
attention gives two values. Reported: cosines of every sub-layer and the joint ranking; blocks
removed and the loss after each step. Exit code 1 when they differ.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.forward import replaced_forward
from streamline_bench.core.recipe.schema import CalibrationSpec

TOLERANCE = 1e-5
"""Of cosines, and of losses in nats (relative): float32 in two orders of summation."""
KIND = {"attn": "attention", "mha": "attention", "mlp": "mlp"}


class _AsOneOutput(torch.nn.Module):
    """A decoder layer as their loop calls it: mask and positions given, a tuple returned."""

    def __init__(self, layer: Any, model: Any) -> None:
        super().__init__()
        self._inner, self._model = [layer], [model.model]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._inner[0], name)

    def forward(self, states: torch.Tensor, **given: Any) -> tuple[torch.Tensor]:
        given = {key: value for key, value in given.items() if value is not None}
        positions = given["position_ids"]
        given["position_embeddings"] = self._model[0].rotary_emb(states, position_ids=positions)
        return (self._inner[0](states, **given),)


def their_cosines(checkout: Path, model: Any, tokens: CalibrationTokens) -> dict[str, list[float]]:
    """``get_layer_similarities`` of both kinds, on batches of one sequence."""
    package = types.ModuleType("prune")
    package.__path__ = [str(checkout / "src" / "llmtuner" / "compression" / "prune")]
    sys.modules["prune"] = package  # whose own __init__ imports all of LLaMA-Factory
    module = importlib.import_module("prune.layer_drop")
    module.print_gpu_memory = lambda accelerator: None
    own = list(model.model.layers)
    found = {}
    accelerator = module.Accelerator(cpu=True)
    for kind in ("attn", "mlp"):
        loader = [{"input_ids": row[None]} for row in tokens.input_ids]
        model.model.layers = torch.nn.ModuleList(_AsOneOutput(layer, model) for layer in own)
        found[kind] = module.get_layer_similarities(
            model, loader, accelerator, len(loader), True, kind
        ).tolist()
    model.model.layers = torch.nn.ModuleList(own)
    return found


def their_search(checkout: Path, model: Any, tokens: CalibrationTokens, n: int) -> dict[str, Any]:
    """``block_search_by_ppl``; return block and loss of every step."""
    sys.path.insert(0, str(checkout))
    search, measures = importlib.import_module("block_search"), importlib.import_module("utils")
    measures.device = torch.device("cpu")

    def three_values(own: Any) -> Any:
        def forward(*args: Any, **given: Any) -> Any:
            for dated in ("output_attentions", "use_cache", "past_key_value"):
                given.pop(dated)
            return (*own(*args, **given), None)

        return forward

    class Block(search.MaskedLlamaDecoderLayer):  # type: ignore[name-defined, misc]
        def forward(self, *args: Any, **given: Any) -> Any:
            if self.self_attn is None:
                return super().forward(*args, **given)[0]
            with replaced_forward(self.self_attn, three_values(self.self_attn.forward)):
                return super().forward(*args, **given)[0]

    search.MaskedLlamaDecoderLayer = Block
    model.config.use_cache = False
    losses: list[float] = []
    measure = measures.evaluate_ppl

    def noted(*args: Any, **given: Any) -> float:
        losses.append(math.log(measure(*args, **given)))
        return math.exp(losses[-1])

    measures.evaluate_ppl = noted
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
               for row in tokens.input_ids]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked = argparse.Namespace(
            block_type="mix", del_block_num=n, cal_dataset="text", cal_nsamples=len(batches),
            ppl_search_path=folder, model_path="model",
        )  # fmt: skip
        search.block_search_by_ppl(asked, model, batches)
        (file,) = Path(folder).glob("*.json")
        sets = [
            {(KIND[kind], layer) for kind, layer in blocks}
            for blocks in json.loads(file.read_text()).values()
        ]
    tried, lowest = 2 * len(model.model.layers), []
    for step in range(n):
        lowest.append(min(losses[: tried - step]))
        del losses[: tried - step]
    steps = [next(iter(later - earlier))
             for earlier, later in zip([set(), *sets], sets, strict=False)]  # fmt: skip
    return {"steps": steps, "losses": lowest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--drop", type=Path, required=True, help="a checkout of LLM-Drop")
    parser.add_argument("--blocks", type=Path, required=True, help="a checkout of BlockPruner")
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama architecture")
    parser.add_argument("--text", type=Path, required=True, help="calibration documents")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--blocks-removed", type=int, default=6)
    asked = parser.parse_args()
    logging.disable(logging.INFO)
    spec = CalibrationSpec(
        source=str(asked.text), samples=asked.samples, sequence_length=asked.length
    )
    tokens = load_calibration(spec, AutoTokenizer.from_pretrained(asked.model), progress=False)
    chosen = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("joint_drop", "block_pruner"):
            recipe = load_recipe(name, {"parameters.sublayers": asked.blocks_removed})
            recipe = recipe.model_copy(update={"calibration": spec})
            made = Path(folder) / name
            out = compress(asked.model, recipe, made, cache=Path(folder) / "c", progress=False)
            manifest = read_manifest(out)
            assert manifest is not None
            chosen[name] = manifest.chosen
    other = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    cosines = their_cosines(asked.drop, other, tokens)
    worst = max(
        abs(value - chosen["joint_drop"]["scores"][KIND[kind]][str(layer)])
        for kind, values in cosines.items()
        for layer, value in enumerate(values)
    )
    flat = [(value, KIND[kind], layer) for kind, of in cosines.items()
            for layer, value in enumerate(of)]  # fmt: skip
    ranking = [[layer, kind] for _, kind, layer in sorted(flat, key=lambda each: -each[0])]
    same = chosen["joint_drop"]["order"] == ranking[: asked.blocks_removed]
    print(f"cosines: largest difference {worst:.1e}; the same joint ranking: {same}")
    search = their_search(asked.blocks, other, tokens, asked.blocks_removed)
    ours = chosen["block_pruner"]
    print("| step | ours | reference | loss, ours | reference |\n|---|---|---|---|---|")
    apart, alike = 0.0, True
    steps = zip(
        ours["order"], search["steps"], ours["loss_after_step"], search["losses"], strict=True
    )
    for step, ((layer, kind), (their_kind, their_layer), loss, their_loss) in enumerate(steps, 1):
        apart = max(apart, abs(loss / their_loss - 1))
        alike &= (layer, kind) == (their_layer, their_kind)
        blocks = f"{kind} {layer} | {their_kind} {their_layer}"
        print(f"| {step} | {blocks} | {loss:.6f} | {their_loss:.6f} |")
    print(f"the same blocks: {alike}; losses: largest relative difference {apart:.1e}")
    return 0 if same and alike and worst < TOLERANCE and apart < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
