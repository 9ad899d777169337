"""LinearPatch and Ghosted Layers beside their authors' code: same model, block and tokens.

    git clone https://github.com/chenxinrui-tsinghua/LinearPatch LINEAR_PATCH
    git clone https://github.com/daniel-eai/ghosted_layers_official_repository GHOSTED
    python tests/benchmarks/boundary_maps_vs_reference.py --linear-patch LINEAR_PATCH \
        --ghosted GHOSTED --model streamline_bench/demo/model \
        --text streamline_bench/demo/model/calibration.jsonl \
        --held-out streamline_bench/demo/model/held_out.jsonl --apart 2 5 6 9

``layer_select.py``, ``block_scaling.py`` and ``lib/recovery.py`` are imported from the given
checkouts and run unchanged; of them nothing is kept here. Their text is replaced by the tokens that
ours is fitted on. LinearPatch casts to float16: it is run as it is, on a model in float16, and with
the casts left out. It divides by 128 sequences, however many it is given, which is undone.
Reported: the chosen blocks; distances of scales and maps; perplexity on the held-out text. Exit
code 1 when blocks differ by the same cosine, or a map from the reference's with the same ridge, or
the same mean over tokens. Of widths that are not a power of two there are several Hadamard
matrices: where the reference has another one than ours, patches are printed and not judged.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.methods.maps.linear_patch import hadamard
from streamline_bench.modeling import register

CPU = torch.device("cpu")
DIVISOR = 128
"""By what LinearPatch divides sums over sequences."""
FEWER = 32
"""Sequences that Ghosted Layers reads of its 128 by default."""
TOLERANCE = 1e-4
"""Of scales and maps, relative: both sides run the model in float32."""


class Unrounded(TorchFunctionMode):
    """Leaves out casts to float16; ``by_token`` also compares the channels of a token."""

    def __init__(self, by_token: bool = False) -> None:
        super().__init__()
        self._by_token = by_token

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.Tensor.half:
            return args[0].float()
        if function is torch.Tensor.to:
            args = tuple(torch.float32 if each is torch.float16 else each for each in args)
        if function is torch.cosine_similarity and self._by_token:
            kwargs = {**(kwargs or {}), "dim": -1}
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Made:
    """A result of ours: its model, the maps ``x W`` of its cuts, and how it chose."""

    model: Any
    maps: list[Tensor]
    chosen: dict[str, Any]
    removed: int

    @property
    def block(self) -> range:
        return range(self.chosen["start"], self.chosen["start"] + self.removed)


class Setting:
    """The model in float32, the tokens, and what is made of both."""

    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        self.source, self._folder, self._count = folder / "source", folder, 0
        AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).save_pretrained(
            self.source
        )
        tokenizer.save_pretrained(self.source)
        self.spec = self._of(asked.text, asked.samples + 1, asked.length)
        every = load_calibration(self.spec, tokenizer, progress=False)
        self.rows = every.split(1 / len(every), 0)[0].input_ids
        held_out = self._of(asked.held_out, 32, asked.length)
        self.held_out = load_calibration(held_out, tokenizer, progress=False)

    def ours(self, name: str, layers: int, **changes: Any) -> Made:
        """Compress; one sequence is kept out of the fit, as ours must keep one."""
        share = {"parameters.validation_share": 1 / (len(self.rows) + 1)}
        recipe = load_recipe(name, {"n_layers": layers, **share, **changes})
        recipe = recipe.model_copy(update={"calibration": self.spec})
        self._count += 1
        out = compress(
            self.source, recipe, self._folder / str(self._count), cache=self._folder / "cache",
            progress=False,
        )  # fmt: skip
        manifest, reader = read_manifest(out), CheckpointReader(out)
        assert manifest is not None
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        prefixes = [each.tensor_prefix(model.config) for each in model.config.parsed_attachments()]
        maps = [reader.tensor(prefix + "proj.weight").T for prefix in prefixes]
        return Made(model, maps, dict(manifest.chosen), layers)

    def dense(self, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype).eval()

    def without(self, gone: Sequence[int], dtype: torch.dtype = torch.float32) -> Any:
        model = self.dense(dtype)
        kept = [each for i, each in enumerate(model.model.layers) if i not in gone]
        model.model.layers = torch.nn.ModuleList(kept)
        return model

    def perplexity(self, model: Any) -> str:
        total = 0.0
        for ids in self.held_out.input_ids:
            with torch.no_grad():
                logits = model(ids[None], use_cache=False).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1).gather(-1, ids[1:, None]).sum())
        count = self.held_out.num_tokens - len(self.held_out)
        return f"{math.exp(total / count):.4f}"

    @staticmethod
    def _of(text: Path, samples: int, length: int) -> CalibrationSpec:
        return CalibrationSpec(source=str(text), samples=samples, sequence_length=length)


def quietly(function: Any, *args: Any) -> Any:
    """Call code that draws progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


def apart(found: Tensor, other: Tensor) -> float:
    """Their distance, relative to the second."""
    other = other.double()
    return float((found.double() - other).norm() / other.norm())


