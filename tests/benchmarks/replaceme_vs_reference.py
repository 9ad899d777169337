"""ReplaceMe beside its authors' implementation: the same model, the same tokens.

    git clone https://github.com/mts-ai/ReplaceMe REFERENCE
    pip install pytorch-minimize colorama termcolor
    python tests/benchmarks/replaceme_vs_reference.py --reference REFERENCE \
        --model MODEL --text STORIES.jsonl --held-out STORIES.txt --layers 1

The reference's functions are imported from the given checkout and run unchanged; of them nothing is
kept here. Its data loader and tokenizer are replaced by the very tokens that ours fits on, and its
hard-coded CUDA device by the CPU. It casts the result to bfloat16; its map is therefore also
compared before that. Reported: the chosen block, the relative distance of the folded weights, and
perplexity on the held-out text.
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
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from on_cpu import OnCPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration


class TokenRows:
    """Stands for the reference's tokenizer: "texts" are row numbers of our tokens."""

    pad_token = "</s>"

    def __init__(self, tokens: CalibrationTokens) -> None:
        self._tokens = tokens

    def __call__(self, batch: list[str], **_: Any) -> dict[str, torch.Tensor]:
        rows = [int(name) for name in batch]
        mask = self._tokens.attention_mask[rows]
        longest = int(mask.sum(1).max())
        ids = self._tokens.input_ids[rows]
        return {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest].long()}

    def save_pretrained(self, folder: str) -> None:
        """Nothing to save."""


class Reference:
    """The authors' distance, lstsq and cosine functions on our tokens."""

    def __init__(self, checkout: Path, model: Path, layers: int) -> None:
        sys.path.insert(0, str(checkout))
        self._model, self._layers = model, layers
        self._modules = {
            name: importlib.import_module(f"ReplaceMe.{name}")
            for name in ("distance", "lstsq", "cosine_dist")
        }

    def block(self, tokens: CalibrationTokens, batch_size: int) -> list[tuple[int, int]]:
        """Write ``distances.pth`` in the current folder and return the chosen blocks."""
        module = self._feed("distance", tokens, batch_size)
        module.profile_distances(**self._common(tokens, batch_size))
        distances = [float(d) for d in torch.load("distances.pth", weights_only=False)]
        torch.save(distances, "distances.pth")
        choose = self._modules["lstsq"].select_non_overlapping_blocks
        chosen: list[tuple[int, int]] = choose(distances, self._layers, 1, True)
        return chosen

    def lstsq(self, tokens: CalibrationTokens, batch_size: int, name: str) -> tuple[Path, Any]:
        """Return (folder, map) of the least-squares variant."""
        module = self._feed("lstsq", tokens, batch_size)
        options = {**self._common(tokens, batch_size), "save_path": str(Path(name).absolute())}
        with OnCPU():
            folder = module.lstsq(**options, save_transform_only=True)
        return Path(folder), torch.load(f"{options['save_path']}_ReplaceMe_lstsq_1_transform")[0]

    def cosine(
        self, tokens: CalibrationTokens, block: tuple[int, int], name: str, accurate: bool
    ) -> tuple[Path, Any]:
        """Return (folder, map) of the cosine variant."""
        module = self._feed("cosine_dist", tokens, 1)
        options = {**self._common(tokens, 1), "save_path": str(Path(name).absolute())}
        with OnCPU():
            folder = module.cosine_dist(
                **options,
                save_transform_only=True,
                start_id=block[0],
                end_id=block[1],
                accurate=accurate,
            )
        return Path(folder), torch.load(f"{folder}_transform")

    def _common(self, tokens: CalibrationTokens, batch_size: int) -> dict[str, Any]:
        return {
            "model_path": str(self._model),
            "dataset": "tokens",
            "dataset_column": "text",
            "batch_size": batch_size,
            "max_length": tokens.input_ids.shape[1],
            "layers_to_skip": self._layers,
            "dataset_size": len(tokens),
        }

    def _feed(self, name: str, tokens: CalibrationTokens, batch_size: int) -> Any:
        module: Any = self._modules[name]

        def batches(*_: Any) -> Iterator[list[str]]:
            whole = len(tokens) - len(tokens) % batch_size  # it drops an incomplete batch
            for start in range(0, whole, batch_size):
                yield [str(row) for row in range(start, start + batch_size)]

        class Tokenizers:
            from_pretrained = staticmethod(lambda *_: TokenRows(tokens))

        module.get_calib_dataloader = batches
        module.AutoTokenizer = Tokenizers
        return module


