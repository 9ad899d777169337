"""Llama-3.1-8B's shape on one GPU: times beside their limits, memory beside the forecast.

A checkpoint of random bfloat16 weights (16 GB) is written, and each part below runs in a process of
its own within its seconds (:data:`PARTS`), at most eight minutes in all:

- ``scan``: 50 sequences of 2,048 tokens;
- ``none``, ``layer``, ``slicegpt``: a compression by a quarter without replacement, with a layer
  trained for 20 steps of 8 x 2,048 tokens, and by turned axes;
- ``scoring``: 1,000 questions of HellaSwag's size, by ``--model streamline`` and by ``--model hf``.

Printed for each: seconds beside the limit of ``reports/docs/pages/reference/limits.md`` (an H100's)
and the peak that torch counts on the device beside the forecast, or what went wrong.

    python tests/benchmarks/eight_b_on_gpu.py [--folder /tmp] [--parts scan,layer] [--tiny]

``--tiny`` does all of it in seconds on the CPU with a tiny model, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = {"scan": 60, "none": 70, "layer": 110, "slicegpt": 110, "scoring": 70}
"""Part -> seconds that it may take; a minute is left for the checkpoint."""
MAKING = 60
RECIPES = {"none": "streamline_none", "layer": "streamline", "slicegpt": "slicegpt"}
CHOICES, HF_BATCH, SHARD = 4, 64, 2_000_000_000
LIMITS = Path(__file__).parents[2] / "reports/docs/pages/reference/limits.md"


@dataclass(frozen=True)
class Size:
    """A model, what it reads, and where."""

    device: str
    dtype: str
    config: dict[str, int]
    samples: int
    length: int
    steps: int
    batch: int
    removed: int
    questions: int


SIZES = {
    "eight_b": Size(
        "cuda", "bfloat16",
        {"vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        50, 2_048, 20, 8, 9, 1_000,
    ),
    "tiny": Size(
        "cpu", "float32",
        {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
         "num_attention_heads": 2, "num_key_value_heads": 1},
        4, 32, 2, 2, 1, 6,
    ),
}  # fmt: skip


def write_model(folder: Path, size: Size) -> None:
    """Write random weights, a tokenizer that has a token for each word, and text."""
    import torch
    from safetensors.torch import save_file
    from streamed_memory import write_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **size.config, rope_theta=500_000.0, max_position_embeddings=8_192, dtype=size.dtype,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    device, dtype = torch.device(size.device), getattr(torch, size.dtype)
    torch.manual_seed(0)
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    total = 0

    def write() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in model.state_dict().items():
        weight = torch.ones(parameter.shape, device=device, dtype=dtype)
        shard[name] = (weight if weight.dim() == 1 else weight.normal_(std=0.02)).cpu()
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            write()
    if shard:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, config.vocab_size)
    draw, needed = random.Random(0), size.samples + 2 * size.steps * size.batch
    lines = (json.dumps({"text": _words(draw, size, size.length + 8)}) for _ in range(needed))
    (folder / "calibration.jsonl").write_text("\n".join(lines) + "\n")


def _words(draw: random.Random, size: Size, count: int) -> str:
    return " ".join(f"w{draw.randrange(size.config['vocab_size'] - 3)}" for _ in range(count))


def part(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Carry out one part; return what is printed of it."""
    import torch

    run = {"scan": scanned, "scoring": scored}.get(name, compressed)
    found = run(name, folder, size)
    if size.device == "cuda":
        found.setdefault("peak", torch.cuda.max_memory_allocated())
    return found