def linear_patch(setting: Setting, checkout: Path, sizes: Sequence[int]) -> bool:
    """Print the blocks for each size, and the patches of the last."""
    sys.path.insert(0, str(checkout))
    theirs: Any = importlib.import_module("layer_select")
    scaling: Any = importlib.import_module("block_scaling")
    loader = [(row[None],) for row in setting.rows]
    dense, same = setting.dense(), True
    print("| layers | block, ours | reference | reference, cosine of each token's channels |")
    print("|---|---|---|---|")
    for size in sizes:
        made, blocks = setting.ours("linear_patch", size), []
        for by_token in (False, True):
            with Unrounded(by_token):
                found = quietly(theirs.get_pruned_layer_with_cosine, dense, loader, size, CPU)
            blocks.append(list(found[1:3]))
        ours = [made.block.start, made.block.stop]
        same &= ours == blocks[1]
        print(f"| {size} | {ours} | {blocks[0]} | {blocks[1]} |", flush=True)
    block = made.block
    print(
        f"\n| layers {ours} | scales from ours | patch from ours | perplexity |\n|---|---|---|---|"
    )
    print(f"| removed | | | {setting.perplexity(setting.without(block))} |")
    print(f"| ours | | | {setting.perplexity(made.model)} |", flush=True)
    rotation = theirs.get_hadamard_matrix(len(made.maps[0]), CPU)
    our_scale = (rotation.T @ made.maps[0].double() @ rotation).diagonal()
    at_once = [(setting.rows,)]
    for title, rows, dtype, mode in (
        ("reference, float16", loader, torch.float16, contextlib.nullcontext()),
        ("reference, float32", loader, torch.float32, Unrounded()),
        ("reference, float32, sequences as one batch", at_once, torch.float32, Unrounded()),
    ):
        with mode:
            source, ends = setting.dense(dtype), (block.start, block.stop)
            scale = quietly(theirs.get_scale_params, source, rows, *ends, True, CPU)
            scale = scale.float() * (DIVISOR / len(rows))
            patch, pruned = scaling.LinearPatch(scale, True), setting.without(block, dtype)
            pruned.model.layers[block.start - 1].register_forward_hook(
                lambda module, args, out, patch=patch: patch(out)
            )
            distances = apart(scale, our_scale), apart(patch.get_weight().detach(), made.maps[0])
            found = setting.perplexity(pruned)
        print(f"| {title} | {distances[0]:.1e} | {distances[1]:.1e} | {found} |", flush=True)
    alike = apart(hadamard(len(rotation)), rotation) < TOLERANCE
    if not alike:
        print(f"the reference has another Hadamard matrix of order {len(rotation)}")
    return same and (distances[1] < TOLERANCE or not alike)


def ghosted(setting: Setting, checkout: Path, layers: int, separate: Sequence[int]) -> bool:
    """Print the maps across one block, then those of layers with others between them."""
    sys.path.insert(0, str(checkout))
    theirs: Any = importlib.import_module("lib.recovery")
    loader, dense = [(row[None],) for row in setting.rows], setting.dense()
    usual = setting.ours("ridge_map", layers)
    ends = usual.block.start, usual.block.stop
    states = theirs._collect_boundary_activations(dense, *ends, loader, CPU, len(loader))[0]
    diagonal = float(states.double().square().sum(0).mean())
    alike = setting.ours("ridge_map", layers, **{"parameters.ridge": 1e-6 / diagonal})
    one = torch.eye(len(alike.maps[0]))
    print(f"\nmean diagonal of X'X: {diagonal:.3e}; the reference's 1e-6: {1e-6 / diagonal:.1e}")
    print(f"| layers {list(ends)} | W - I from ours, same ridge | perplexity |\n|---|---|---|")
    print(f"| removed | | {setting.perplexity(setting.without(usual.block))} |")
    print(f"| ours, same ridge | | {setting.perplexity(alike.model)} |")
    far = apart(usual.maps[0] - one, alike.maps[0] - one)
    print(f"| ours, ridge 1e-6 | {far:.1e} | {setting.perplexity(usual.model)} |", flush=True)
    for title, count in ((f", {FEWER} sequences", FEWER), ("", len(loader))):
        layer = quietly(theirs.compute_ghosted_layer, dense, None, *ends, loader, CPU, count)
        pruned = setting.without(usual.block)
        theirs.register_ghosted_layer(pruned, ends[0], layer, CPU)
        far = apart(layer.get_weight().detach() - one, alike.maps[0] - one)
        print(f"| reference{title} | {far:.1e} | {setting.perplexity(pruned)} |", flush=True)
    if separate:
        several(setting, theirs, sorted(separate), 1e-6 / diagonal)
    return far < TOLERANCE


def several(setting: Setting, theirs: Any, gone: list[int], ridge: float) -> None:
    """Print one map for each run of layers, ours, beside one for each layer, the reference's."""
    chosen = {"method": "given_layers", "parameters": {"layers": gone}}
    changes = {"parameters.selection": chosen, "parameters.ridge": ridge}
    made = setting.ours("ridge_map", len(gone), **changes)
    loader = [(row[None],) for row in setting.rows]
    maps = quietly(
        theirs.compute_ghosted_layer_multi, setting.dense(), gone, loader, CPU, len(loader)
    )
    pruned = setting.without(gone)
    quietly(theirs.register_ghosted_layer_multi, pruned, gone, maps, CPU)
    print(f"\n| layers {gone} | maps | perplexity |\n|---|---|---|")
    for title, count, model in (
        ("removed", 0, setting.without(gone)),
        ("ours", len(made.maps), made.model),
        ("reference", len(maps), pruned),
    ):
        print(f"| {title} | {count} | {setting.perplexity(model)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--linear-patch", type=Path, required=True, help="a checkout")
    parser.add_argument("--ghosted", type=Path, required=True, help="a checkout")
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama architecture")
    parser.add_argument("--text", type=Path, required=True, help="calibration documents")
    parser.add_argument("--held-out", type=Path, required=True, help="documents for perplexity")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--apart", type=int, nargs="*", default=[], help="layers, for several maps")
    asked = parser.parse_args()
    register()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(asked, Path(folder))
        same = linear_patch(setting, asked.linear_patch.resolve(), asked.layers)
        same &= ghosted(setting, asked.ghosted.resolve(), asked.layers[-1], asked.apart)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
