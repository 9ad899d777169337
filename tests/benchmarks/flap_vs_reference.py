"""FLAP beside its authors' code: same model, same tokens.

    git clone https://github.com/CASIA-IVA-Lab/FLAP REFERENCE
    python tests/benchmarks/flap_vs_reference.py --reference REFERENCE \
        --text streamline_bench/demo/model/calibration.jsonl

``lib/prune.py`` and ``lib/layerwrapper.py`` are imported from the given checkout and run unchanged,
in float32; of them nothing is kept here. They know one head size (128), as many key-value heads as
heads, and models whose output projections have biases, so that the model is a random Llama of that
form, saved to a temporary folder. The reference's share is of the layers' weights; ours, of all
parameters, is set to what the reference removed. Reported: heads and channels that differ, those
that differ once our scores are summed the way the reference sums them (squares around a running
mean, from the second sequence on), and the largest difference of our biases from those that the
reference's means give, which it keeps in float16. Exit code 1 when the units differ in its order.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from on_cpu import OnCPU
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.methods.width.flap import ColumnScores, column_score, search
from streamline_bench.methods.width.narrowing import UNITS_FILE
from streamline_bench.methods.width.width_plan import prunable

PATHS = ("self_attn.o_proj", "mlp.down_proj")
DEMO = Path("streamline_bench/demo/model")


def saved_model(folder: Path, layers: int) -> Path:
    """A random Llama with 4 heads of 128 and biases, with the tokenizer of the bundled model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=279, hidden_size=512, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        attention_bias=True, mlp_bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # the reference overwrites biases, ours adds to them
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.05)
        for layer in decoder_layers(model):  # units that matter unequally, as in trained models
            for path, size in zip(PATHS, (128, 1), strict=True):
                weight = layer.get_submodule(path).weight
                scale = torch.empty(weight.shape[1] // size).exponential_() + 0.1
                weight.mul_(scale.repeat_interleave(size))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


class _OldLayer(torch.nn.Module):
    """Gives a tuple, as layers did when the reference was written, and makes its own rotations."""

    def __init__(self, layer: Any, rotary: Any) -> None:
        super().__init__()
        self.layer, self.__dict__["rotary"] = layer, rotary
        self.self_attn, self.mlp = layer.self_attn, layer.mlp

    def forward(self, hidden: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        turned = self.rotary(hidden, position_ids)
        out = self.layer(hidden, attention_mask=attention_mask, position_ids=position_ids,
                         position_embeddings=turned)  # fmt: skip
        return (out,)


def theirs(checkout: Path, model: Any, tokens: CalibrationTokens, ratio: float) -> Any:
    """Run their main function on given tokens; return masks of heads and channels, and biases."""
    data: Any = types.ModuleType("lib.data")
    rows = [(row[None],) for row in tokens.input_ids]
    data.get_loaders = lambda *args, **kwargs: (rows, None)
    package: Any = types.ModuleType("lib")
    package.__path__ = [str(checkout / "lib")]
    sys.modules.update({"lib": package, "lib.data": data})
    module = importlib.import_module("lib.prune")
    masks: dict[int, Any] = {}
    inner, rotary = model.model.layers, model.model.rotary_emb
    wrapped = [_OldLayer(layer, rotary) for layer in inner]
    index = {id(layer): number for number, layer in enumerate(wrapped)}

    def compress_layer(layer: Any, attn: Any, mlp: Any, *means: Any, **options: Any) -> None:
        place = index[id(layer)]
        mask, mean = (attn, means[0]) if attn is not None else (mlp, means[1])
        kind = "heads" if attn is not None else "channels"
        masks.setdefault(place, {})[kind] = (mask.clone(), mean.clone())

    original, module.compress = module.compress, compress_layer
    model.model.layers = torch.nn.ModuleList(wrapped)
    model.seqlen = tokens.input_ids.shape[1]
    asked = types.SimpleNamespace(
        nsamples=len(rows), seed=0, metrics="WIFV", structure="AL-AM", pruning_ratio=ratio,
        remove_heads=-1, unstr=False,
    )  # fmt: skip
    try:
        with OnCPU():
            module.prune_flap(asked, model, None, torch.device("cpu"))
    finally:
        module.compress = original
        model.model.layers = inner
    return masks


class RunningSums:
    """Squares around a running mean as the reference adds them up, for one module."""

    def __init__(self) -> None:
        self.count, self.seen, self.mean, self.squares = 0, 0, 0.0, 0.0  # type: ignore[assignment]

    def add(self, rows: torch.Tensor) -> None:
        n = self.seen
        self.mean = self.mean * (n / (n + 1)) + rows.mean(0) / (n + 1)
        if n:
            spread = (rows - self.mean).square().sum(0)
            self.squares = self.squares * ((n - 1) / n) + spread / (n + 1)
        self.seen, self.count = n + 1, self.count + len(rows)

    def variance(self, layer: int) -> torch.Tensor:
        found: Any = self.squares
        return found.double()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration documents")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=0.3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return compared(asked, Path(folder))


def compared(asked: argparse.Namespace, folder: Path) -> int:
    source = saved_model(folder / "model", asked.layers)
    spec = CalibrationSpec(
        source=str(asked.text), samples=asked.samples, sequence_length=asked.length
    )
    tokens = load_calibration(spec, AutoTokenizer.from_pretrained(source), progress=False)
    model = LlamaForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    masks = theirs(asked.reference, model, tokens, asked.ratio)
    units = prunable(model.config)
    gone = {
        layer: {kind: (~mask).nonzero().view(-1).tolist() for kind, (mask, _) in each.items()}
        for layer, each in masks.items()
    }
    removed = sum(
        len(each["heads"]) * units.head_cost + len(each["channels"]) * units.channel_cost
        for each in gone.values()
    )
    recipe = load_recipe(
        "flap", {"sparsity": removed / units.total, "parameters.channel_multiple": 1}
    ).model_copy(update={"calibration": spec})
    out = compress(source, recipe, folder / "out", cache=folder / "cache", progress=False)
    ours = {int(k): v for k, v in json.loads((out / UNITS_FILE).read_text()).items()}
    emulated = in_its_order(model, tokens, removed / units.total)
    print(f"reference: {removed} parameters removed ({removed / units.total:.1%} of all)")
    print(
        "| layer | heads, reference | ours | channels, reference | differ | differ in its order |"
    )
    print("|---|---|---|---|---|---|")
    same = True
    for layer, each in gone.items():
        apart = [len(set(each["channels"]) ^ set(found[layer]["channels"]))
                 for found in (ours, emulated)]  # fmt: skip
        same &= not apart[1] and each["heads"] == emulated[layer]["heads"]
        print(f"| {layer} | {each['heads']} | {ours[layer]['heads']} | {len(each['channels'])} | "
              f"{apart[0]} | {apart[1]} |")  # fmt: skip
    print(f"biases: largest relative difference {means_apart(out, model, masks, ours):.1e}")
    return 0 if same else 1


def in_its_order(model: Any, tokens: CalibrationTokens, share: float) -> dict[int, Any]:
    """Our search on scores that are added up the reference's way."""
    sums = {(i, path): RunningSums() for i in range(len(decoder_layers(model))) for path in PATHS}
    handles = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda m, args, key=(i, path): sums[key].add(args[0].flatten(0, 1))
        )
        for i, layer in enumerate(decoder_layers(model))
        for path in PATHS
    ]
    with torch.no_grad():
        for row in tokens.input_ids:
            model(row[None])
    for handle in handles:
        handle.remove()
    scores = {}
    for i, layer in enumerate(decoder_layers(model)):
        heads, channels = (
            column_score("WIFV", layer.get_submodule(p).weight.detach(), sums[i, p], i)  # type: ignore[arg-type]
            for p in PATHS
        )
        scores[i] = ColumnScores(heads.square(), channels, {})
    kept, _ = search(scores, prunable(model.config), share)
    widths = prunable(model.config).widths
    return {
        i: {
            "heads": sorted(set(range(widths.num_attention_heads)) - set(k.query.tolist())),
            "channels": sorted(set(range(widths.intermediate_size)) - set(k.channel.tolist())),
        }
        for i, k in kept.items()
    }


def means_apart(out: Path, model: Any, masks: Any, ours: Any) -> float:
    """Largest difference of biases from those of the reference's means, relative to the largest."""
    reader, worst = CheckpointReader(out), 0.0
    for layer, each in masks.items():
        for kind, path in zip(("heads", "channels"), PATHS, strict=True):
            mean = each[kind][1].float()
            size = 128 if kind == "heads" else 1
            gone = torch.zeros(len(mean) // size)
            gone[ours[layer][kind]] = 1
            weight = decoder_layers(model)[layer].get_submodule(path).weight.detach()
            expected = (mean * gone.repeat_interleave(size)) @ weight.T
            found = reader.tensor(f"model.layers.{layer}.{path}.bias")
            if ours[layer][kind]:
                worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


if __name__ == "__main__":
    sys.exit(main())