def scanned(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Scan the model in memory."""
    import torch

    from streamline_bench.core.data.calibration import CalibrationTokens
    from streamline_bench.core.scan import scan
    from streamline_bench.modeling.loading import load_model

    model = load_model(folder, device=size.device, dtype=size.dtype)
    ids = torch.randint(3, size.config["vocab_size"], (size.samples, size.length))
    scan(model, CalibrationTokens.from_tensors(ids[:1]), progress=False)
    begun = time.monotonic()
    scan(model, CalibrationTokens.from_tensors(ids), progress=False)
    return {"seconds": time.monotonic() - begun}


def compressed(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Compress; of a training, the seconds are those of a step."""
    from streamline_bench.compression import compress, load_recipe
    from streamline_bench.compression.forecast import forecast
    from streamline_bench.compression.recipes import applicable
    from streamline_bench.core.checkpoint.folder import read_manifest
    from streamline_bench.modeling.loading import SourceModel

    training = {
        "data.samples": size.steps * size.batch * 20 // 19 + 1, "data.sequence_length": size.length,
        "batch_size": size.batch, "min_steps": 0, "epochs": 1, "validations": 1,
        "gradient_accumulation": 1,
    }  # fmt: skip
    given = {
        "calibration": "auto", "calibration.samples": size.samples, "sequence_length": size.length,
        **{f"training.{key}": value for key, value in training.items()},
    }  # fmt: skip
    recipe = load_recipe(RECIPES[name])
    given |= {"sparsity": 0.25} if name == "slicegpt" else {"n_layers": size.removed}
    recipe = load_recipe(RECIPES[name], applicable(given, recipe))
    where: dict[str, Any] = {"device": size.device, "dtype": size.dtype}
    source = SourceModel.find(folder, progress=False)
    expected = forecast(source, recipe, **where, streamed=False)
    output = folder.parent / name
    begun = time.monotonic()
    compress(folder, recipe, output, **where, placement="resident", progress=False)
    found: dict[str, Any] = {"seconds": time.monotonic() - begun}
    found["forecast"] = expected.device_bytes or expected.host_bytes
    manifest = read_manifest(output)
    if manifest is not None and manifest.training is not None:
        found |= {"whole": found["seconds"], "steps": manifest.training["steps"]}
        found["seconds"] = manifest.training["seconds"] / manifest.training["steps"]
    return found


def scored(name: str, folder: Path, size: Size) -> dict[str, Any]:
    """Answer questions by both classes."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from scoring_vs_hf import Workload, answer, differences

    from streamline_bench.harness.lm import StreamlineLM

    draw, requests = random.Random(1), []
    for _ in range(size.questions):
        context = _words(draw, size, 70)
        for _ in range(CHOICES):
            arguments = (context, f" {_words(draw, size, 20)}")
            requests.append(
                Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)
            )
    asked = Workload("choice20", requests, CHOICES)
    first = Workload("choice20", requests[: 4 * CHOICES], CHOICES)
    where: dict[str, Any] = {"device": size.device, "dtype": size.dtype}
    seconds, answers, peaks = [], [], []
    for kind, batch in ((StreamlineLM, "auto"), (HFLM, HF_BATCH)):
        model = kind(pretrained=str(folder), batch_size=batch, **where)
        answer(model, first)  # what is made once
        if size.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.monotonic()
        answers.append(answer(model, asked))
        seconds.append(time.monotonic() - begun)
        peaks.append(torch.cuda.max_memory_allocated() if size.device == "cuda" else 0)
        del model
        if size.device == "cuda":
            torch.cuda.empty_cache()
    changed = differences(answers[0], answers[1], asked)["changed"]
    return {
        "seconds": seconds[0], "hf": seconds[1], "peak": peaks[0], "hf_peak": peaks[1],
        "changed": changed,
    }  # fmt: skip


def limits() -> dict[str, float]:
    """Return part -> seconds at an H100's limit, as the page computes them."""
    computed: dict[str, Any] = {}
    code = re.search(r"```python\n(.*?)```", LIMITS.read_text("utf-8"), re.DOTALL)
    assert code is not None
    exec(code[1], computed)
    names = {"scan": "scan", "layer": "MSE step", "scoring": "1,000 HellaSwag items"}
    return {name: computed["JOBS"][job][2] for name, job in names.items()}


def line(name: str, found: dict[str, Any], limit: float | None) -> str:
    """Return what is said of a part; sizes in 10^9 bytes."""
    said = [f"{name:9} {found['seconds']:8.2f} s{' a step' if 'steps' in found else ''}"]
    if limit is not None:
        said.append(f"limit {limit:.2f} s, {found['seconds'] / limit:.1f} times as much")
    if "whole" in found:
        said.append(f"{found['whole']:.1f} s in all, {found['steps']} steps")
    if "hf" in found:
        said.append(f"hf {found['hf']:.2f} s, {found['changed']} questions answered otherwise")
    for key in ("peak", "hf_peak", "forecast"):
        if found.get(key):
            said.append(f"{key.replace('_', ' ')} {found[key] / 1e9:.2f} GB")
    if found.get("peak") and "forecast" in found:
        said.append(f"forecast is {found['forecast'] / found['peak'] - 1:+.0%}")
    return "; ".join(said)


def in_process(arguments: list[str], seconds: float, cache: Path) -> dict[str, Any] | str:
    """Run this program for one thing; return what it found, or in words why it did not."""
    variables = {**os.environ, "STREAMLINE_BENCH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, env=variables,
            check=False, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:.0f} s"
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or ["?"])[-1]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where checkpoints are made for the time")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES["tiny" if options.tiny else "eight_b"]
    if options.part:
        name, model = options.part[0], Path(options.part[1])
        found = write_model(model, size) if name == "model" else part(name, model, size)
        print(json.dumps(found or {}))
        return 0
    failed = False
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        model, cache = Path(place) / "model", Path(place) / "cache"
        model.mkdir()
        tiny = ["--tiny"] if options.tiny else []
        begun = time.monotonic()
        made = in_process([*tiny, "--part", "model", str(model)], MAKING, cache)
        if isinstance(made, str):
            print(f"model     {made}")
            return 1
        print(f"model     {time.monotonic() - begun:8.2f} s", flush=True)
        for name in options.parts.split(","):
            found = in_process([*tiny, "--part", name, str(model)], PARTS[name], cache)
            failed |= isinstance(found, str)
            limit = None if options.tiny else limits().get(name)
            said = f"{name:9} {found}" if isinstance(found, str) else line(name, found, limit)
            print(said, flush=True)
            subprocess.run(["rm", "-rf", str(Path(place) / name)], check=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
