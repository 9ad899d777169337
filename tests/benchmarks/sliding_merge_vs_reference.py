"""Sliding layer merging beside its authors' code: same model, same tokens, same threshold.

    git clone https://github.com/920927/SLM-a-sliding-layer-merging-method REFERENCE
    python tests/benchmarks/sliding_merge_vs_reference.py --reference REFERENCE \
        --model streamline_bench/demo/model --text streamline_bench/demo/model/calibration.jsonl

``SLM.py`` is run unchanged, in float32; of it nothing is kept here. Its model is loaded, and its
text drawn, from what is given here. Ours is asked to stop at as many layers as it has removed.
Reported: the windows merged, and the largest difference of the weights of both results. Exit code
1 when they differ.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import types
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import transformers
from on_cpu import OnCPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.data.calibration import CalibrationTokens, load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec

TOLERANCE = 1e-6
"""Of weights: the reference adds differences to a running sum, which rounds."""


class Rows:
    """A tokenizer of texts that are the numbers of sequences."""

    eos_token = pad_token = ""

    def __init__(self, tokens: CalibrationTokens) -> None:
        self._tokens = tokens

    def __call__(self, text: str, **_: Any) -> Any:
        return types.SimpleNamespace(input_ids=self._tokens.input_ids[int(text)][None])


def theirs(checkout: Path, folder: Path, tokens: CalibrationTokens, threshold: float) -> Any:
    """Run their script; return its variables when it has ended."""
    texts = {"train": [{"text": str(number)} for number in range(len(tokens))]}
    load = AutoModelForCausalLM.from_pretrained
    given = ["SLM.py", "--model_path", str(folder), "--model_name", "merged"]
    given += ["--threshold", str(threshold), "--target_count", str(len(tokens))]
    with ExitStack() as stack:
        stack.enter_context(chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(patch.object(datasets, "load_dataset", lambda *_, **__: texts))
        stack.enter_context(patch.object(sys, "argv", given))
        stack.enter_context(patch.object(sys, "path", [str(checkout), *sys.path]))
        stack.enter_context(
            patch.object(
                transformers.AutoModelForCausalLM, "from_pretrained",
                lambda name, **_: load(name, dtype=torch.float32).eval(),
            )
        )  # fmt: skip
        stack.enter_context(
            patch.object(transformers.AutoTokenizer, "from_pretrained", lambda _: Rows(tokens))
        )
        stack.enter_context(patch.object(torch.nn.Module, "to", lambda module, *_, **__: module))
        stack.enter_context(OnCPU())
        return runpy.run_path(str(checkout / "SLM.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama architecture")
    parser.add_argument("--text", type=Path, required=True, help="calibration documents")
    parser.add_argument("--threshold", type=float, default=0.72, help="theirs by default")
    asked = parser.parse_args()
    spec = CalibrationSpec(source=str(asked.text.resolve()), samples=10, sequence_length=128)
    folder = asked.model.resolve()
    tokens = load_calibration(spec, AutoTokenizer.from_pretrained(folder), progress=False)
    reference = theirs(asked.reference.resolve(), folder, tokens, asked.threshold)
    windows, other = reference["records"], reference["short_model"]
    removed = sum(len(window) - 1 for window in windows)
    changes = {"n_layers": removed, "parameters.threshold": asked.threshold}
    recipe = load_recipe("sliding_merge", changes).model_copy(update={"calibration": spec})
    with tempfile.TemporaryDirectory() as made:
        out = compress(folder, recipe, Path(made) / "out", cache=Path(made), progress=False)
        manifest = read_manifest(out)
        ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert manifest is not None
    found = [[m["base"], *m["others"]] for m in manifest.chosen["merges"]]
    print(f"windows, theirs: {windows} (in layers of the model as it then is)\nours: {found}")
    ours, other = dict(ours.named_parameters()), dict(other.named_parameters())
    apart = max(float((ours[name] - other[name]).abs().max()) for name in ours)
    print(f"{removed} layers removed; largest difference of the weights: {apart:.1e}")
    return 0 if ours.keys() == other.keys() and windows == found and apart < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
