"""SliceGPT beside its authors' implementation: the same model, tokens and widths.

    git clone https://github.com/microsoft/TransformerCompression REFERENCE
    python -m venv OTHER
    OTHER/bin/pip install -e REFERENCE   # pins transformers 4.41, hence its own environment
    python tests/benchmarks/slicegpt_vs_reference.py --reference REFERENCE \
        --python OTHER/bin/python --model MODEL --text STORIES.jsonl --held-out STORIES.txt

The reference runs in a process of the other interpreter, on the very tokens that ours runs on, in
float32 on the CPU; of its code nothing is kept here. It is run as it is, and *aligned*: without
the centring of the embeddings, which changes a model with RMSNorm, and with the model's own epsilon
instead of 1e-5. Aligned, the losses must agree. Reported: loss per held-out token, parameters, CPU
seconds of rotating and slicing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

VARIANTS = ("as it is", "aligned")


def loss(model: Any, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood of every token but the first of each row, in nats."""
    total = 0.0
    with torch.no_grad():
        for batch in ids.split(8):
            scores = model(batch).logits.double().log_softmax(-1)
            total -= float(scores[:, :-1].gather(-1, batch[:, 1:, None]).sum())
    return total / (ids.numel() - len(ids))


def measured(model: Any, held_out: torch.Tensor, work: Callable[[], None]) -> dict[str, float]:
    """Run ``work``, which slices ``model``, and return what is reported."""
    begin = time.process_time()
    work()
    seconds = time.process_time() - begin
    size = sum(p.numel() for p in model.parameters())
    return {"loss": loss(model, held_out), "parameters": size, "cpu_seconds": seconds}


def reference(checkout: str, model: str, tokens: str, width: int, variant: str) -> None:
    """Slice with the authors' functions and print a line of JSON; in the other interpreter."""
    sys.path.insert(0, f"{checkout}/src")
    from safetensors.torch import load_file
    from slicegpt import layernorm_fusion, modules, rotate
    from slicegpt.adapters.llama_adapter import LlamaModelAdapter
    from slicegpt.config import config as settings
    from slicegpt.slicing_scheduler import ConstSlicingScheduler
    from transformers import LlamaConfig, LlamaForCausalLM

    settings.device = torch.device("cpu")
    ids = torch.load(tokens)
    entries = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    entries["rope_theta"] = entries.pop("rope_parameters")["rope_theta"]
    known = LlamaConfig().to_dict()
    host = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in entries.items() if k in known}))
    host.load_state_dict(load_file(f"{model}/model.safetensors"), strict=False)
    host.tie_weights()
    host.float().eval()
    adapter = LlamaModelAdapter(host)
    layernorm_fusion.replace_layers(adapter, verbose=False)
    centred = LlamaModelAdapter.get_embeddings
    if variant == "aligned":
        LlamaModelAdapter.get_embeddings = lambda self: []
    layernorm_fusion.fuse_modules(adapter)
    LlamaModelAdapter.get_embeddings = centred
    if variant == "aligned":
        for module in host.modules():
            if isinstance(module, modules.RMSN):
                module.eps = host.config.rms_norm_eps
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids["fit"].split(8)
    ]
    scheduler = ConstSlicingScheduler(width)
    row = measured(
        host, ids["held_out"], lambda: rotate.rotate_and_slice(adapter, batches, scheduler)
    )
    print(json.dumps(row))


def ours(model: Path, ids: dict[str, torch.Tensor], width: int, signal: Any) -> dict[str, float]:
    """Slice with ours, in memory."""
    from transformers import AutoModelForCausalLM

    from streamline_bench.core.data.calibration import CalibrationTokens
    from streamline_bench.core.state_store import BatchStore
    from streamline_bench.methods.rotation.norm_fusion import fuse_norms
    from streamline_bench.methods.rotation.stream_rotation import RotationOptions, StreamRotation

    host = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    hidden = host.config.hidden_size

    def work() -> None:
        fuse_norms(host)
        tokens = CalibrationTokens.from_tensors(ids["fit"])
        options = RotationOptions(signal=signal, batch_size=8)
        store = BatchStore(Path("unused"), 0, 1)
        StreamRotation(host, tokens, store, options, progress=False).run(width, hidden)

    return measured(host, ids["held_out"], work)


def token_rows(arguments: argparse.Namespace, source: Path, count: int) -> torch.Tensor:
    """``[count, length]`` tokens of a text, packed."""
    from transformers import AutoTokenizer

    from streamline_bench.core.data.calibration import load_calibration
    from streamline_bench.core.recipe.schema import CalibrationSpec

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    spec = CalibrationSpec(source=str(source), samples=count, sequence_length=arguments.length)
    return load_calibration(spec, tokenizer, progress=False).input_ids


def main() -> None:
    if sys.argv[1:2] == ["reference"]:
        checkout, model, tokens, width, variant = sys.argv[2:]
        reference(checkout, model, tokens, int(width), variant)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of its environment")
    parser.add_argument("--model", type=Path, required=True, help="a Llama, in one shard")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--slicing", type=float, nargs="*", default=[0.25, 0.5])
    compare(parser.parse_args())


def compare(arguments: argparse.Namespace) -> None:
    """Print one row per width and variant."""
    ids = {
        "fit": token_rows(arguments, arguments.text, arguments.samples),
        "held_out": token_rows(arguments, arguments.held_out, 64),
    }
    entries = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    print("| width | variant | loss | parameters | CPU s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens.pt")
        torch.save(ids, tokens)
        for slicing in arguments.slicing:
            width = int((1 - slicing) * entries["hidden_size"]) // 8 * 8
            for variant in VARIANTS:
                place = [str(arguments.reference), str(arguments.model), str(tokens)]
                command = [
                    str(arguments.python),
                    __file__,
                    "reference",
                    *place,
                    str(width),
                    variant,
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                _print(width, f"reference, {variant}", json.loads(done.stdout.splitlines()[-1]))
            for signal in ("stream", "normalised"):
                row = ours(arguments.model, ids, width, signal)
                _print(width, f"ours, axes of the {signal}", row)


def _print(width: int, title: str, row: dict[str, float]) -> None:
    print(
        f"| {width} | {title} | {row['loss']:.8f} | {row['parameters']:.0f} "
        f"| {row['cpu_seconds']:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