def perplexity(folder: Path, tokens: CalibrationTokens) -> float:
    """Perplexity in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for ids, mask in tokens.batches(8):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask.long()).logits.log_softmax(-1)
        picked = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:]]
        total, count = total - float(picked.sum()), count + picked.numel()
    return math.exp(total / count)


def folded_weight(model: Path, host: int) -> torch.Tensor:
    """The output projection of a layer's MLP, float64."""
    name = f"model.layers.{host}.mlp.down_proj.weight"
    return CheckpointReader(model).tensor(name).double()


def ours(arguments: argparse.Namespace, name: str, output: Path, **changes: Any) -> Path:
    """Compress with a recipe of ours on the given text."""
    recipe = load_recipe(
        name,
        {
            "n_layers": arguments.layers,
            "calibration": str(arguments.text.absolute()),
            "calibration_samples": arguments.samples,
            "sequence_length": arguments.length,
            **changes,
        },
    )
    return compress(arguments.model, recipe, output, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama-like")
    parser.add_argument("--text", type=Path, required=True, help="calibration documents")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    for key in ("reference", "model", "text", "held_out"):
        setattr(arguments, key, getattr(arguments, key).absolute())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Print one row per variant."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out = load_calibration(
        load_recipe("linear_patch").calibration.model_copy(
            update={"source": str(arguments.held_out), "samples": 100, "sequence_length": 256}
        ),
        tokenizer,
        progress=False,
    )
    exact = ours(arguments, "replaceme_lstsq", Path("exact"), **{"parameters.ridge": 0.0})
    recipe = read_manifest(exact).recipe
    spec = load_recipe("replaceme_lstsq").calibration.model_validate(recipe["calibration"])
    tokens = load_calibration(spec, tokenizer, progress=False)
    fit, _ = tokens.split(0.05, 0)
    print(f"{len(tokens)} documents, {fit.num_tokens} tokens fitted on")
    block = read_manifest(exact).chosen["blocks"][0]
    host, start, stop = block["map_in_layer"], block["start"], block["stop"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        reference = Reference(arguments.reference, arguments.model, arguments.layers)
        chosen = reference.block(tokens, 1)
        alone = reference.lstsq(fit, 1, "alone")
        padded = reference.lstsq(fit, 8, "padded")
        loose = reference.cosine(fit, (start, stop), "loose", accurate=False)
        accurate = reference.cosine(fit, (start, stop), "accurate", accurate=True)
    print(f"block: ours [{start}, {stop}), reference {chosen}")
    print("| | perplexity | folded weights from ours |\n|---|---|---|")
    plain = ours(arguments, "streamline_none", Path("plain"), **{"parameters.start": start})
    default = ours(arguments, "replaceme_lstsq", Path("default"))
    cosine = ours(arguments, "replaceme_cosine", Path("cosine"))
    our_accurate = ours(
        arguments, "replaceme_cosine", Path("our-accurate"), **{"parameters.accurate": True}
    )
    source = folded_weight(arguments.model, host)
    for title, path, map_, against in (
        ("dense", arguments.model, None, None),
        ("block removed", plain, None, None),
        ("lstsq, ours, no ridge", exact, None, None),
        ("lstsq, ours, ridge 1e-6", default, None, exact),
        ("lstsq, reference, one by one", *alone, exact),
        ("lstsq, reference, batches of 8 with pads", *padded, exact),
        ("cosine, ours", cosine, None, None),
        ("cosine, reference", *loose, cosine),
        ("accurate cosine, ours", our_accurate, None, None),
        ("accurate cosine, reference", *accurate, our_accurate),
    ):
        distance = ""
        if against is not None:
            base = folded_weight(against, host)
            other = folded_weight(path, host) if map_ is None else map_.T.cpu() @ source
            distance = f"{float((other.detach() - base).norm() / base.norm()):.2e}"
        print(f"| {title} | {perplexity(path, held_out):.4f} | {distance} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
